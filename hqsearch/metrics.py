"""How well a search went: precision, recall, speed-up, and how pure the buckets are."""

from functools import partial
from numbers import Integral, Real

import numpy as np
from sklearn.metrics import normalized_mutual_info_score
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_array, check_consistent_length, check_scalar, column_or_1d

__all__ = [
    "bucket_nmi",
    "precision_at_k",
    "recall_at_k",
    "retrieval_scorers",
    "search_speedup_factor",
]


def _check_labels(y, name):
    """Return `y` as a vector of labels of any type, refusing NaN and None among numbers."""
    return column_or_1d(check_array(y, dtype=None, ensure_2d=False, input_name=name))


def _kind_of_labels(labels):
    """Kind of labels that only equals its own: "numbers", "strings" or another; None where they are mixed."""
    kind = labels.dtype.kind
    if kind == "O":
        types = {type(label) for label in labels.flat}
        if all(issubclass(each, str) for each in types):
            return "strings"
        return "numbers" if all(issubclass(each, (Real, np.number, np.bool_)) for each in types) else None
    # pandas and numpy each have strings of their own.
    return {"U": "strings", "T": "strings"}.get(kind, "numbers" if kind in "biuf" else kind)


def _hits(y_true, neighbor_labels, k):
    """Mark which of the first `k` neighbours carry their query's label, as (n_queries, k) bool."""
    y_true = _check_labels(y_true, "y_true")
    neighbor_labels = check_array(neighbor_labels, dtype=None, input_name="neighbor_labels")
    check_consistent_length(y_true, neighbor_labels)
    # numpy finds nothing equal when it compares numbers to strings, which would read as a precision of 0
    kinds = {_kind_of_labels(y_true), _kind_of_labels(neighbor_labels)}
    if len(kinds) > 1 and None not in kinds:
        raise ValueError(
            "Expected y_true and neighbor_labels to hold labels of the same type, but "
            f"y_true.dtype = {y_true.dtype}, neighbor_labels.dtype = {neighbor_labels.dtype}"
        )
    n_columns = neighbor_labels.shape[1]
    if k is None:
        k = n_columns
    check_scalar(k, "k", Integral, min_val=1)
    if k > n_columns:
        raise ValueError(f"Expected k <= n_neighbors, but k = {k}, n_neighbors = {n_columns}")
    return neighbor_labels[:, :k] == y_true[:, np.newaxis]


def precision_at_k(y_true, neighbor_labels, *, k=None):
    """Share of the first `k` neighbours that carry the query's label, averaged over the queries.

    This is the precision that [1]_ and [2]_ report: of the reranked results, best first, only the
    first `k` count, and each query weighs the same.

    Parameters
    ----------
    y_true : array-like of shape (n_queries,)
        Label of each query, numbers or strings.
    neighbor_labels : array-like of shape (n_queries, n_neighbors)
        Labels of the neighbours that the search returned, nearest first. With an index:
        ``index.labels_[index.kneighbors(X, return_distance=False)]``. An item that is its own query
        must have been left out by the search.
    k : int, default=None
        How many of the columns count. None counts all of them.

    Returns
    -------
    precision : float
        Between 0 and 1.

    Raises
    ------
    ValueError
        If `k` is smaller than 1 or larger than the number of columns, if the lengths differ, or if one
        array holds numbers and the other strings.
    TypeError
        If `k` is not an integer.

    See Also
    --------
    recall_at_k : Share of the queries that found at least one item of their label.

    References
    ----------
    .. [1] Y. Jeong, Y. Kim, H. O. Song, "End-to-End Efficient Representation Learning via Cascading
       Combinatorial Optimization", CVPR 2019, arXiv:1902.10990.
    .. [2] Y. Jeong, H. O. Song, "Efficient end-to-end learning for quantizable representations",
       ICML 2018, arXiv:1805.05809.

    Examples
    --------
    >>> from hqsearch.metrics import precision_at_k
    >>> y_true = ["cat", "dog"]
    >>> neighbor_labels = [["cat", "dog", "cat", "cat"], ["cat", "cat", "dog", "cat"]]
    >>> precision_at_k(y_true, neighbor_labels)
    0.5
    >>> precision_at_k(y_true, neighbor_labels, k=1)
    0.5
    >>> precision_at_k(y_true, neighbor_labels, k=2)
    0.25
    """
    return float(_hits(y_true, neighbor_labels, k).mean())


