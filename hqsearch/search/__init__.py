"""The search room: codes and embeddings in, nearest neighbours out. Numpy and numba only.

Numba is imported by the first table that is built, not with this package.
"""

from hqsearch.search.arrays import table_arrays, table_from_arrays
from hqsearch.search.checks import check_count
from hqsearch.search.directions import level_directions
from hqsearch.search.results import RadiusResult, SearchResult, SearchStats
from hqsearch.search.table import LeafTable

__all__ = [
    "LeafTable",
    "RadiusResult",
    "SearchResult",
    "SearchStats",
    "check_count",
    "level_directions",
    "table_arrays",
    "table_from_arrays",
]
