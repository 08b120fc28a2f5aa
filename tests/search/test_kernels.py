"""Each kernel beside a plain numpy twin, on random, tied, empty and one-element input."""

import numpy as np
import pytest
from numba import njit

from hqsearch.search import LeafTable, gathering, instructions, probing, scoring, topk
from hqsearch.search.blocks import BLOCK, LINE, PLAIN, SLACK, aligned_floats, aligned_zeros, byte_scale
from hqsearch.search.engine import take_rows
from hqsearch.search.segments import Segment


@pytest.mark.parametrize("dim", [1, 3, 4, 7, 64, 130])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 33, 47, 49, 64])
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
        one = np.full(BLOCK + 1, 5.0, np.float32)
        scoring.square_distances_1(queries.ravel(), query * dim, dim, source, 3, width, one, 0)
        got = four[g * scoring.CHUNK + 64 :][:width]
        np.testing.assert_array_equal(got, one[:width])
        # Nothing is written beyond the block.
        assert one[BLOCK] == 5.0
        starts, strides = np.arange(3, 11) % (3 + width), np.full(8, width)
        apart = np.empty(8, np.float32)
        scoring.square_distances_apart(
            queries.ravel(), query * dim, dim, source, starts.astype(np.uint64), strides.astype(np.uint64),
            0, apart,
        )  # fmt: skip
        np.testing.assert_array_equal(apart[: min(8, width)], one[: min(8, width)])
        np.testing.assert_allclose(got, twin[query], rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 16, 48, 49, 200])