def recall_at_k(y_true, neighbor_labels, *, k=None):
    """Share of the queries with at least one item of their label among the first `k` neighbours.

    The recall of metric learning: it asks whether the search found *any* right item, not which share
    of all right items it found.

    Parameters
    ----------
    y_true : array-like of shape (n_queries,)
        Label of each query, numbers or strings.
    neighbor_labels : array-like of shape (n_queries, n_neighbors)
        Labels of the neighbours that the search returned, nearest first.
    k : int, default=None
        How many of the columns count. None counts all of them.

    Returns
    -------
    recall : float
        Between 0 and 1; equal to `precision_at_k` at ``k=1``, and never falling as `k` grows.

    Raises
    ------
    ValueError, TypeError
        As in `precision_at_k`.

    See Also
    --------
    precision_at_k : Share of the neighbours that carry the query's label.

    Examples
    --------
    >>> from hqsearch.metrics import recall_at_k
    >>> y_true = ["cat", "dog"]
    >>> neighbor_labels = [["cat", "dog", "cat", "cat"], ["cat", "cat", "dog", "cat"]]
    >>> [recall_at_k(y_true, neighbor_labels, k=k) for k in (1, 2, 3, 4)]
    [0.5, 0.5, 1.0, 1.0]
    """
    return float(_hits(y_true, neighbor_labels, k).any(axis=1).mean())


def search_speedup_factor(n_distances, n_items, *, n_queries=None):
    """How many times fewer items the search scored than an exhaustive scan would have (SUF).

    ``1 / mean over queries of (candidates scored / items searched)``. It counts distances, so it says
    the same on every machine; exhaustive search has 1.

    Parameters
    ----------
    n_distances : array-like of shape (n_queries,) or int
        How many candidates each query was compared with, or, when `n_queries` is given, their total
        over all queries. The query itself never counts as a candidate.
    n_items : int
        How many items an exhaustive scan compares each query with: the number of stored items, or one
        less when the queries are stored items themselves, because the query never counts.
    n_queries : int, default=None
        How many queries a total in `n_distances` is about. None if `n_distances` has an entry for each.

    Returns
    -------
    suf : float
        At least 1 unless candidates were scored twice; ``inf`` when no candidate was scored at all.

    Raises
    ------
    ValueError
        If `n_distances` is a single number without `n_queries` or an array with it, if it is empty or
        negative, or if `n_items` or `n_queries` is smaller than 1.
    TypeError
        If `n_items` or `n_queries` is not an integer.

    Examples
    --------
    Two queries that looked at 10 and at 30 of 1000 items:

    >>> from hqsearch.metrics import search_speedup_factor
    >>> search_speedup_factor([10, 30], n_items=1000)
    50.0
    >>> search_speedup_factor(40, n_items=1000, n_queries=2)
    50.0
    """
    check_scalar(n_items, "n_items", Integral, min_val=1)
    counts = check_array(n_distances, ensure_2d=False, ensure_min_samples=0, input_name="n_distances")
    if counts.ndim != (1 if n_queries is None else 0):
        raise ValueError(
            "Expected n_distances to be of shape (n_queries,), or a total together with n_queries, but "
            f"n_distances.shape = {counts.shape}, n_queries = {n_queries}"
        )
    if n_queries is None:
        n_queries = len(counts)
    check_scalar(n_queries, "n_queries", Integral, min_val=1)
    if (counts < 0).any():
        raise ValueError(f"Expected n_distances >= 0, but the smallest is {counts.min()}")
    total = float(counts.sum())
    return float(n_items) * n_queries / total if total else float("inf")


