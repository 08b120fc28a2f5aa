"""Each kernel beside a plain numpy twin, on random, tied, empty and one-element input."""

import numpy as np
import pytest

from hqsearch.search import gathering, probing, scoring, topk
from hqsearch.search.blocks import BLOCK, PLAIN, SLACK, byte_scale
from hqsearch.search.engine import take_rows
from hqsearch.search.segments import Segment


@pytest.mark.parametrize("dim", [1, 3, 4, 7, 64, 130])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 64])
def test_square_distances_have_the_same_bits_in_both_kernels(dim, width):
    rng = np.random.default_rng(dim * 100 + width)
    queries = rng.normal(size=(5, dim)).astype(np.float32)
    items = rng.normal(size=(width, dim)).astype(np.float32)
    source = np.concatenate([[7.0] * 3, items.T.ravel(), [np.nan] * SLACK]).astype(np.float32)
    four = np.empty(4 * scoring.CHUNK, np.float32)
    rows = [4 * dim, 0, 2 * dim, dim]
    scoring.square_distances_4(queries.ravel(), *rows, dim, source, 3, width, four, 64)
    twin = ((queries[:, None].astype(np.float64) - items) ** 2).sum(axis=2)
    for g, query in enumerate((4, 0, 2, 1)):
        one = np.empty(BLOCK, np.float32)
        scoring.square_distances_1(queries.ravel(), query * dim, dim, source, 3, width, one, 0)
        got = four[g * scoring.CHUNK + 64 :][:width]
        np.testing.assert_array_equal(got, one[:width])
        np.testing.assert_allclose(got, twin[query], rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 16, 48, 49, 200])
