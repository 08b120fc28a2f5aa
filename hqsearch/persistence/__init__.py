"""Fitted estimators <-> folders of plain files: arrays, safetensors weights, and a manifest. No pickle.

Torch and safetensors are imported by the first encoder that is saved or loaded, not with this package.
"""

from hqsearch.persistence.loading import load_estimator
from hqsearch.persistence.saving import SaveMixin

__all__ = ["SaveMixin", "load_estimator"]