def bucket_nmi(codes, y):
    """Compute the normalized mutual information of buckets and labels: 1 when each tells the other.

    ``2 I(bucket; label) / (H(bucket) + H(label))`` over pairs of an item and a bucket it lies in: an
    item of sparsity `s` counts `s` times, once per bucket, and a bucket that is named twice in a row
    counts once.

    Parameters
    ----------
    codes : array-like of int of shape (n_samples, sparsity)
        Bucket ids of each item, as `HierarchicalHashEncoder.encode` returns them.
    y : array-like of shape (n_samples,)
        Label of each item, numbers or strings.

    Returns
    -------
    nmi : float
        Between 0 and 1. When all items share one bucket and one label, both entropies are 0 and the
        value is 1.0, as `sklearn.metrics.normalized_mutual_info_score` defines it.

    Raises
    ------
    ValueError
        If `codes` is not a 2-D array of non-negative whole numbers, or the lengths differ.

    References
    ----------
    .. [1] C. D. Manning, P. Raghavan, H. Schütze, "Introduction to Information Retrieval", Cambridge
       University Press, 2008, section 16.3.

    Examples
    --------
    >>> from hqsearch.metrics import bucket_nmi
    >>> bucket_nmi([[7], [7], [2], [2]], ["cat", "cat", "dog", "dog"])
    1.0
    >>> bucket_nmi([[7], [2], [7], [2]], ["cat", "cat", "dog", "dog"])
    0.0
    """
    codes = check_array(codes, input_name="codes")
    if codes.dtype.kind == "f" and not np.array_equal(codes, np.floor(codes)):
        raise ValueError(f"Expected codes to hold whole numbers, but codes.dtype = {codes.dtype}")
    if codes.min() < 0:
        raise ValueError(f"Expected bucket ids >= 0, but the smallest is {codes.min()}")
    y = _check_labels(y, "y")
    check_consistent_length(codes, y)
    codes = np.sort(codes, axis=1)
    first_of_its_bucket = np.ones(codes.shape, dtype=bool)
    first_of_its_bucket[:, 1:] = codes[:, 1:] != codes[:, :-1]
    items, columns = np.nonzero(first_of_its_bucket)
    # indices in place of values: sklearn warns when labels look like measurements (0.5, 1.5)
    buckets = np.unique(codes[items, columns], return_inverse=True)[1]
    labels = np.unique(y, return_inverse=True)[1][items]
    # rounding can carry the quotient past 1 by an ulp
    return min(1.0, float(normalized_mutual_info_score(labels, buckets, average_method="arithmetic")))


def _index_and_its_input(estimator, X):
    """Return the index at the end of a (nested) pipeline and `X` as the steps before it transform it."""
    while isinstance(estimator, Pipeline):
        if len(estimator) > 1:
            X = estimator[:-1].transform(X)
        estimator = estimator[-1]
    return estimator, X


def _require_labels(y):
    if y is None:
        raise ValueError("Retrieval scores compare labels: expected y of shape (n_queries,), but y is None")


def _score_precision(estimator, X, y, k):
    _require_labels(y)
    index, X = _index_and_its_input(estimator, X)
    neighbors = index.kneighbors(X, n_neighbors=k, return_distance=False)
    # Read after the search: of an index that another thread adds to, they may only be more by now.
    fitted_labels = getattr(index, "labels_", None)
    if fitted_labels is None:
        raise ValueError(f"This {type(index).__name__} instance was fitted without y: it has no labels")
    return precision_at_k(y, np.asarray(fitted_labels)[neighbors])


def _score_suf(estimator, X, y=None):
    index, X = _index_and_its_input(estimator, X)
    _, _, stats = index.kneighbors(X, return_stats=True)
    return float(stats.suf())


def _score_nmi(estimator, X, y):
    _require_labels(y)
    index, X = _index_and_its_input(estimator, X)
    return bucket_nmi(index.encoder_.encode(X), y)


def retrieval_scorers():
    """Scorers of a fitted `HierarchicalHashIndex`, or of a Pipeline that ends in one.

    Returns
    -------
    scorers : dict of str to callable
        For ``GridSearchCV(index, grid, scoring=retrieval_scorers(), refit="precision_at_1")``. Each is
        called as ``scorer(estimator, X, y)`` with held-out queries `X` and their labels `y`, searches
        the fitted items, returns a float of which more is better, and can be pickled:

        - ``"precision_at_1"``, ``"precision_at_4"``, ``"precision_at_16"``: see `precision_at_k`. Each
          is a search of its own, since more leaves are opened for more neighbours.
        - ``"suf"``: speed-up of the search as configured, with the index's own `n_neighbors`,
          `n_probes` and `epsilon`; see `search_speedup_factor`.
        - ``"nmi"``: see `bucket_nmi`, over the queries.

    Notes
    -----
    With fewer fitted items than `k`, ``precision_at_k`` doesn't quietly become another measure: the
    index's ValueError comes through, and `GridSearchCV` turns it into NaN with a warning unless
    ``error_score="raise"``. Take the entries that your data can support:
    ``{name: scorers[name] for name in ("precision_at_1", "suf")}``.

    Queries that are fitted items find themselves first, so the training scores of
    ``return_train_score=True`` are too good for retrieval.

    Examples
    --------
    >>> from hqsearch.metrics import retrieval_scorers
    >>> sorted(retrieval_scorers())
    ['nmi', 'precision_at_1', 'precision_at_16', 'precision_at_4', 'suf']
    """
    scorers = {f"precision_at_{k}": partial(_score_precision, k=k) for k in (1, 4, 16)}
    return {**scorers, "suf": _score_suf, "nmi": _score_nmi}
