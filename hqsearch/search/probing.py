"""Which leaves a query opens, in what order, and which cells that makes: the plan of a search.

The leaves that hold items form a tree of code prefixes. A query walks it with a heap: an inner node's key
is the best that any leaf below it could reach, so leaves come out best first after visiting few nodes, and
empty ones never.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from hqsearch.search.instructions import LEAF_KERNEL

BAD_SCORES = 1

# Bits of a leaf id that one pass of a sort looks at, at most.
_MOST_BITS = 13


class PrefixTree(NamedTuple):
    """Prefixes of the occupied leaves, level by level: node 0 is the root, the leaves are the last nodes.

    Attributes
    ----------
    child_start : ndarray of shape (n_inner_nodes + 1,), dtype int64
        The children of inner node ``i`` are the nodes ``child_start[i]`` to ``child_start[i + 1] - 1``.
    digit : ndarray of shape (n_nodes,), dtype int64
        Bucket of each node at its own level.
    level_start : ndarray of shape (n_levels + 1,), dtype int64
        First node of each level; the root is level 0.
    """

    child_start: np.ndarray
    digit: np.ndarray
    level_start: np.ndarray

    @classmethod
    def build(cls, leaf_ids: np.ndarray, branching_factor: int, n_levels: int) -> PrefixTree:
        """Find the prefixes of ascending leaf ids."""
        level_start, child_start, digits = [0], [], []
        prefixes = np.zeros(1, dtype=np.int64)
        digits.append(prefixes)
        first = 1
        for level in range(1, n_levels + 1):
            unit = branching_factor ** (n_levels - level)
            longer = np.unique(leaf_ids // unit)
            # Both lists ascend, so each node's children are consecutive.
            child_start.append(first + np.searchsorted(longer // branching_factor, prefixes))
            digits.append(longer % branching_factor)
            level_start.append(first)
            first += longer.size
            prefixes = longer
        child_start.append(np.array([first]))
        return cls(
            np.concatenate(child_start).astype(np.int64),
            np.concatenate(digits).astype(np.int64),
            np.array(level_start, dtype=np.int64),
        )


@njit(**LEAF_KERNEL)
def ascending_bits(value):
    """Map a float64 to an int64 that sorts in the same order; both zeros map to 0."""
    bits = np.float64(value + 0.0).view(np.int64)
    return bits if bits >= 0 else bits ^ np.int64(0x7FFFFFFFFFFFFFFF)


@njit(**LEAF_KERNEL)
def push_node(heap_keys, heap_nodes, heap_sums, size, key, node, total):
    """Add a node to a heap whose least (key, node) comes first; the caller counts its size."""
    i = size
    while i > 0:
        parent = (i - 1) // 2
        if heap_keys[parent] < key or (heap_keys[parent] == key and heap_nodes[parent] < node):
            break
        heap_keys[i], heap_nodes[i], heap_sums[i] = heap_keys[parent], heap_nodes[parent], heap_sums[parent]
        i = parent
    heap_keys[i], heap_nodes[i], heap_sums[i] = key, node, total


@njit(**LEAF_KERNEL)
def drop_first(heap_keys, heap_nodes, heap_sums, size):
    """Remove the first of `size` nodes of a heap."""
    size -= 1
    key, node, total = heap_keys[size], heap_nodes[size], heap_sums[size]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (
            heap_keys[other] < heap_keys[child]
            or (heap_keys[other] == heap_keys[child] and heap_nodes[other] < heap_nodes[child])
        ):
            child = other
        if heap_keys[child] > key or (heap_keys[child] == key and heap_nodes[child] > node):
            break
        heap_keys[i], heap_nodes[i], heap_sums[i] = heap_keys[child], heap_nodes[child], heap_sums[child]
        i = child
    heap_keys[i], heap_nodes[i], heap_sums[i] = key, node, total


@njit(cache=True, nogil=True)
def rank_buckets(level_scores, ranks):
    """Rank the buckets of each level by descending score, ties to the lower bucket: 0 is the best."""
    for level in range(level_scores.shape[0]):
        by_score = np.argsort(-level_scores[level], kind="mergesort")
        for place in range(by_score.size):
            ranks[level, by_score[place]] = place


@njit(**LEAF_KERNEL)
def expand_node(
    node, level, total, key, level_scores, best_scores, ranks, lexicographic, child_start, digit,
    heap_keys, heap_nodes, heap_sums, size,
):  # fmt: skip
    """Push the children of an inner node of the given level; return the heap's new size."""
    n_levels, branching_factor = level_scores.shape
    unit = np.int64(1)
    for _ in range(n_levels - level - 1):
        unit *= branching_factor
    for child in range(child_start[node], child_start[node + 1]):
        bucket = digit[child]
        if lexicographic:
            child_key = key + ranks[level, bucket] * unit
            child_total = 0.0
        else:
            child_total = total + np.float64(level_scores[level, bucket])
            # Summed in the leaf's own order, so that rounding never puts the bound under a leaf's score.
            bound = child_total
            for below in range(level + 1, n_levels):
                bound += best_scores[below]
            child_key = ascending_bits(-bound)
        push_node(heap_keys, heap_nodes, heap_sums, size, child_key, child, child_total)
        size += 1
    return size


