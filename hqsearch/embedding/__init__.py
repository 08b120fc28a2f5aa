"""X to embedding and level scores: trunks, losses, batches and the two training stages.

The only folder that imports torch, so nothing outside imports this door before torch is needed.
"""

from hqsearch.embedding.batches import split_validation
from hqsearch.embedding.model import EmbeddingModel, resolve_device
from hqsearch.embedding.training import CodeProblem, StageSettings
from hqsearch.embedding.weights import pack_model, unpack_model

__all__ = [
    "CodeProblem",
    "EmbeddingModel",
    "StageSettings",
    "pack_model",
    "resolve_device",
    "split_validation",
    "unpack_model",
]
