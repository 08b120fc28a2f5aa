import subprocess
import sys
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from hqsearch.display import BucketOccupancyDisplay, HashTreeDisplay, SpeedupPrecisionDisplay
from hqsearch.display.palette import Pictures, wheel_colors
from hqsearch.display.ring_layout import OUTER_RADIUS, bucket_digits, lay_out_ring

mpl.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


class GivenCodes:
    """An encoder whose first feature is the bucket id; further features are further buckets."""

    def __init__(self, n_levels=2, branching_factor=8):
        self.n_levels = n_levels
        self.branching_factor = branching_factor

    def encode(self, X):
        return np.asarray(X).reshape(len(X), -1).astype(np.int64)


# leaf 3 (digits 0 3) holds items 0 1 2 3, three of them cats; leaf 17 (2 1) items 4 5; leaf 22 (2 6) item 6
X = np.array([3, 3, 3, 3, 17, 17, 22])[:, np.newaxis]
Y = np.array(["cat", "cat", "dog", "cat", "dog", "dog", "fox"])
IMAGES = np.zeros((7, 5, 5))
IMAGES[:, 1:-1, 1:-1] = np.arange(1, 8)[:, np.newaxis, np.newaxis]


def texts(artists):
    return [text.get_text() for text in artists]


def test_only_occupied_leaves_are_drawn_with_their_digits_on_the_spokes():
    display = HashTreeDisplay.from_estimator(GivenCodes(), X, Y)
    assert display.shown_leaf_ids_.tolist() == [3, 17, 22]
    # two first-level buckets, 0 and 2, then the second digits of the leaves
    assert texts(display.bucket_texts_) == ["0", "2", "3", "1", "6"]
    assert texts(display.leaf_texts_) == ["cat", "dog", "fox"]
    assert "3 of 64 leaves occupied, 7 items" in display.note_.get_text()
    assert {"cat: 3", "dog: 1", "dog: 2", "fox: 1", "4 · 75%", "2", "1"} == set(texts(display.count_texts_))


def test_images_of_a_leaf_are_its_own_items_and_those_of_another_label_are_framed():
    display = HashTreeDisplay.from_estimator(GivenCodes(), X, Y, images=IMAGES)
    # cats first, the dog among them last and framed
    assert display.shown_items_ == [(3, 0), (3, 1), (3, 3), (3, 2), (17, 4), (17, 5), (22, 6)]
    assert display.framed_ == [False, False, False, True, False, False, False]
    # the ink of each tile is that of its item: values 1 to 7 of 7
    inks = [tile.get_array()[..., 3].max() for tile in display.tiles_]
    np.testing.assert_allclose(inks, [(item + 1) / 7 for _, item in display.shown_items_])
    assert any("framed" in text.get_text() for text in display.ax_.texts)


def test_a_pure_tree_has_no_frames_and_no_word_about_them():
    display = HashTreeDisplay.from_estimator(GivenCodes(), X[4:], Y[4:], images=IMAGES[4:])
    assert not any(display.framed_)
    assert not any("framed" in text.get_text() for text in display.ax_.texts)


def test_a_sample_of_a_large_leaf_has_each_label_in_proportion():
    labels = np.repeat(["a", "b"], [750, 250])[np.random.default_rng(0).permutation(1000)]
    codes = np.concatenate([np.zeros(1000), np.full(1000, 9)])[:, np.newaxis]
    images = np.random.default_rng(0).random((2000, 4, 4))
    display = HashTreeDisplay.from_estimator(GivenCodes(), codes, np.tile(labels, 2), images=images)
    assert np.mean(display.framed_) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("max_leaves", [1, 2])
def test_the_largest_leaves_are_kept_and_the_note_says_what_was_left_out(max_leaves):
    display = HashTreeDisplay.from_estimator(GivenCodes(), X[::-1], images=IMAGES, max_leaves=max_leaves)
    assert display.shown_leaf_ids_.tolist() == [3, 17][:max_leaves]
    note = (
        "not shown: 1 smaller leaf (1 item)" if max_leaves == 2 else "not shown: 2 smaller leaves (3 items)"
    )
    assert display.note_.get_text().endswith(note)


def test_without_labels_leaves_are_named_by_their_sizes():
    display = HashTreeDisplay.from_estimator(GivenCodes(), X)
    assert texts(display.leaf_texts_) == ["4", "2", "1"]


