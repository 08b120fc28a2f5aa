"""hqsearch: hierarchical sparse hash codes for similarity search, as scikit-learn estimators."""

from hqsearch.encoder import HierarchicalHashEncoder
from hqsearch.index import HierarchicalHashIndex

__version__ = "0.1.0"

__all__ = ["HierarchicalHashEncoder", "HierarchicalHashIndex", "__version__"]
