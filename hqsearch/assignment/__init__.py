"""Class scores to codes: the combinatorial half of hqsearch.

The best codes of a mini-batch are a minimum-cost flow, one a level, chained from parent to child. This folder
knows nothing of embeddings or of search; it imports its compiled kernels on first use.
"""

from hqsearch.assignment.cascade import solve_cascade, solve_cascades
from hqsearch.assignment.certificate import Certificate, certificate
from hqsearch.assignment.network import LevelNetwork, SparseFlowGraph, level_network
from hqsearch.assignment.solvers import solve_level

__all__ = [
    "Certificate",
    "LevelNetwork",
    "SparseFlowGraph",
    "certificate",
    "level_network",
    "solve_cascade",
    "solve_cascades",
    "solve_level",
]
