"""How evenly the items spread over the leaves."""

import numpy as np

from .leaves import encoder_of, occupied_leaves
from .pyplot import require_pyplot

# from this ratio of the largest leaf to the smallest one, small leaves would vanish on a linear axis
_LOG_FROM = 20


class BucketOccupancyDisplay:
    """Sizes of the leaves, largest first, beside the even spread.

    It is recommended to use `from_estimator` to create a display.

    Parameters
    ----------
    sizes : ndarray of shape (n_occupied,), int64
        Number of items in each occupied leaf.
    n_leaves : int
        Number of leaves of the tree, empty ones included.

    Attributes
    ----------
    bars_ : matplotlib PolyCollection
        The sizes.
    line_ : matplotlib Line2D
        The size that all occupied leaves would have if they were equal.
    ax_ : matplotlib Axes
        Axes with the sizes.
    figure_ : matplotlib Figure
        Figure that the axes belong to.

    See Also
    --------
    HashTreeDisplay : What lies in the leaves.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import numpy as np
    >>> from hqsearch.display import BucketOccupancyDisplay
    >>> display = BucketOccupancyDisplay(sizes=np.array([3, 9, 6]), n_leaves=16).plot()
    >>> display.ax_.get_title()
    '3 leaves occupied, 13 empty'
    >>> plt.close(display.figure_)
    """

    def __init__(self, *, sizes, n_leaves):
        self.sizes = sizes
        self.n_leaves = n_leaves

    @classmethod
    def from_estimator(cls, index, X, *, ax=None):
        """Encode items and draw how many lie in each leaf of the codes, however an index lists its own.

        Parameters
        ----------
        index : fitted HierarchicalHashIndex or encoder
            An index with `encoder_`, or an encoder itself: anything with `encode`, `n_levels` and
            `branching_factor`.
        X : array-like of shape (n_samples, n_features) or (n_samples, channels, height, width)
            Items to place, as the encoder takes them. An item with several buckets counts in each.
        ax : matplotlib Axes, default=None
            Axes to draw on. None makes a new figure.

        Returns
        -------
        display : BucketOccupancyDisplay

        Raises
        ------
        NotFittedError
            If `index` is not fitted.
        ValueError
            If the encoder's bucket ids don't fit its tree.
        TypeError
            If `index` is neither index nor encoder.
        """
        encoder = encoder_of(index)
        _, items = occupied_leaves(encoder, X)
        sizes = np.array([len(positions) for positions in items])
        n_leaves = int(encoder.branching_factor) ** int(encoder.n_levels)
        return cls(sizes=sizes, n_leaves=n_leaves).plot(ax)

    def plot(self, ax=None):
        """Draw the sizes.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on. None makes a new figure.

        Returns
        -------
        display : BucketOccupancyDisplay
            This display, with its attributes set.
        """
        plt = require_pyplot("BucketOccupancyDisplay.plot")
        if ax is None:
            _, ax = plt.subplots(layout="constrained")
        self.ax_, self.figure_ = ax, ax.figure
        largest_first = np.sort(self.sizes)[::-1]
        n_occupied = len(largest_first)
        even = largest_first.mean()
        # one filled outline in place of bars: thousands of bars are slow to draw and alias into stripes
        edges = np.arange(n_occupied + 1) + 0.5
        steps = np.append(largest_first, largest_first[-1])
        self.bars_ = ax.fill_between(edges, steps, step="post", color="#4a86d8", alpha=0.75, linewidth=0)
        label = f"even spread: {even:,.4g} a leaf"
        self.line_ = ax.axhline(even, color="#23272b", linestyle="--", linewidth=1.2, label=label)
        if largest_first[0] >= _LOG_FROM * largest_first[-1]:
            ax.set_yscale("log")
        bottom = 0.5 if ax.get_yscale() == "log" else 0.0
        ax.set(xlim=(0.5, n_occupied + 0.5), ylim=(bottom, 1.08 * largest_first[0]))
        ax.set(xlabel="Occupied leaf, largest first", ylabel="Number of items")
        occupied = f"{n_occupied:,} {'leaf' if n_occupied == 1 else 'leaves'} occupied"
        ax.set_title(f"{occupied}, {self.n_leaves - n_occupied:,} empty")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
        return self