@njit(**LEAF_KERNEL)
def find_leaf(leaf_ids, leaf_id):
    """Index of `leaf_id` among the ascending `leaf_ids`, -1 when it is not there."""
    low, high = 0, leaf_ids.size
    while low < high:
        middle = (low + high) // 2
        if leaf_ids[middle] < leaf_id:
            low = middle + 1
        else:
            high = middle
    if low < leaf_ids.size and leaf_ids[low] == leaf_id:
        return low
    return -1


@njit(**LEAF_KERNEL)
def own_leaf(codes, query, place):
    """Leaf in a query's row of codes, where negative numbers stand for leaves in reserve."""
    code = codes[query, place]
    return code if code >= 0 else ~code


@njit(**LEAF_KERNEL)
def count_wanted(codes, query):
    """Leaves in a query's row of codes before those in reserve."""
    n_wanted = 0
    while n_wanted < codes.shape[1] and codes[query, n_wanted] >= 0:
        n_wanted += 1
    return n_wanted


@njit(**LEAF_KERNEL)
def equal_rows(rows, first, second):
    """Whether two rows of a matrix are equal."""
    for i in range(rows.shape[1]):
        if rows[first, i] != rows[second, i]:
            return False
    return True


@njit(cache=True, nogil=True)
def lengthen(array, n_free, n_used):
    """Return `array`, or a copy of twice the length until `n_free` entries follow its first `n_used` ones."""
    size = array.size
    while size < n_used + n_free:
        size *= 2
    if size == array.size:
        return array
    longer = np.empty(size, dtype=array.dtype)
    longer[:n_used] = array[:n_used]
    return longer


@njit(**LEAF_KERNEL)
def list_leaf(first, n_entries, own_cell, shared, leaf_cells, cell_live, seen, list_cell, n_listed):
    """Write a leaf's cells that hold items, and that the query has not listed yet, behind the first ones.

    `seen` has a bit for each cell that the query has listed.

    Returns the number of cells written, the items in the leaf, the items in the cells written, and whether
    `own_cell` is one of them.
    """
    n_new = live = n_fresh = left_out = np.int64(0)
    for entry in range(first, first + n_entries):
        cell = leaf_cells[entry]
        n_items = np.int64(cell_live[cell])
        live += n_items
        # Writing first and counting afterwards needs no branch.
        list_cell[n_listed + n_new] = cell
        fresh = n_items > 0
        if shared:
            word, bit = cell >> 6, np.uint64(1) << np.uint64(cell & 63)
            fresh = fresh & ((seen[word] & bit) == 0)
            seen[word] |= bit * np.uint64(fresh)
        n_new += fresh
        n_fresh += n_items * fresh
        left_out += fresh & (own_cell == cell)
    return n_new, live, n_fresh, left_out