def test_items_without_a_label_are_named_none_among_those_that_have_one():
    y = np.array([None if label == "dog" else label for label in Y], dtype=object)
    named = HashTreeDisplay.from_estimator(GivenCodes(), X, y)
    as_text = HashTreeDisplay.from_estimator(GivenCodes(), X, y.astype(str))
    assert texts(named.leaf_texts_) == texts(as_text.leaf_texts_)
    assert "None" in " ".join(texts(named.leaf_texts_))


def test_an_item_with_two_buckets_is_in_two_leaves_and_counted_once():
    display = HashTreeDisplay.from_estimator(GivenCodes(), np.array([[3, 5], [3, 5], [3, 6]]))
    assert [items.tolist() for items in display.items] == [[0, 1, 2], [0, 1], [2]]
    assert "3 of 64 leaves occupied, 3 items" in display.note_.get_text()


def test_an_index_is_drawn_like_its_encoder():
    index = SimpleNamespace(encoder_=GivenCodes())
    drawn = [HashTreeDisplay.from_estimator(estimator, X, Y) for estimator in (index, GivenCodes())]
    assert texts(drawn[0].ax_.texts) == texts(drawn[1].ax_.texts)


@pytest.mark.parametrize(("channels", "shape"), [(1, (4, 4)), (3, (4, 4, 3))])
def test_images_are_taken_from_X_where_X_is_made_of_images(channels, shape):
    class FirstPixel(GivenCodes):
        def encode(self, X):
            return X[:, 0, 0, :1].astype(np.int64)

    images = np.random.default_rng(0).integers(0, 64, size=(6, channels, 4, 4))
    display = HashTreeDisplay.from_estimator(FirstPixel(), images)
    assert display.images.shape == (6, *shape)
    assert len(display.tiles_) == 6


