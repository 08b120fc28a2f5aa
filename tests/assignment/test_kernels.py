"""Each kernel against a plain twin."""

import numpy as np
import pytest

from hqsearch.assignment import bucket_supply, exchange_flow, integer_costs, level_codes, sibling_groups

TAKEN = bucket_supply.TAKEN


@pytest.mark.parametrize("n_entries", [1, 2, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("n_values", [1, 3, 10**9])
def test_smallest_entries_are_those_of_a_stable_sort(n_entries, n_values):
    rng = np.random.default_rng(n_entries)
    row = rng.integers(-n_values, n_values, n_entries)
    n_smallest = min(n_entries, 7)
    positions = np.empty(n_smallest, np.int64)
    values = np.empty(n_smallest, np.int64)
    bucket_supply.smallest_entries(row.copy(), n_smallest, positions, values)
    expected = np.argsort(row, kind="stable")[:n_smallest]
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(values, row[expected])


@pytest.mark.parametrize("labels", [[], [5], [2, 2, 2], [3, -1, 3, 0, -1], list(range(6, 0, -1))])
def test_group_members_are_those_of_unique(labels):
    labels = np.array(labels, np.int64)
    group, start, members = level_codes.group_members(labels)
    np.testing.assert_array_equal(group, np.unique(labels, return_inverse=True)[1])
    np.testing.assert_array_equal(
        start, np.concatenate([[0], np.cumsum(np.bincount(group))]) if len(labels) else [0]
    )
    np.testing.assert_array_equal(members, np.argsort(labels, kind="stable"))


@pytest.mark.parametrize("magnitude", [5e-324, 1e-200, 1e-8, 1.0, 3.7, 1e8, 1e299])
def test_costs_resolve_a_billionth_of_the_largest_score(magnitude):
    scores = np.random.default_rng(0).uniform(-1, 1, (6, 5)) * magnitude
    costs = np.empty((6, 5), np.int64)
    *_, shift, status = integer_costs.integer_costs(scores, costs, 0.0, 0.0, 1)
    assert status == integer_costs.STATUS_OPTIMAL
    unit = np.ldexp(1.0, -shift) if shift < 1070 else 0.0
    assert unit <= 1e-9 * np.abs(scores).max()
    restored = -np.ldexp(costs.astype(float), -shift)
    np.testing.assert_allclose(restored, scores, rtol=0, atol=1e-9 * np.abs(scores).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_score_anywhere_is_seen(bad):
    for position in range(6):
        scores = np.zeros((2, 3))
        scores.flat[position] = bad
        status = integer_costs.integer_costs(scores, np.empty((2, 3), np.int64), 0.0, 0.0, 1)[-1]
        assert status == integer_costs.STATUS_NOT_FINITE


@pytest.mark.parametrize(
    ("first", "second", "a", "b"),
    [(1e6, 1e6, 1, 1), (100.0, 0.1, 1000, 1), (0.3, 0.7, 3, 7), (0.1, 100.0, 1, 1000), (np.pi, 1.0, 0, 0)],
)
def test_common_unit_finds_small_ratios_only(first, second, a, b):
    found = integer_costs.common_unit(first, second)
    assert found == (a, b) or (a == 0 and found[0] > 1000)


def random_state(rng, n_classes, n_buckets, sparsity):
    """Random costs, and each class on random buckets, with the bookkeeping of the exchange kernel."""
    costs = rng.integers(-9, 9, (n_classes, n_buckets))
    held = np.array([rng.permutation(n_buckets)[:sparsity] for _ in range(n_classes)], np.int32)
    open_costs = costs.copy()
    places = np.empty_like(held)
    holders = np.empty((n_buckets, n_classes), np.int32)
    counts = np.zeros(n_buckets, np.int64)
    for c in range(n_classes):
        for j, t in enumerate(held[c]):
            places[c, j] = counts[t]
            holders[t, counts[t]] = c
            counts[t] += 1
            open_costs[c, t] = TAKEN
    return costs, open_costs, held, places, holders, counts


def plain_exchange(costs, held, t, b):
    """Cheapest exchange of bucket t for bucket b, or None."""
    ways = [costs[c, b] - costs[c, t] for c in range(len(costs)) if t in held[c] and b not in held[c]]
    return min(ways, default=None)


@pytest.mark.parametrize(
    ("n_classes", "n_buckets", "sparsity"), [(1, 3, 1), (5, 4, 2), (30, 6, 3), (9, 9, 1)]
)
def test_exchanges_stay_right_while_classes_move(n_classes, n_buckets, sparsity):
    rng = np.random.default_rng(n_classes)
    costs, open_costs, held, places, holders, counts = random_state(rng, n_classes, n_buckets, sparsity)
    exchange = np.full((n_buckets, n_buckets), TAKEN)
    for t in range(n_buckets):
        exchange_flow.fill_exchange_row(t, costs, open_costs, holders, counts, exchange)
    for _ in range(60):
        c = rng.integers(n_classes)
        t = rng.choice(held[c])
        b = rng.choice(np.setdiff1d(np.arange(n_buckets), held[c]))
        exchange_flow.move_class(c, t, b, costs, open_costs, held, places, holders, counts, exchange)
        for t in np.flatnonzero(counts):
            for b in range(n_buckets):
                expected = plain_exchange(costs, held, t, b)
                if expected is None:
                    assert exchange[t, b] > bucket_supply.REACHABLE
                else:
                    assert exchange[t, b] == expected
        np.testing.assert_array_equal(counts, np.bincount(held.ravel(), minlength=n_buckets))


@pytest.mark.parametrize("seed", range(5))
def test_open_costs_count_the_siblings_that_hold_a_bucket(seed):
    rng = np.random.default_rng(seed)
    n_classes, n_buckets, sibling = 8, 5, 100
    group, start, members = level_codes.group_members(rng.integers(0, 3, n_classes))
    costs = rng.integers(-9, 9, (n_classes, n_buckets))
    open_costs = costs.copy()
    group_counts = np.zeros((len(start) - 1, n_buckets), np.int64)
    held = np.empty((n_classes, n_buckets), np.int32)
    places = np.empty_like(held)
    n_held = np.zeros(n_classes, np.int64)
    holders = np.empty((n_buckets, n_classes), np.int32)
    counts = np.zeros(n_buckets, np.int64)
    chosen = np.zeros((n_classes, n_buckets), bool)
    for _ in range(80):
        c, t = rng.integers(n_classes), rng.integers(n_buckets)
        act = sibling_groups.drop if chosen[c, t] else sibling_groups.take
        act(
            c, t, costs, open_costs, sibling, group, start, members, group_counts, held, n_held, places,
            holders, counts,
        )  # fmt: skip
        chosen[c, t] = not chosen[c, t]
        for r in range(n_classes):
            siblings = (group == group[r]) & (np.arange(n_classes) != r)
            expected = np.where(chosen[r], TAKEN, costs[r] + sibling * chosen[siblings].sum(axis=0))
            np.testing.assert_array_equal(open_costs[r], expected)
            np.testing.assert_array_equal(np.sort(held[r, : n_held[r]]), np.flatnonzero(chosen[r]))
        for b in range(n_buckets):
            np.testing.assert_array_equal(np.sort(holders[b, : counts[b]]), np.flatnonzero(chosen[:, b]))


@pytest.mark.parametrize("orthogonality", [1, 3, 1000])
@pytest.mark.parametrize("n_units", [1, 7, 40])
def test_supply_obeys_the_prices(orthogonality, n_units):
    rng = np.random.default_rng(n_units)
    prices = rng.integers(0, 3 * orthogonality + 1, 8)
    counts = rng.multinomial(n_units, np.full(8, 1 / 8))
    supply = np.empty(8, np.int64)
    excess = np.empty(8, np.int64)
    sink_price, sink_excess, n_left = bucket_supply.balance_supply(
        prices, counts, n_units, orthogonality, supply, excess
    )
    above = prices - sink_price
    assert (orthogonality * supply >= above).all()
    assert ((orthogonality * (supply - 1) <= above) | (supply == 0)).all()
    np.testing.assert_array_equal(excess, counts - supply)
    assert excess.sum() + sink_excess == 0
    assert n_left == np.maximum(excess, 0).sum() + max(sink_excess, 0)


@pytest.mark.parametrize("n_groups", [1, 4, 40])
@pytest.mark.parametrize("sparsity", [1, 3])
def test_searches_never_exceed_the_units_that_must_travel(n_groups, sparsity):
    rng = np.random.default_rng(sparsity)
    costs = rng.integers(-(2**30), 0, (40, 12))
    group, start, members = level_codes.group_members(rng.integers(0, n_groups, 40))
    _, status, work = level_codes.level_flow(costs, sparsity, 2**34, 2**28, group, start, members)
    assert status == integer_costs.STATUS_OPTIMAL
    assert work[2] <= work[1] <= work[0] <= 2 * 40 * sparsity