@njit(cache=True, nogil=True)
def plan_search(
    order, codes, level_scores, own_cell, n_neighbors, n_probes, lexicographic, shared,
    leaf_ids, leaf_start, leaf_cells, cell_live, child_start, digit, level_start,
):  # fmt: skip
    """Choose each query's leaves and list the cells they hold, each once.

    Queries of equal codes that follow one another share a list, unless one of them opens more leaves than the
    others need.

    Parameters
    ----------
    order : ndarray of shape (n_planned,), dtype int64
        The queries to plan, as rows of the arrays below.
    codes : ndarray of shape (n_queries, sparsity), dtype int64
        Their own leaves, best first; behind these ``~leaf`` for each one in reserve, which is opened before
        others while candidates are too few.
    level_scores : ndarray of shape (n_queries, n_levels, branching_factor), dtype float32
        Read only for queries that open further leaves.
    own_cell : ndarray of shape (n_queries,), dtype int64
        Cell of the item that a query leaves out, -1 for none.
    n_neighbors : int
        Candidates wanted; leaves are opened until there are as many.
    n_probes : int
        Leaves to open at least; -1 stands for the query's own leaves but those in reserve.
    lexicographic : bool
        Whether further leaves come parent by parent instead of by the sum of level scores.
    shared : bool
        Whether a cell can lie in several leaves.
    leaf_ids, leaf_start, leaf_cells : ndarray
        Occupied leaves, ascending, and the cells of each as a CSR structure.
    cell_live : ndarray of shape (n_cells,), dtype int32
        Items of each cell that may be returned. Leaves without any are passed by as if they did not exist.
    child_start, digit, level_start : ndarray
        The leaves' `PrefixTree`.

    Returns
    -------
    list_place : ndarray of shape (n_lists + 1,), dtype int64
        List ``i`` is that of the places ``list_place[i]`` to ``list_place[i + 1] - 1`` in `order`.
    list_start : ndarray of shape (n_lists + 1,), dtype int64
        Its cells are ``list_cell[list_start[i]:list_start[i + 1]]``.
    list_cell : ndarray, dtype int32
        The cells to score.
    totals : ndarray of shape (4,), dtype int64
        Leaves opened, empty leaves, candidates, and `BAD_SCORES` when a needed level score was not finite.
    """
    n_planned, sparsity = order.size, codes.shape[1]
    n_levels, branching_factor = level_scores.shape[1], level_scores.shape[2]
    n_leaves = leaf_ids.size
    last_level = level_start[n_levels] if n_leaves > 0 else np.int64(0)
    list_cell = np.empty(max(16, 2 * n_planned * sparsity), dtype=np.int32)
    list_place = np.empty(n_planned + 1, dtype=np.int64)
    list_start = np.empty(n_planned + 1, dtype=np.int64)
    n_lists = 0
    n_cells = 0
    totals = np.zeros(4, dtype=np.int64)
    # Bits, so that a single query does not wait for a large array to be filled.
    seen = np.zeros((cell_live.size + 63) // 64 if shared else 0, dtype=np.uint64)
    # Of the last list: its own leaves; and how many entries, items and empty leaves the first of them made.
    own_codes, own_leaves = np.full(sparsity, -1), np.empty(sparsity, dtype=np.int64)
    own_entries, own_found = np.zeros(sparsity + 1, dtype=np.int64), np.zeros(sparsity + 1, dtype=np.int64)
    own_empty = np.zeros(sparsity + 1, dtype=np.int64)
    n_own = 0
    # The walk's arrays are made by the first query that needs them.
    heap_keys = np.empty(0, dtype=np.int64)
    heap_nodes = np.empty(0, dtype=np.int64)
    heap_sums = np.empty(0, dtype=np.float64)
    ranks = np.empty((0, 0), dtype=np.int64)
    best_scores = np.empty(0, dtype=np.float64)
    repeatable = False
    list_begin, last_found, last_opened, last_empty = 0, np.int64(0), 0, np.int64(0)
    for place in range(n_planned):
        query = order[place]
        if repeatable and equal_rows(codes, query, order[place - 1]):
            # Queries of one class often have one code: the same cells, but for what they leave out.
            n_found = last_found
            if own_cell[query] >= 0:
                for i in range(list_begin, n_cells):
                    n_found -= list_cell[i] == own_cell[query]
            if n_found >= n_neighbors:
                totals[0] += last_opened
                totals[1] += last_empty
                totals[2] += n_found
                continue
        wanted = count_wanted(codes, query) if n_probes < 0 else n_probes
        # Queries that follow one another differ in their later leaves first: copy what they share.
        n_opened = 0
        while n_opened < min(n_own, wanted) and own_leaf(codes, query, n_opened) == own_codes[n_opened]:
            n_opened += 1
        n_kept = own_entries[n_opened]
        if shared:
            for i in range(list_begin + n_kept, n_cells):
                seen[list_cell[i] >> 6] &= ~(np.uint64(1) << np.uint64(list_cell[i] & 63))
        if n_cells + n_kept > list_cell.size:
            list_cell = lengthen(list_cell, n_kept, n_cells)
        n_found = last_found = own_found[n_opened]
        for i in range(n_kept):
            list_cell[n_cells + i] = list_cell[list_begin + i]
            n_found -= list_cell[n_cells + i] == own_cell[query]
        list_begin = n_cells
        list_place[n_lists], list_start[n_lists] = place, list_begin
        n_lists += 1
        n_cells += n_kept
        n_own, n_empty = n_opened, own_empty[n_opened]
        size = 0
        walking = False
        while True:
            if n_opened >= wanted and n_found >= n_neighbors:
                break
            is_own = n_opened < sparsity
            if is_own:
                own_codes[n_opened] = own_leaf(codes, query, n_opened)
                leaf = own_leaves[n_opened] = find_leaf(leaf_ids, own_codes[n_opened])
                n_opened += 1
            else:
                if not walking:
                    walking = True
                    if heap_keys.size == 0:
                        heap_keys = np.empty(digit.size, dtype=np.int64)
                        heap_nodes = np.empty(digit.size, dtype=np.int64)
                        heap_sums = np.empty(digit.size, dtype=np.float64)
                        ranks = np.zeros((n_levels, branching_factor), dtype=np.int64)
                        best_scores = np.empty(n_levels, dtype=np.float64)
                    for level in range(n_levels):
                        best_scores[level] = -np.inf
                        for bucket in range(branching_factor):
                            score = np.float64(level_scores[query, level, bucket])
                            if not np.isfinite(score):
                                totals[3] = BAD_SCORES
                            best_scores[level] = max(best_scores[level], score)
                    if totals[3] != 0:
                        list_place[:2], list_start[:2] = 0, 0
                        return list_place[:1], list_start[:1], list_cell[:0], totals
                    if lexicographic:
                        rank_buckets(level_scores[query], ranks)
                    if n_leaves > 0:
                        size = expand_node(
                            0, 0, 0.0, np.int64(0), level_scores[query], best_scores, ranks, lexicographic,
                            child_start, digit, heap_keys, heap_nodes, heap_sums, 0,
                        )  # fmt: skip
                if size == 0:
                    break
                node, key, total = heap_nodes[0], heap_keys[0], heap_sums[0]
                drop_first(heap_keys, heap_nodes, heap_sums, size)
                size -= 1
                if node < last_level:
                    level = 1
                    while node >= level_start[level + 1]:
                        level += 1
                    size = expand_node(
                        node, level, total, key, level_scores[query], best_scores, ranks, lexicographic,
                        child_start, digit, heap_keys, heap_nodes, heap_sums, size,
                    )  # fmt: skip
                    continue
                leaf = node - last_level
                known = False
                for i in range(sparsity):
                    known = known or own_leaves[i] == leaf
                if known:
                    continue
                live = 0
                for entry in range(leaf_start[leaf], leaf_start[leaf + 1]):
                    live += cell_live[leaf_cells[entry]]
                if live == 0:
                    continue
                n_opened += 1
            live = 0
            if leaf >= 0:
                n_entries = leaf_start[leaf + 1] - leaf_start[leaf]
                if n_cells + n_entries > list_cell.size:
                    list_cell = lengthen(list_cell, n_entries, n_cells)
                n_new, live, n_fresh, left_out = list_leaf(
                    leaf_start[leaf], n_entries, own_cell[query], shared, leaf_cells, cell_live, seen,
                    list_cell, n_cells,
                )  # fmt: skip
                n_cells += n_new
                last_found += n_fresh
                n_found += n_fresh - left_out
            if is_own:
                n_own = n_opened
                n_empty += live == 0
                own_entries[n_own], own_found[n_own] = n_cells - list_begin, last_found
                own_empty[n_own] = n_empty
        totals[0] += n_opened
        totals[1] += n_empty
        totals[2] += n_found
        # Who opened more leaves than it had to, for want of what it leaves out, is no example for the next.
        repeatable = not walking and n_opened <= wanted
        last_opened, last_empty = n_opened, n_empty
    list_place[n_lists], list_start[n_lists] = n_planned, n_cells
    return list_place[: n_lists + 1], list_start[: n_lists + 1], list_cell[:n_cells], totals


@njit(cache=True, nogil=True)
def pair_lists(list_place, list_start, list_cell):
    """Turn lists of cells into pairs of a query's place and a cell, ascending by place (int32 both)."""
    n_lists = list_place.size - 1
    n_pairs = 0
    for i in range(n_lists):
        n_pairs += (list_place[i + 1] - list_place[i]) * (list_start[i + 1] - list_start[i])
    pair_query, pair_cell = np.empty(n_pairs, dtype=np.int32), np.empty(n_pairs, dtype=np.int32)
    n_pairs = 0
    for i in range(n_lists):
        for place in range(list_place[i], list_place[i + 1]):
            for entry in range(list_start[i], list_start[i + 1]):
                pair_query[n_pairs], pair_cell[n_pairs] = place, list_cell[entry]
                n_pairs += 1
    return pair_query, pair_cell


@njit(cache=True, nogil=True)
def order_by_code(codes):
    """Order queries by their leaves, column by column, as `np.lexsort` of the reversed columns does (int64).

    Leaves in reserve, which are negative, come in some order: equal rows are side by side all the same.

    A sort by digits takes a third of `np.lexsort`'s time, during which the other threads would wait.
    """
    n_queries, sparsity = codes.shape
    order, other = np.arange(n_queries), np.empty(n_queries, dtype=np.int64)
    for column in range(sparsity - 1, -1, -1):
        highest = np.int64(0)
        for query in range(n_queries):
            highest = max(highest, codes[query, column])
        n_bits = 0
        while highest >> n_bits > 0:
            n_bits += 1
        n_passes = (n_bits + _MOST_BITS - 1) // _MOST_BITS
        width = (n_bits + n_passes - 1) // max(1, n_passes)
        mask = (np.int64(1) << width) - 1
        for shift in range(0, n_bits, max(1, width)):
            next_place = np.zeros(mask + 2, dtype=np.int64)
            for query in range(n_queries):
                next_place[(codes[query, column] >> shift & mask) + 1] += 1
            for digit in range(mask):
                next_place[digit + 1] += next_place[digit]
            for i in range(n_queries):
                digit = codes[order[i], column] >> shift & mask
                other[next_place[digit]] = order[i]
                next_place[digit] += 1
            order, other = other, order
    return order


@njit(cache=True, nogil=True)
def sort_pairs(pair_query, pair_cell, n_cells):
    """Sort pairs by cell; the pairs of a cell stay in the order of their queries."""
    n_pairs = pair_cell.size
    if n_pairs <= 1:
        return pair_query, pair_cell
    if n_pairs <= 64 or n_cells > 16 * n_pairs:
        joint = np.empty(n_pairs, dtype=np.int64)
        for i in range(n_pairs):
            joint[i] = np.int64(pair_cell[i]) << 32 | np.int64(pair_query[i])
        joint.sort()
        for i in range(n_pairs):
            pair_cell[i] = joint[i] >> 32
            pair_query[i] = joint[i] & np.int64(0x7FFFFFFF)
        return pair_query, pair_cell
    next_place = np.zeros(n_cells + 1, dtype=np.int64)
    for i in range(n_pairs):
        next_place[pair_cell[i] + 1] += 1
    for cell in range(n_cells):
        next_place[cell + 1] += next_place[cell]
    sorted_query = np.empty_like(pair_query)
    sorted_cell = np.empty_like(pair_cell)
    for i in range(n_pairs):
        place = next_place[pair_cell[i]]
        next_place[pair_cell[i]] += 1
        sorted_query[place] = pair_query[i]
        sorted_cell[place] = pair_cell[i]
    return sorted_query, sorted_cell