@pytest.mark.parametrize("n_levels", [1, 2, 3, 4])
def test_each_level_above_the_leaves_is_a_ring_of_arcs(n_levels):
    codes = np.arange(0, 5**n_levels, max(1, 5**n_levels // 20))[:, np.newaxis]
    display = HashTreeDisplay.from_estimator(GivenCodes(n_levels, 5), codes)
    paths = {
        tuple(path[:level])
        for path in bucket_digits(codes[:, 0], n_levels, 5).tolist()
        for level in range(1, n_levels + 1)
    }
    expected = [str(path[-1]) for path in sorted(paths, key=lambda path: (len(path), path))]
    assert texts(display.bucket_texts_) == expected


@pytest.mark.parametrize("n_leaves", [1, 2, 11, 33, 100])
def test_tiles_texts_and_numbers_overlap_nothing_of_their_kind(n_leaves):
    codes = np.random.default_rng(n_leaves).permutation(4096)[:n_leaves].repeat(30)[:, np.newaxis]
    images = np.random.default_rng(0).random((len(codes), 3, 3))
    y = codes[:, 0] % 10
    display = HashTreeDisplay.from_estimator(GivenCodes(2, 64), codes, y, images=images)
    renderer = display.figure_.canvas.get_renderer()
    for artists in (display.tiles_, display.bucket_texts_, display.leaf_texts_):
        bounds = np.array([artist.get_window_extent(renderer).extents for artist in artists])
        # a text's box is rounded up to pixels, and higher than its digits by room for letters like y
        margin = [1.0, 0.15 * (bounds[:, 3] - bounds[:, 1]).max()] if artists is not display.tiles_ else 0.0
        low, high = bounds[:, :2] + margin, bounds[:, 2:] - margin
        overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
        np.fill_diagonal(overlap[..., 0], -1)
        assert not (overlap > 0).all(axis=2).any()
        axes = display.ax_.get_window_extent()
        assert (low.min(axis=0) >= axes.min).all()
        assert (high.max(axis=0) <= axes.max).all()


@settings(deadline=None)
@given(
    ids=st.sets(st.integers(0, 7**3 - 1), min_size=1, max_size=60),
    tree=st.sampled_from([(1, 343), (2, 19), (3, 7)]),
)
def test_squares_stay_in_their_cells_and_sectors_apart_for_any_leaves(ids, tree):
    digits = bucket_digits(sorted(ids), *tree)
    layout = lay_out_ring(digits, with_cells=True)
    assert (layout.starts[1:] > layout.ends[:-1]).all()
    assert layout.ends[-1] - layout.starts[0] < 2 * np.pi
    # even about the top: as much room before the first leaf as behind the last one
    assert layout.starts[0] == pytest.approx(2 * np.pi - layout.ends[-1])
    assert all(arc.inner > 0 and arc.outer < layout.leaf_inner for arc in layout.arcs)
    assert {cell.leaf for cell in layout.cells} == set(range(len(ids)))
    for cell in layout.cells:
        half = cell.side / 2
        corners = np.array(cell.center)[:, np.newaxis] + half * np.array([[1, 1, -1, -1], [1, -1, 1, -1]])
        radii = np.hypot(*corners)
        middle = (cell.start + cell.end) / 2
        # angles from the cell's middle, so that none wraps around
        turned = np.angle(np.exp(1j * (np.arctan2(corners[0], corners[1]) - middle)))
        tolerance = 1e-9
        assert radii.min() >= cell.inner - tolerance
        assert radii.max() <= cell.outer + tolerance <= OUTER_RADIUS + 2 * tolerance
        assert np.abs(turned).max() <= (cell.end - cell.start) / 2 + tolerance


@given(ids=st.lists(st.integers(0, 64**5 - 1), min_size=1))
def test_bucket_digits_are_the_places_of_the_id(ids):
    digits = bucket_digits(ids, 5, 64)
    assert (digits @ 64 ** np.arange(4, -1, -1)).tolist() == ids
    assert ((digits >= 0) & (digits < 64)).all()


def test_colors_differ_and_stay_within_the_screen():
    colors = wheel_colors(12)
    assert colors.shape == (12, 3)
    assert ((colors >= 0) & (colors <= 1)).all()
    assert len(np.unique(colors.round(2), axis=0)) == 12


def test_gray_images_on_a_flat_ground_become_ink_whichever_way_round_they_are():
    on_black = Pictures(IMAGES).tile(6, ink=(0.1, 0.2, 0.3))
    on_white = Pictures(7 - IMAGES).tile(6, ink=(0.1, 0.2, 0.3))
    np.testing.assert_allclose(on_black, on_white)
    assert on_black[0, 0, 3] == 0.0
    np.testing.assert_allclose(on_black[2, 2], [0.1, 0.2, 0.3, 1.0])


@pytest.mark.parametrize("shape", [(4, 6, 6), (4, 6, 6, 3)])
def test_photographs_are_shown_as_they_are(shape):
    images = np.random.default_rng(0).integers(0, 256, size=shape).astype(np.uint8)
    tile = Pictures(images).tile(2, ink=(0.0, 0.0, 0.0))
    expected = images[2] / 255 if len(shape) == 4 else np.repeat(images[2][..., None], 3, axis=2) / 255
    np.testing.assert_allclose(tile[..., :3], expected)
    assert (tile[..., 3] == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": Y[:3]}, "inconsistent numbers of samples"),
        ({"images": IMAGES[:3]}, "inconsistent numbers of samples"),
        ({"images": np.zeros((7, 25))}, r"Expected images of shape .* images.shape = \(7, 25\)"),
        ({"images": np.zeros((7, 5, 5, 2))}, r"Expected images of shape .* images.shape = \(7, 5, 5, 2\)"),
        ({"images": np.full((7, 5, 5), np.nan)}, "contains NaN"),
        ({"max_leaves": 0}, "max_leaves == 0, must be >= 1"),
    ],
)
def test_a_tree_of_unfit_data_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HashTreeDisplay.from_estimator(GivenCodes(), X, **arguments)


@pytest.mark.parametrize("display", [HashTreeDisplay, BucketOccupancyDisplay])
@pytest.mark.parametrize("bucket", [-1, 64])
def test_bucket_ids_outside_of_the_tree_are_refused(display, bucket):
    with pytest.raises(ValueError, match=r"Expected bucket ids below branching_factor\*\*n_levels = 64"):
        display.from_estimator(GivenCodes(), [[3], [bucket]])


class Index(BaseEstimator):
    """An index that finds the right label more often the more leaves it probes."""

    def fit(self, X, y=None):
        self.labels_ = y
        self.n_samples_fit_ = len(X)
        return self

    def kneighbors(self, X, n_neighbors, *, n_probes, return_stats):
        assert return_stats
        n_queries = len(X)
        positions = np.zeros((n_queries, n_neighbors), dtype=np.int64)
        positions[n_probes:] = 1
        stats = SimpleNamespace(suf=lambda: 100 / n_probes)
        return np.zeros(positions.shape), positions, stats


@pytest.mark.parametrize("display", [HashTreeDisplay, BucketOccupancyDisplay])
def test_what_is_no_fitted_index_is_refused(display):
    with pytest.raises(NotFittedError):
        display.from_estimator(Index(), X)
    with pytest.raises(TypeError, match="Expected an index with encoder_ or an encoder with encode"):
        display.from_estimator(7, X)


@pytest.mark.parametrize("sparsity", [1, 2])
def test_occupancy_draws_sizes_from_the_largest_and_counts_the_empty_leaves(sparsity):
    codes = np.hstack([X, X + 1])[:, :sparsity]
    display = BucketOccupancyDisplay.from_estimator(SimpleNamespace(encoder_=GivenCodes()), codes)
    assert sorted(display.sizes) == sorted([4, 2, 1] * sparsity)
    tops = display.bars_.get_paths()[0].vertices[:, 1]
    assert tops.max() == 4
    assert display.ax_.get_title() == f"{3 * sparsity} leaves occupied, {64 - 3 * sparsity} empty"
    np.testing.assert_allclose(display.line_.get_ydata(), 7 / 3)
    assert display.ax_.get_yscale() == "linear"


def test_occupancy_of_very_uneven_leaves_is_on_a_log_axis():
    assert BucketOccupancyDisplay(sizes=np.array([1, 500]), n_leaves=4).plot().ax_.get_yscale() == "log"


def test_precision_is_drawn_against_speedup_for_each_number_of_probes():
    queries, labels = np.zeros((8, 2)), np.full(8, "cat")
    index = Index().fit(np.zeros((2, 2)), np.array(["cat", "dog"]))
    # with n leaves probed, the first n of the eight queries find the cat
    display = SpeedupPrecisionDisplay.from_estimator(
        index, queries, labels, n_probes=(1, 2, 8), k=2, peers={"flat": ([9, 1], [0.5, 0.7])}
    )
    np.testing.assert_allclose(display.line_.get_xydata(), [[100, 1 / 8], [50, 2 / 8], [12.5, 1]])
    np.testing.assert_allclose(display.peer_lines_[0].get_xydata(), [[1, 0.7], [9, 0.5]])
    assert display.ax_.get_xscale() == "log"
    assert display.ax_.get_ylabel() == "Precision@2"
    assert texts(display.ax_.texts) == ["1", "2", "8"]
    assert texts(display.ax_.get_legend().get_texts()) == ["hqsearch", "flat"]


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        ([1, 2], {"n_probes": ()}, r"sequence of at least one number, but n_probes = \(\)"),
        ([1, 2], {"n_probes": 4}, "sequence of at least one number, but n_probes = 4"),
        ([1, 2], {"k": 0}, "k == 0, must be >= 1"),
        ([1, 2], {"peers": {"flat": ([1, 2], [0.5])}}, "inconsistent numbers of samples"),
        (None, {}, "was fitted without y"),
    ],
)
def test_a_curve_of_nothing_is_refused(labels, arguments, message):
    with pytest.raises(ValueError, match=message):
        SpeedupPrecisionDisplay.from_estimator(Index().fit(X[:2], labels), X, Y, **arguments)


