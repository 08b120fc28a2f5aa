"""The hash tree as a picture: its occupied leaves on a ring, with what lies in them."""

from numbers import Integral

import numpy as np
from sklearn.utils.validation import check_array, check_consistent_length, check_scalar

from .leaves import LeafContent, encoder_of, occupied_leaves
from .palette import wheel_colors
from .pyplot import require_pyplot
from .ring_layout import OUTER_RADIUS, bucket_digits, lay_out_ring

_MOST_LEAVES_WITH_SIZES = 40


class HashTreeDisplay:
    """Picture of a hash tree: the root, rings of buckets, and what lies in each occupied leaf.

    It is recommended to use `from_estimator` to create a display. The root is in the middle. Each bucket
    of the first level has a colour and an arc whose length is its number of leaves; further levels above
    the leaves follow as further rings. The leaves lie around them in the order of their bucket ids, with
    sample images, or else with bars of how many items of each label they hold. The numbers on the spokes
    are the bucket's digit at each level; outside stand the most frequent label of the leaf, its number of
    items, and the share of that label where it is not all of them. A framed image has another label than
    its leaf's most frequent one.

    Parameters
    ----------
    leaf_ids : ndarray of shape (n_leaves,), int64
        Bucket ids of the occupied leaves, ascending.
    items : list of ndarray of int64
        Which items lie in each leaf, as positions in `y` and `images`. With a sparsity above 1 an item
        lies in several leaves.
    n_levels : int
        Levels of the tree.
    branching_factor : int
        Buckets per level.
    y : ndarray of shape (n_samples,), default=None
        Labels of the items.
    images : ndarray of shape (n_samples, height, width[, 3]), default=None
        Images of the items.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes with the hash tree.
    figure_ : matplotlib Figure
        Figure that the axes belong to.
    shown_leaf_ids_ : ndarray of int64
        Bucket ids of the leaves that were drawn.
    shown_items_ : list of (int, int)
        Bucket id and item of each image, in the order of `tiles_`.
    tiles_ : list of matplotlib AxesImage
        The images.
    framed_ : list of bool
        Whether the image's label differs from the most frequent label of its leaf.
    bucket_texts_ : list of matplotlib Text
        The numbers on the spokes, level by level, in the order of the bucket ids.
    leaf_texts_ : list of matplotlib Text
        The most frequent label of each leaf, or its size where there are no labels.
    count_texts_ : list of matplotlib Text
        The smaller texts, which there may be no room for: how many items, and of which label.
    note_ : matplotlib Text
        How many leaves are occupied, and how many were left out.

    See Also
    --------
    BucketOccupancyDisplay : Sizes of all leaves.

    Examples
    --------
    >>> import numpy as np
    >>> from hqsearch.display import HashTreeDisplay
    >>> display = HashTreeDisplay(
    ...     leaf_ids=np.array([1, 6, 7]),
    ...     items=[np.array([0, 2]), np.array([1, 3]), np.array([4])],
    ...     n_levels=2,
    ...     branching_factor=4,
    ...     y=np.array(["cat", "dog", "cat", "dog", "dog"]),
    ... )
    >>> display.plot(max_leaves=2).shown_leaf_ids_
    array([1, 6])
    >>> print(display.note_.get_text())
    3 of 16 leaves occupied, 5 items
    not shown: 1 smaller leaf (1 item)
    >>> import matplotlib.pyplot as plt
    >>> plt.close(display.figure_)
    """

    def __init__(self, *, leaf_ids, items, n_levels, branching_factor, y=None, images=None):
        self.leaf_ids = leaf_ids
        self.items = items
        self.n_levels = n_levels
        self.branching_factor = branching_factor
        self.y = y
        self.images = images

    @classmethod
    def from_estimator(cls, index, X, y=None, *, images=None, max_leaves=100, ax=None):
        """Encode items and draw the leaves of their codes, however an index lists its own.

        Parameters
        ----------
        index : fitted HierarchicalHashIndex or encoder
            An index with `encoder_`, or an encoder itself: anything with `encode`, `n_levels` and
            `branching_factor`.
        X : array-like of shape (n_samples, n_features) or (n_samples, channels, height, width)
            Items to place, as the encoder takes them.
        y : array-like of shape (n_samples,), default=None
            Labels of the items: leaves are named after their most frequent one.
        images : array-like of shape (n_samples, height, width[, 3]), default=None
            What to show of the items: gray, or with red, green and blue last. None shows `X` where that
            has one or three channels, and counts elsewhere.
        max_leaves : int, default=100
            How many leaves to draw at most. The largest are kept, and a note says what was left out.
        ax : matplotlib Axes, default=None
            Axes to draw on. None makes a new figure.

        Returns
        -------
        display : HashTreeDisplay

        Raises
        ------
        NotFittedError
            If `index` is not fitted.
        ValueError
            If lengths differ, `images` are not images, or the encoder's bucket ids don't fit its tree.
        TypeError
            If `index` is neither index nor encoder, or `max_leaves` is not an integer.
        """
        encoder = encoder_of(index)
        if images is None and np.ndim(X) == 4 and np.shape(X)[1] in (1, 3):
            images = np.asarray(X)
            images = images[:, 0] if images.shape[1] == 1 else np.moveaxis(images, 1, -1)
        if images is not None:
            images = check_array(images, ensure_2d=False, allow_nd=True, input_name="images")
            if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
                raise ValueError(
                    "Expected images of shape (n_samples, height, width) or (n_samples, height, width, 3), "
                    f"but images.shape = {images.shape}"
                )
        if y is not None:
            y = check_array(y, ensure_2d=False, dtype=None, input_name="y")
        check_consistent_length(X, y, images)
        leaf_ids, items = occupied_leaves(encoder, X)
        display = cls(
            leaf_ids=leaf_ids,
            items=items,
            n_levels=encoder.n_levels,
            branching_factor=encoder.branching_factor,
            y=y,
            images=images,
        )
        return display.plot(ax, max_leaves=max_leaves)

    def plot(self, ax=None, *, max_leaves=100):
        """Draw the tree.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to draw on. None makes a new figure.
        max_leaves : int, default=100
            How many leaves to draw at most, the largest first.

        Returns
        -------
        display : HashTreeDisplay
            This display, with its attributes set.
        """
        check_scalar(max_leaves, "max_leaves", Integral, min_val=1)
        plt = require_pyplot("HashTreeDisplay.plot")
        # these two import matplotlib, so they wait until somebody draws
        from .ring_canvas import RingCanvas
        from .tree_drawing import draw_branches, draw_counts, draw_images, name_leaves, write_sizes

        if ax is None:
            figure = plt.figure(figsize=(9, 9), facecolor="white")
            ax = figure.add_axes((0, 0, 1, 1))
        self.ax_, self.figure_ = ax, ax.figure

        sizes = np.array([len(items) for items in self.items])
        # the largest, and of equal ones the first; then back into the order of the ids
        shown = np.sort(np.argsort(-sizes, kind="stable")[:max_leaves])
        self.shown_leaf_ids_ = self.leaf_ids[shown]
        digits = bucket_digits(self.shown_leaf_ids_, self.n_levels, self.branching_factor)
        layout = lay_out_ring(digits, with_cells=self.images is not None)
        contents = [LeafContent.of(self.items[position], self.y) for position in shown]
        first_buckets, family = np.unique(digits[:, 0], return_inverse=True)
        colors = wheel_colors(len(first_buckets))[family]

        has_room = len(shown) <= _MOST_LEAVES_WITH_SIZES
        canvas = RingCanvas(ax, OUTER_RADIUS + 0.16)
        self.bucket_texts_ = draw_branches(canvas, layout, digits, self.branching_factor, colors)
        self.tiles_, self.shown_items_, self.framed_, self.count_texts_ = [], [], [], []
        if self.images is None:
            self.count_texts_ = draw_counts(canvas, layout, contents, colors)
        else:
            for leaf, item, is_framed, tile in draw_images(canvas, layout, contents, colors, self.images):
                self.shown_items_.append((int(self.shown_leaf_ids_[leaf]), item))
                self.framed_.append(is_framed)
                self.tiles_.append(tile)
        self.leaf_texts_ = name_leaves(canvas, layout, contents, colors, along_the_ring=has_room)
        if has_room and self.y is not None:
            self.count_texts_ += write_sizes(canvas, layout, contents)
        self.note_ = canvas.write_in_corner("left", self._note(sizes, shown))
        if any(self.framed_):
            canvas.write_in_corner("right", "framed: label differs from the leaf's majority")
        canvas.finish()
        return self

    def _note(self, sizes, shown):
        n_items = len(np.unique(np.concatenate(self.items)))
        n_buckets = self.branching_factor**self.n_levels
        note = f"{len(sizes):,} of {n_buckets:,} leaves occupied, {_plural(n_items, 'item', 'items')}"
        n_left_out = len(sizes) - len(shown)
        if n_left_out:
            left_out = _plural(n_left_out, "smaller leaf", "smaller leaves")
            n_items_left_out = int(sizes.sum() - sizes[shown].sum())
            note += f"\nnot shown: {left_out} ({_plural(n_items_left_out, 'item', 'items')})"
        return note


def _plural(number, one, many):
    return f"{number:,} {one if number == 1 else many}"
