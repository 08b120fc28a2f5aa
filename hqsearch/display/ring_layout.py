"""Where the parts of a hash tree lie on its ring: pure geometry, without matplotlib."""

from dataclasses import dataclass

import numpy as np

OUTER_RADIUS = 1.0
# the tiles' ring starts no further in than this, so that the inner rings and the numbers keep their room
_INNERMOST_LEAF_RADIUS = {1: 0.36, 2: 0.44, 3: 0.54}
_WIDTH_OF_COUNTS = 0.34
_SPOKE_LENGTH = 0.125
_ARC_WIDTH = 0.035
_COLUMNS_AROUND = 32
_MAX_ROWS = 5
_GAP_OF_FIRST_LEVEL = np.deg2rad(3.0)


@dataclass(frozen=True)
class Arc:
    """One bucket of a level above the leaves; angles in radians, clockwise from the top."""

    path: tuple[int, ...]
    start: float
    end: float
    inner: float
    outer: float

    @property
    def middle(self):
        """Angle at which the spoke from the level above meets the arc."""
        return (self.start + self.end) / 2


@dataclass(frozen=True)
class Cell:
    """Place of one image: a piece of its leaf's sector and the upright square that fits into it."""

    leaf: int
    start: float
    end: float
    inner: float
    outer: float

    @property
    def center(self):
        """Middle of the cell in Cartesian coordinates."""
        return polar((self.inner + self.outer) / 2, (self.start + self.end) / 2)

    @property
    def side(self):
        """Side of the largest square that stays in the cell however the cell is turned."""
        widest_circle = min(self.outer - self.inner, 2 * self.inner * np.sin((self.end - self.start) / 2))
        return widest_circle / np.sqrt(2)


@dataclass(frozen=True)
class RingLayout:
    """Sectors of the leaves, arcs of the buckets above them, and cells for images."""

    starts: np.ndarray
    ends: np.ndarray
    leaf_inner: float
    arcs: list[Arc]
    cells: list[Cell]


def polar(radius, angle):
    """Turn a radius and an angle, clockwise from the top, into x and y."""
    return radius * np.sin(angle), radius * np.cos(angle)


def bucket_digits(bucket_ids, n_levels, branching_factor):
    """Split bucket ids into one digit per level, level 1 first: (n_leaves, n_levels) int64."""
    places = branching_factor ** np.arange(n_levels - 1, -1, -1, dtype=np.int64)
    return np.asarray(bucket_ids, dtype=np.int64)[:, np.newaxis] // places % branching_factor


def lay_out_ring(digits, *, with_cells):
    """Place leaves in equal sectors around the ring, siblings side by side.

    Equal sectors, because tiles of one size read better than arcs in proportion to the items; so the
    arc of a bucket is as long as its number of leaves.

    Parameters
    ----------
    digits : ndarray of shape (n_leaves, n_levels)
        Bucket digits of the leaves, in lexicographic order.
    with_cells : bool
        Whether to split the sectors into cells for images.

    Returns
    -------
    layout : RingLayout
    """
    n_leaves, n_levels = digits.shape
    gaps = _gaps_after_leaves(digits)
    width = (2 * np.pi - gaps.sum()) / n_leaves
    # half of the last gap comes first, so that the picture is even about its top
    starts = gaps[-1] / 2 + width * np.arange(n_leaves) + np.concatenate([[0.0], np.cumsum(gaps[:-1])])
    ends = starts + width

    innermost = _INNERMOST_LEAF_RADIUS[min(n_levels, 3)]
    if with_cells:
        n_columns = -(-_COLUMNS_AROUND // n_leaves)
        # rows grow outwards by this ratio, which makes each cell as high as it is wide
        ratio = (1 + width / n_columns / 2) / (1 - width / n_columns / 2)
        n_rows = max(1, min(_MAX_ROWS, int(np.log(OUTER_RADIUS / innermost) / np.log(ratio))))
        radii = OUTER_RADIUS / ratio ** np.arange(n_rows, -1, -1)
        cells = [
            Cell(leaf, angles[column], angles[column + 1], radii[row], radii[row + 1])
            for leaf in range(n_leaves)
            for angles in [np.linspace(starts[leaf], ends[leaf], n_columns + 1)]
            for row in range(n_rows - 1, -1, -1)
            for column in range(n_columns)
        ]
        leaf_inner = radii[0]
    else:
        cells = []
        leaf_inner = OUTER_RADIUS - _WIDTH_OF_COUNTS
    return RingLayout(starts, ends, leaf_inner, _arcs(digits, starts, ends, leaf_inner), cells)


def _gaps_after_leaves(digits):
    """Angle left free after each leaf: the higher up two neighbours part, the wider."""
    n_leaves, n_levels = digits.shape
    # the last leaf's neighbour is the first one; a leaf alone parts from itself at level 1
    parts_at = np.argmax(digits != np.roll(digits, -1, axis=0), axis=1)
    by_level = min(_GAP_OF_FIRST_LEVEL, 0.3 * 2 * np.pi / n_leaves) / 3.0 ** np.arange(n_levels)
    return by_level[parts_at]


def _arcs(digits, starts, ends, leaf_inner):
    n_levels = digits.shape[1]
    arcs = []
    for level in range(1, n_levels):
        outer = leaf_inner - _SPOKE_LENGTH * (n_levels - level) * min(1.0, 2 / (n_levels - 1))
        _, first_leaves = np.unique(digits[:, :level], axis=0, return_index=True)
        last_leaves = np.append(first_leaves[1:], len(digits)) - 1
        arcs += [
            Arc(tuple(digits[first, :level].tolist()), starts[first], ends[last], outer - _ARC_WIDTH, outer)
            for first, last in zip(first_leaves, last_leaves, strict=True)
        ]
    return arcs