@pytest.mark.parametrize("spread", [2, 50, 10**6])
@pytest.mark.parametrize("skipped", [-1, 3])
@pytest.mark.parametrize("farthest_first", [False, True])
def test_offer_keeps_the_least_keys_whatever_comes_in_what_order(size, spread, skipped, farthest_first):
    rng = np.random.default_rng(size + spread)
    keys = np.full(3 * size, topk.EMPTY_KEY)
    room = topk.make_room(4)
    squares = rng.integers(0, spread, 1000).astype(np.float32)
    if farthest_first:
        # Every chunk then brings more items that are nearer than the row's than the row has room for.
        squares = np.sort(squares)[::-1].copy()
    positions = rng.permutation(1000).astype(np.int32)
    first = 0
    for n_items in (0, 1, 5, 256, 64, 63, 200, 1, 256, 154):
        words = np.full(256 + 10, topk.NO_ITEM, np.int32)
        words[10 : 10 + n_items] = squares[first : first + n_items].view(np.int32)
        topk.offer(words, 10, max(1, -(-n_items // 64)), positions, first, skipped, keys, size, size, room)
        first += n_items
    kept = np.flatnonzero(positions != skipped)
    twin = kept[np.lexsort((positions[kept], squares[kept]))][:size]
    distances, found = np.empty((1, size), np.float32), np.empty((1, size), np.int64)
    n_found = topk.finish_rows(keys[size : 2 * size], np.zeros(1, np.int64), size, distances, found)
    np.testing.assert_array_equal(found[0, : len(twin)], positions[twin])
    np.testing.assert_array_equal(distances[0, : len(twin)], np.sqrt(squares[twin]))
    assert n_found == len(twin)
    assert (keys[:size] == topk.EMPTY_KEY).all()
    assert (keys[2 * size :] == topk.EMPTY_KEY).all()


@pytest.mark.parametrize("spread", [1, 3, 1000, 2**31 - 2])
@pytest.mark.parametrize("size", [1, 16, 48, 64])
def test_bound_least_lets_through_enough(size, spread):
    rng = np.random.default_rng(size)
    minima = rng.integers(0, spread, BLOCK).astype(np.int32)
    minima[40:] = topk.NO_ITEM
    bound = topk.bound_least(minima, size, np.int32(0x7F800000))
    assert bound >= np.sort(minima)[size - 1] or bound == 0x7F800000
    assert (minima <= bound).sum() <= max(size + 2, (minima <= np.sort(minima)[size - 1]).sum())


@pytest.mark.parametrize("size", [1, 5, 48, 49, 100])
def test_insert_key_keeps_the_least(size):
    rng = np.random.default_rng(size)
    keys = np.full(size + 2, topk.EMPTY_KEY)
    offered = rng.permutation(10 * size).astype(np.int64)
    for key in offered:
        if key < keys[1 : size + 1].max():
            topk.insert_key(keys, 1, size, key)
    assert sorted(keys[1 : size + 1]) == list(range(size))
    assert keys[0] == keys[-1] == topk.EMPTY_KEY


@pytest.mark.parametrize("n_pairs", [0, 1, 30, 5000])
@pytest.mark.parametrize("n_cells", [1, 40, 10**6])
def test_sort_pairs_sorts_by_cell_then_query(n_pairs, n_cells):
    rng = np.random.default_rng(n_pairs)
    query = np.sort(rng.integers(0, 300, n_pairs)).astype(np.int32)
    cell = rng.integers(0, n_cells, n_pairs).astype(np.int32)
    order = np.lexsort((query, cell))
    sorted_query, sorted_cell = probing.sort_pairs(query.copy(), cell.copy(), n_cells)
    np.testing.assert_array_equal(sorted_query, query[order])
    np.testing.assert_array_equal(sorted_cell, cell[order])


def test_ascending_bits_sort_as_the_floats_do():
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.normal(size=200) * 10.0 ** rng.integers(-300, 300, 200), [0.0, np.inf, -np.inf]]
    )
    bits = np.array([probing.ascending_bits(value) for value in values])
    np.testing.assert_array_equal(np.argsort(bits), np.argsort(values))
    assert probing.ascending_bits(0.0) == probing.ascending_bits(-0.0)


def test_rank_buckets_breaks_ties_by_bucket():
    scores = np.array([[1, 3, 3, 0], [0, 0, 0, 0]], dtype=np.float32)
    ranks = np.zeros((2, 4), np.int64)
    probing.rank_buckets(scores, ranks)
    assert ranks.tolist() == [[2, 0, 1, 3], [0, 1, 2, 3]]


def test_find_leaf_finds_what_is_there():
    leaves = np.array([2, 5, 9])
    assert [probing.find_leaf(leaves, leaf) for leaf in (0, 2, 4, 5, 9, 10)] == [-1, 0, -1, 1, 2, -1]
    assert probing.find_leaf(leaves[:0], 3) == -1


@pytest.mark.parametrize("shared", [False, True])
def test_list_leaf_lists_each_cell_that_holds_items_once(shared):
    leaf_cells, cell_live = np.array([9, 4, 0, 2, 4], np.int32), np.array([3, 1, 0, 1, 7], np.int32)
    seen = np.zeros(int(shared), np.uint64)
    query, cell = np.full(8, -1, np.int32), np.full(8, -1, np.int32)
    # Cells 4, 0, 2, of which 2 is vacant and 0 is to be left out.
    counts = probing.list_leaf(1, 3, 5, 0, shared, leaf_cells, cell_live, seen, query, cell, 2)
    assert counts == (2, 10, 10, 1)
    assert cell[2:4].tolist() == [4, 0]
    assert query[:4].tolist() == [-1, -1, 5, 5]
    if shared:
        assert seen[0] == 2**4 + 2**0
        again = probing.list_leaf(4, 1, 5, 0, True, leaf_cells, cell_live, seen, query, cell, 4)
        assert again == (0, 7, 0, 0)
        seen[:] = 0
        again = probing.list_leaf(4, 1, 5, 0, True, leaf_cells, cell_live, seen, query, cell, 4)
        assert again == (1, 7, 7, 0)


@pytest.mark.parametrize("leaves", [[], [7], [0, 1, 5, 6, 7, 26], list(range(27))])
def test_prefix_tree_lists_the_children_of_each_prefix(leaves):
    tree = probing.PrefixTree.build(np.array(leaves, dtype=np.int64), 3, 3)
    paths = {0: ()}
    for node in range(len(tree.child_start) - 1):
        for child in range(tree.child_start[node], tree.child_start[node + 1]):
            paths[child] = (*paths[node], int(tree.digit[child]))
    found = [paths[node] for node in range(tree.level_start[3], tree.digit.size)]
    assert found == [(leaf // 9, leaf // 3 % 3, leaf % 3) for leaf in leaves]


def test_the_heap_gives_nodes_in_order_ties_by_number():
    rng = np.random.default_rng(0)
    keys, nodes = rng.integers(0, 9, 60), rng.permutation(60)
    heap = (np.empty(60, np.int64), np.empty(60, np.int64), np.empty(60))
    for size in range(60):
        probing.push_node(*heap, size, keys[size], nodes[size], float(nodes[size]))
    found = []
    for size in range(60, 0, -1):
        found.append((heap[0][0], heap[1][0]))
        assert heap[2][0] == heap[1][0]
        probing.drop_first(*heap, size)
    assert found == sorted(zip(keys, nodes, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_queries", [1, 3, 50])
def test_gathering_small_cells_changes_no_bit(masked, n_queries):
    rng = np.random.default_rng(n_queries)
    n_items, dim, size = 900, 9, 12
    codes = np.minimum(rng.geometric(0.3, (n_items, 2)), 9)
    codes[:, 1] += 20
    vectors = rng.normal(size=(n_items, dim)).astype(np.float32)
    segment = Segment.build(vectors, codes, np.arange(n_items, dtype=np.int32), *byte_scale(vectors))
    sizes = np.diff(segment.cell_start)
    assert sizes.min() <= gathering.SMALL_CELL < sizes.max()
    queries = rng.normal(size=(n_queries, dim)).astype(np.float32)
    keep = (rng.random(n_items) < 0.5).astype(np.uint8) if masked else np.empty(0, np.uint8)
    cells = [
        np.flatnonzero(np.random.default_rng(q // 3).random(segment.n_cells) < 0.6) for q in range(n_queries)
    ]
    pair_query = np.repeat(np.arange(n_queries), [len(c) for c in cells]).astype(np.int32)
    pair_cell = np.concatenate(cells).astype(np.int32)
    skipped = np.where(np.arange(n_queries) % 2, 5, -1)
    empty = np.full(n_queries * size, topk.EMPTY_KEY)
    straight, gathered = empty.copy(), empty.copy()

    def score(query, cell, keys):
        query, cell = probing.sort_pairs(query.copy(), cell.copy(), segment.n_cells)
        scoring.score_pairs(
            queries, skipped, query, cell, 0, query.size, 0, *segment.kernel_arrays, keep, keys, size
        )

    score(pair_query, pair_cell, straight)
    sections = gathering.share_lists(pair_query, pair_cell, n_queries)
    rest = gathering.list_large_cells(sections, pair_cell, segment.cell_start)
    assert 0 < rest[0].size < pair_query.size
    score(*rest, gathered)
    gathering.score_small_cells(
        queries, skipped, sections, pair_cell, *segment.kernel_arrays, keep, gathered, size
    )
    np.testing.assert_array_equal(gathered, straight)
    for q in range(n_queries):
        rows = np.concatenate([np.arange(segment.cell_start[c], segment.cell_start[c + 1]) for c in cells[q]])
        usable = segment.positions[rows]
        usable = usable[usable != skipped[q]]
        usable = usable[keep[usable] != 0] if masked else usable
        twin = np.sort(((vectors[usable].astype(np.float64) - queries[q]) ** 2).sum(axis=1))[:size]
        got = (straight[q * size : (q + 1) * size] >> 32).astype(np.int32).view(np.float32)
        np.testing.assert_allclose(got, twin, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "lanes"), [([], 0), ([1], 16), ([16, 1], 32), ([24] * 3, 128), ([24] * 20, 256)]
)
def test_small_cells_get_no_more_lanes_than_they_fill(sizes, lanes):
    cell_start = np.concatenate([[0], np.cumsum([*sizes, 25])])
    cells = np.arange(len(sizes) + 1, dtype=np.int32)
    sections = np.array([[0, 0, 0, 6], [0, len(cells), 0, 6]])
    assert gathering.count_lanes(sections, cells, cell_start) == lanes


def test_gather_block_compacts_kept_columns():
    rng = np.random.default_rng(0)
    packed = rng.normal(size=3 * 10 + SLACK).astype(np.float32)
    low = np.zeros(3, np.float32)
    positions, keep = np.arange(10, dtype=np.int32), (np.arange(10) % 3 == 0).astype(np.uint8)
    source, found, columns = np.zeros(64, np.float32), np.zeros(64, np.int32), np.zeros(64, np.int32)
    no_bytes = np.empty(0, np.uint8)
    for mask, kept in ((keep, [0, 3, 6, 9]), (np.zeros(10, np.uint8), []), (no_bytes, list(range(10)))):
        n_kept = scoring.gather_block(
            packed, no_bytes, PLAIN, low, low, 0, 10, 0, positions, mask, source, found, columns
        )
        assert found[:n_kept].tolist() == kept
        np.testing.assert_array_equal(
            source[: 3 * n_kept].reshape(3, n_kept), packed[:30].reshape(3, 10)[:, kept]
        )


def test_take_rows_copies_and_reports_nan_and_infinity():
    queries = np.arange(12, dtype=np.float32).reshape(4, 3)
    for value, broken in ((1.0, 0), (np.nan, 2), (np.inf, 2), (-np.inf, 2)):
        queries[2, 1] = value
        totals = np.zeros(4, np.int64)
        taken, skipped = take_rows(queries, np.arange(4), np.array([2, 0]), totals)
        np.testing.assert_array_equal(taken, queries[[2, 0]])
        assert skipped.tolist() == [2, 0]
        assert totals[3] == broken


@pytest.mark.parametrize("seed", range(6))
def test_sections_cover_every_pair_once(seed):
    rng = np.random.default_rng(seed)
    n_planned = [0, 1, 2, 40, 40, 40][seed]
    lists = [
        [list(range(rng.integers(0, 12))), [7, 8, 9, *rng.integers(10, 13, 2)], []][i]
        for i in rng.integers(0, 3, n_planned)
    ]
    query = np.repeat(np.arange(n_planned), [len(cells) for cells in lists]).astype(np.int32)
    cell = np.array([c for cells in lists for c in cells], dtype=np.int32)
    sections = gathering.share_lists(query, cell, n_planned)
    found = [(q, c) for first, end, q0, q1 in sections for q in range(q0, q1) for c in cell[first:end]]
    assert sorted(found) == sorted(zip(query, cell, strict=True))