@pytest.mark.parametrize("spread", [2, 50, 10**6])
@pytest.mark.parametrize("skipped", [-1, 3])
@pytest.mark.parametrize("farthest_first", [False, True])
def test_offer_keeps_the_least_keys_whatever_comes_in_what_order(size, spread, skipped, farthest_first):
    rng = np.random.default_rng(size + spread)
    keys = np.full(3 * size, topk.EMPTY_KEY)
    room = scoring.make_workspace(1, False)[1:3]
    squares = rng.integers(0, spread, 1000).astype(np.float32)
    if farthest_first:
        # Every chunk then brings more items that are nearer than the row's than the row has room for.
        squares = np.sort(squares)[::-1].copy()
    positions = rng.permutation(1000).astype(np.int32)
    first = 0
    for n_items in (0, 1, 5, 256, 64, 63, 200, 1, 256, 154):
        words = np.full(256 + 10, topk.NO_ITEM, np.int32)
        words[10 : 10 + n_items] = squares[first : first + n_items].view(np.int32)
        topk.offer(words, 10, max(1, -(-n_items // 64)), positions, first, skipped, keys, size, size, *room)
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
    cell = np.full(8, -1, np.int32)
    # Cells 4, 0, 2, of which 2 is vacant and 0 is to be left out.
    counts = probing.list_leaf(1, 3, 0, shared, leaf_cells, cell_live, seen, cell, 2)
    assert counts == (2, 10, 10, 1)
    assert cell[:4].tolist() == [-1, -1, 4, 0]
    if shared:
        assert seen[0] == 2**4 + 2**0
        again = probing.list_leaf(4, 1, 0, True, leaf_cells, cell_live, seen, cell, 4)
        assert again == (0, 7, 0, 0)
        seen[:] = 0
        again = probing.list_leaf(4, 1, 0, True, leaf_cells, cell_live, seen, cell, 4)
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
    list_cell = np.concatenate(cells).astype(np.int32)
    lists = np.arange(n_queries + 1), np.cumsum([0, *map(len, cells)]), list_cell
    pair_query, pair_cell = probing.pair_lists(*lists)
    skipped = np.where(np.arange(n_queries) % 2, 5, -1)
    empty = np.full(n_queries * size, topk.EMPTY_KEY)
    straight, gathered = empty.copy(), empty.copy()

    def score(query, cell, keys):
        query, cell = probing.sort_pairs(query.copy(), cell.copy(), segment.n_cells)
        scoring.score_pairs(
            queries, skipped, query, cell, 0, query.size, 0, *segment.kernel_arrays, keep, keys, size
        )

    score(pair_query, pair_cell, straight)
    sections = gathering.share_lists(*lists)
    rest = gathering.list_large_cells(sections, list_cell, segment.cell_start)
    assert 0 < rest[0].size < pair_query.size
    score(*rest, gathered)
    # Lanes without an item hold what was there before: here the least of all distances.
    work = scoring.make_workspace(dim, masked)
    work.distances[:] = 0
    gathering.score_small_cells(
        queries, skipped, sections, list_cell, *segment.kernel_arrays, keep, gathered, size, work
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
    # A section of fewer queries than two doesn't count, however many cells it has.
    sections = np.array([[0, 0, 0, 6], [0, len(cells), 0, 6], [0, len(cells), 6, 7]])
    assert gathering.count_lanes(sections, cells, cell_start, 2) == lanes


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
    n_lists = [0, 1, 2, 40, 40, 40][seed]
    lists = [
        [list(range(rng.integers(0, 12))), [7, 8, 9, *rng.integers(10, 13, 2)], []][i]
        for i in rng.integers(0, 3, n_lists)
    ]
    place = np.cumsum([0, *rng.integers(1, 4, n_lists)])
    start = np.cumsum([0, *map(len, lists)])
    cell = np.array([c for cells in lists for c in cells], dtype=np.int32)
    sections = gathering.share_lists(place, start, cell)
    found = [(q, c) for first, end, q0, q1 in sections for q in range(q0, q1) for c in cell[first:end]]
    expected = [(q, c) for i, cells in enumerate(lists) for q in range(place[i], place[i + 1]) for c in cells]
    assert sorted(found) == sorted(expected)
    assert list(zip(*probing.pair_lists(place, start, cell), strict=True)) == expected


@pytest.mark.parametrize("n_leaves", [1, 3, 5000, 2**31, 2**40, 2**62])
@pytest.mark.parametrize("sparsity", [1, 3])
def test_order_by_code_is_the_stable_order_of_rows(n_leaves, sparsity):
    rng = np.random.default_rng(sparsity)
    few = rng.integers(0, n_leaves, 9)
    for codes in (rng.integers(0, n_leaves, (700, sparsity)), few[rng.integers(0, 9, (700, sparsity))]):
        np.testing.assert_array_equal(probing.order_by_code(codes), np.lexsort(codes.T[::-1]))
    assert probing.order_by_code(codes[:0]).size == 0


@njit
def _instructions(words, keys, first, word, key):
    found = instructions.bits_at_most(words, first, word), instructions.bits_below(keys, first, key)
    instructions.prefetch(words, first)
    lowest = instructions.lowest_bit(found[0]) if found[0] != 0 else -1
    return *found, instructions.count_bits(found[0]), lowest


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_comparisons_give_a_bit_a_lane(first, share):
    rng = np.random.default_rng(first)
    words = rng.integers(-9, 9, 80).astype(np.int32)
    keys = rng.integers(-(2**62), 2**62, 80)
    word, key = np.int32(-10 + 20 * share), np.int64(np.quantile(keys, share))
    at_most, below, count, lowest = _instructions(words, keys, first, word, key)
    lanes = np.flatnonzero(words[first : first + 64] <= word)
    assert at_most == sum(1 << int(lane) for lane in lanes)
    assert below == sum(1 << int(lane) for lane in np.flatnonzero(keys[first : first + 32] < key))
    assert count == len(lanes)
    assert lowest == (lanes[0] if len(lanes) else -1)


@pytest.mark.parametrize("n_keys", [0, 1, 5, 31, 32, 33, 80, 128])
@pytest.mark.parametrize("size", [1, 16, 48])
def test_rank_keys_sorts_the_least(n_keys, size):
    rng = np.random.default_rng(n_keys)
    ranked = np.concatenate([rng.permutation(n_keys), np.zeros(topk.RANKED_ROW - n_keys, np.int64)])
    keys = np.full(size + 2, topk.EMPTY_KEY)
    topk.rank_keys(ranked, n_keys, keys, 1, size)
    n_kept = min(n_keys, size)
    assert keys[1 : n_kept + 1].tolist() == list(range(n_kept))
    assert keys[0] == topk.EMPTY_KEY
    assert (keys[n_kept + 1 :] == topk.EMPTY_KEY).all()


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.uint8])
def test_packed_vectors_and_work_memory_begin_on_a_cache_line(dtype):
    for size in (1, 1000):
        zeros = aligned_zeros(size, dtype)
        assert (zeros.shape, zeros.dtype, zeros.ctypes.data % LINE) == ((size,), dtype, 0)
        assert not zeros.any()
        floats = aligned_floats(size)
        assert (floats.shape, floats.dtype, floats.ctypes.data % LINE) == ((size,), np.float32, 0)


@pytest.mark.parametrize("n_probes", [-1, 1, 3])
@pytest.mark.parametrize("n_neighbors", [1, 12, 40])
def test_leaves_in_reserve_are_opened_while_candidates_are_too_few(n_probes, n_neighbors):
    rng = np.random.default_rng(n_neighbors)
    leaves = rng.choice(49, 9, replace=False)
    item_codes = leaves[rng.integers(0, 7, 60)][:, None]
    table = LeafTable.build(np.zeros((60, 4)), item_codes, branching_factor=7, n_levels=2)
    scores = rng.random((80, 2, 7), dtype=np.float32)
    codes = np.array([rng.permutation(leaves)[:5] for _ in range(80)])
    n_wanted = rng.integers(1, 6, 80)
    in_reserve = np.where(np.arange(5) < n_wanted[:, None], codes, ~codes)
    own_cell = np.full(80, -1)
    order = probing.order_by_code(in_reserve)
    *lists, totals = probing.plan_search(
        order, in_reserve, scores, own_cell, n_neighbors, n_probes, False, True, *table._leaf_arrays
    )
    place, cell = probing.pair_lists(*lists)
    n_opened = 0
    for i, query in enumerate(order):
        expected, n_own = [], n_wanted[query] if n_probes < 0 else n_probes
        found = 0
        for j, leaf in enumerate(codes[query]):
            if j >= n_own and found >= n_neighbors:
                break
            expected += sorted(set(np.flatnonzero(np.isin(table._leaf_arrays[0], leaf)).tolist()))
            found += len(table.items_in_leaf(leaf))
            n_opened += 1
        planned = cell[place == i].tolist()
        assert planned[: len(expected)] == expected
        if found >= n_neighbors:
            assert len(planned) == len(expected)
    if n_neighbors == 1:
        assert totals[0] == n_opened


@pytest.mark.parametrize("n_probes", [-1, 1, 2, 3, 5])
@pytest.mark.parametrize("n_neighbors", [1, 12])
def test_planned_together_as_planned_alone(n_probes, n_neighbors):
    # Codes of few different leaves: neighbours in the order share a list, or the beginning of one.
    rng = np.random.default_rng(n_neighbors)
    leaves = rng.choice(49, 9, replace=False)
    pool = np.array([rng.permutation(leaves)[:3] for _ in range(9)])
    item_codes, codes = pool[rng.integers(0, 6, 60)], pool[rng.integers(0, 9, 80)]
    table = LeafTable.build(np.zeros((60, 4)), item_codes, branching_factor=7, n_levels=2)
    scores = rng.random((80, 2, 7), dtype=np.float32)
    own_cell = rng.integers(-1, table._directory.cell_live.size, 80)

    def plan(order):
        *lists, totals = probing.plan_search(
            order, codes, scores, own_cell, n_neighbors, n_probes, False, True, *table._leaf_arrays
        )
        place, cell = probing.pair_lists(*lists)
        return [cell[place == i].tolist() for i in range(len(order))], totals.tolist(), len(lists[0]) - 1

    order = probing.order_by_code(codes)
    together, totals, n_lists = plan(order)
    alone = [plan(order[i : i + 1]) for i in range(80)]
    assert together == [cells for (cells,), _, _ in alone]
    assert totals == np.sum([t for _, t, _ in alone], axis=0).tolist()
    if n_probes <= 3 and n_neighbors == 1:
        assert n_lists < 40
