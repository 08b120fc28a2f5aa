"""What the speed of a search costs in precision."""

from numbers import Integral

import numpy as np
from sklearn.utils.validation import check_consistent_length, check_is_fitted, check_scalar

from hqsearch.metrics import precision_at_k

from .pyplot import require_pyplot


class SpeedupPrecisionDisplay:
    """Precision@k against the search speed-up factor, a point for each number of probed leaves.

    It is recommended to use `from_estimator` to create a display. Up and to the right is better.

    Parameters
    ----------
    suf : ndarray of shape (n_points,), float64
        Search speed-up factors; exhaustive search has 1.
    precision : ndarray of shape (n_points,), float64
        Precision@k at each of them.
    n_probes : ndarray of shape (n_points,), int64
        Number of leaves probed for each query.
    k : int
        How many neighbours the precision is about.
    name : str, default="hqsearch"
        Name of the curve in the legend.
    peers : dict of str to (array-like, array-like), default=None
        Further curves: a name, and the speed-up factors and precisions of its points.

    Attributes
    ----------
    line_ : matplotlib Line2D
        The curve.
    peer_lines_ : list of matplotlib Line2D
        The curves of the peers, in their order.
    ax_ : matplotlib Axes
        Axes with the curves.
    figure_ : matplotlib Figure
        Figure that the axes belong to.

    See Also
    --------
    hqsearch.metrics.search_speedup_factor : How the speed-up is counted.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import numpy as np
    >>> from hqsearch.display import SpeedupPrecisionDisplay
    >>> display = SpeedupPrecisionDisplay(
    ...     suf=np.array([98.0, 51.0]),
    ...     precision=np.array([0.71, 0.72]),
    ...     n_probes=np.array([1, 2]),
    ...     k=1,
    ...     peers={"exhaustive": ([1.0], [0.70])},
    ... ).plot()
    >>> display.ax_.get_ylabel()
    'Precision@1'
    >>> plt.close(display.figure_)
    """

    def __init__(self, *, suf, precision, n_probes, k, name="hqsearch", peers=None):
        self.suf = suf
        self.precision = precision
        self.n_probes = n_probes
        self.k = k
        self.name = name
        self.peers = peers

    @classmethod
    def from_estimator(
        cls, index, X, y, *, n_probes=(1, 2, 4, 8, 16), k=1, name="hqsearch", peers=None, ax=None
    ):
        """Search once for each number of probes and draw precision against speed-up.

        Parameters
        ----------
        index : fitted HierarchicalHashIndex
            An index that was fitted with labels.
        X : array-like of shape (n_queries, n_features) or (n_queries, channels, height, width)
            Queries that are not among the fitted items.
        y : array-like of shape (n_queries,)
            Labels of the queries.
        n_probes : sequence of int, default=(1, 2, 4, 8, 16)
            Numbers of leaves to probe for each query, at least where the index's `epsilon` is a number.
        k : int, default=1
            How many neighbours the precision is about.
        name : str, default="hqsearch"
            Name of the curve in the legend.
        peers : dict of str to (array-like, array-like), default=None
            Further curves: a name, and the speed-up factors and precisions of its points.
        ax : matplotlib Axes, default=None
            Axes to draw on. None makes a new figure.

        Returns
        -------
        display : SpeedupPrecisionDisplay

        Raises
        ------
        NotFittedError
            If `index` is not fitted.
        ValueError
            If `n_probes` is empty or no sequence, `k` is smaller than 1, the index was fitted without
            labels, or the two arrays of a peer differ in length.
        """
        check_is_fitted(index)
        check_scalar(k, "k", Integral, min_val=1)
        if np.ndim(n_probes) != 1 or len(n_probes) == 0:
            raise ValueError(
                f"Expected n_probes as a sequence of at least one number, but n_probes = {n_probes!r}"
            )
        for suf_of_peer, precision_of_peer in (peers or {}).values():
            check_consistent_length(suf_of_peer, precision_of_peer)
        if getattr(index, "labels_", None) is None:
            raise ValueError(f"This {type(index).__name__} instance was fitted without y: it has no labels")
        suf, precision = [], []
        for n in n_probes:
            _, neighbors, stats = index.kneighbors(X, n_neighbors=k, n_probes=n, return_stats=True)
            suf.append(stats.suf())
            precision.append(precision_at_k(y, np.asarray(index.labels_)[neighbors]))
        display = cls(
            suf=np.array(suf),
            precision=np.array(precision),
            n_probes=np.array(n_probes),
            k=k,
            name=name,
            peers=peers,
        )
        return display.plot(ax)

    def plot(self, ax=None):
        """Draw the curves.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on. None makes a new figure.

        Returns
        -------
        display : SpeedupPrecisionDisplay
            This display, with its attributes set.
        """
        plt = require_pyplot("SpeedupPrecisionDisplay.plot")
        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        self.ax_, self.figure_ = ax, ax.figure
        style = {"marker": "o", "linewidth": 1.6, "markersize": 5}
        (self.line_,) = ax.plot(self.suf, self.precision, color="#d8432e", label=self.name, zorder=3, **style)
        for n, *point in zip(self.n_probes, self.suf, self.precision, strict=True):
            ax.annotate(f"{n}", point, (0, 6), textcoords="offset points", ha="center", fontsize=8)
        self.peer_lines_ = []
        for name, (suf, precision) in (self.peers or {}).items():
            order = np.argsort(suf)
            points = np.asarray(suf)[order], np.asarray(precision)[order]
            self.peer_lines_ += ax.plot(*points, alpha=0.85, label=name, **style)
        ax.set_xscale("log")
        ax.set(xlabel="Search speed-up factor (exhaustive search = 1)", ylabel=f"Precision@{self.k}")
        ax.margins(y=0.12)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, title="numbers on the curve: leaves probed", title_fontsize=8)
        return self