def test_a_curve_needs_a_fitted_index():
    with pytest.raises(NotFittedError):
        SpeedupPrecisionDisplay.from_estimator(Index(), X, Y)


def test_displays_draw_on_the_axes_they_are_given_and_can_be_drawn_again():
    _, axes = plt.subplots(1, 3)
    tree = HashTreeDisplay.from_estimator(GivenCodes(), X, Y, images=IMAGES, ax=axes[0])
    sizes = BucketOccupancyDisplay.from_estimator(GivenCodes(), X, ax=axes[1])
    curve = SpeedupPrecisionDisplay(suf=[2.0], precision=[0.5], n_probes=[1], k=1).plot(axes[2])
    for display, ax in zip((tree, sizes, curve), axes, strict=True):
        assert display.ax_ is ax
        assert display.figure_ is ax.figure
        assert display.plot().ax_ is not ax


def test_importing_displays_leaves_matplotlib_alone_and_drawing_without_it_says_how_to_get_it():
    code = """
import sys
import numpy as np
from hqsearch.display import BucketOccupancyDisplay
assert not any(name.split(".")[0] == "matplotlib" for name in sys.modules)
sys.modules["matplotlib"] = sys.modules["matplotlib.pyplot"] = None
try:
    BucketOccupancyDisplay(sizes=np.array([1]), n_leaves=1).plot()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip() == "BucketOccupancyDisplay.plot requires matplotlib: pip install 'hqsearch[plot]'"
    )
