"""scikit-learn's own checks of an estimator, with no expected failures."""

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex

# Few epochs: the checks fit about a hundred times and ask for no precision.
ENCODER = HierarchicalHashEncoder(metric_epochs=2, hash_epochs=2)


@pytest.mark.filterwarnings("ignore:.*SCIPY_ARRAY_API:UserWarning")
@parametrize_with_checks([ENCODER, HierarchicalHashIndex(ENCODER)])
def test_scikit_learn_check(estimator, check):
    check(estimator)
