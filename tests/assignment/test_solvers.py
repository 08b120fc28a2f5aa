import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqsearch.assignment import certificate, integer_costs, level_network, solve_level
from hqsearch.assignment.network import raise_for_status
from hqsearch.assignment.solvers import codes_by

from .references import brute_force_energy, exact_energy

PENALTIES = [0.0, 1e-6, 0.07, 0.1, 1.0, 3.5, 100.0, 1e6]
MAGNITUDES = [1e-8, 1.0, 1e8]


@st.composite
def instances(draw, max_classes, max_buckets):
    """Scores, parents and penalties, ties and extremes included."""
    n_classes = draw(st.integers(1, max_classes))
    n_buckets = draw(st.integers(1, max_buckets))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(
        st.sampled_from(
            ["uniform", "normal", "few values", "all equal", "zero", "one class repeated", "integers"]
        )
    )
    shape = (n_classes, n_buckets)
    scores = {
        "uniform": lambda: rng.random(shape),
        "normal": lambda: rng.normal(size=shape),
        "few values": lambda: rng.choice([0.0, 0.5, 1.0], size=shape),
        "zero": lambda: np.zeros(shape),
        "all equal": lambda: np.full(shape, 0.25),
        "one class repeated": lambda: np.tile(rng.normal(size=n_buckets), (n_classes, 1)),
        "integers": lambda: rng.integers(-3, 4, shape).astype(float),
    }[kind]()
    parents = draw(
        st.none() | st.lists(st.integers(-2, 3), min_size=n_classes, max_size=n_classes).map(np.array)
    )
    return {
        "scores": scores * draw(st.sampled_from(MAGNITUDES)),
        "parents": parents,
        "sparsity": draw(st.integers(1, n_buckets)),
        "sibling_penalty": draw(st.sampled_from(PENALTIES)),
        "orthogonality_penalty": draw(st.sampled_from(PENALTIES)),
    }


def energy_of(instance, codes):
    return exact_energy(
        instance["scores"],
        codes,
        instance["parents"],
        instance["sibling_penalty"],
        instance["orthogonality_penalty"],
    )


def rounding_of(instance):
    """Two codes of equal integer cost differ by no more: 1e-9 of the largest score per chosen bucket."""
    n_choices = instance["scores"].shape[0] * instance["sparsity"]
    return Fraction(1, 10**9) * Fraction(float(np.abs(instance["scores"]).max())) * n_choices


@given(instances(max_classes=4, max_buckets=4))
@settings(max_examples=150, deadline=None)
def test_no_choice_of_buckets_has_less_energy(instance):
    codes = solve_level(**instance)
    best = brute_force_energy(
        instance["scores"],
        instance["sparsity"],
        instance["parents"],
        instance["sibling_penalty"],
        instance["orthogonality_penalty"],
    )
    assert (codes.sum(axis=1) == instance["sparsity"]).all()
    assert abs(energy_of(instance, codes) - best) <= rounding_of(instance)


@given(instances(max_classes=7, max_buckets=6))
@settings(max_examples=400, deadline=None)
def test_energy_equals_that_of_the_network_simplex(instance):
    network = level_network(**instance)
    assert network.energy(solve_level(**instance)) == network.energy(codes_by("networkx", network))


@given(instances(max_classes=9, max_buckets=8))
@settings(max_examples=300, deadline=None)
def test_energy_equals_that_of_the_linear_program(instance):
    network = level_network(**instance)
    energy = network.energy(solve_level(**instance))
    # HiGHS stops at reduced costs of -1e-7 of the largest cost, and an arc carries one unit
    costs = network.arcs()[3]
    slack = len(costs) * max(int(np.abs(costs).max()), 1) // 10**7
    assert energy <= network.energy(codes_by("scipy", network)) <= energy + slack


@given(instances(max_classes=24, max_buckets=20))
@settings(max_examples=300, deadline=None)
def test_every_solution_carries_a_certificate(instance):
    codes = solve_level(**instance)
    del instance["sparsity"]
    assert certificate(codes=codes, **instance).optimal


@pytest.mark.parametrize("solver", ["scipy", "networkx", "ortools"])
@pytest.mark.parametrize("sparsity", [1, 3])
@pytest.mark.parametrize("n_parents", [None, 5])
def test_all_solvers_agree_on_the_energy(solver, sparsity, n_parents):
    if solver == "ortools":
        pytest.importorskip("ortools")
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(14, 9))
    parents = None if n_parents is None else rng.integers(0, n_parents, 14)
    _, energy = solve_level(scores, parents, sparsity=sparsity, return_energy=True)
    _, other = solve_level(scores, parents, sparsity=sparsity, solver=solver, return_energy=True)
    assert energy == pytest.approx(other, abs=1e-9)


def test_assignment_import_brings_no_heavy_package():
    script = (
        "import sys, hqsearch.assignment;"
        "print([name for name in ('numba', 'networkx', 'ortools', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (
            np.zeros(3),
            {},
            "Expected scores of shape .n_classes, branching_factor., got an array of shape .3,.",
        ),
        (np.zeros((2, 3), bool), {}, "real floating or integer dtype, got dtype bool"),
        (np.zeros((2, 3), complex), {}, "got dtype complex128"),
        ([[np.inf, 0.0]], {}, "Input scores contains NaN or infinity"),
        ([[1e301, 0.0]], {}, "fit into int64"),
        (np.zeros((2, 3)), {"sparsity": 0}, "1 <= sparsity <= branching_factor, but sparsity = 0"),
        (np.zeros((2, 3)), {"sparsity": 4}, "but sparsity = 4, branching_factor = 3"),
        (np.zeros((2, 3)), {"sparsity": 1.0}, "sparsity to be an integer"),
        (np.zeros((2, 3)), {"sparsity": True}, "sparsity to be an integer"),
        (np.zeros((2, 3)), {"sibling_penalty": -0.1}, "sibling_penalty to be a finite number >= 0, got -0.1"),
        (np.zeros((2, 3)), {"sibling_penalty": np.nan}, "sibling_penalty to be a finite number >= 0"),
        (np.zeros((2, 3)), {"orthogonality_penalty": np.inf}, "orthogonality_penalty to be a finite number"),
        (np.zeros((2, 3)), {"orthogonality_penalty": "1"}, "orthogonality_penalty to be a finite number"),
        (np.zeros((2, 3)), {"parents": [0]}, "Expected parents of shape .n_classes,. = .2,."),
        (np.zeros((2, 3)), {"parents": [0.0, 1.0]}, "parents of an integer dtype, got dtype float64"),
        (np.zeros((2, 3)), {"solver": "gurobi"}, "Expected solver to be one of"),
    ],
)
@pytest.mark.parametrize("solver", ["auto", "networkx"])
def test_wrong_input_is_refused_with_what_was_expected(scores, options, message, solver):
    with pytest.raises(ValueError, match=message):
        solve_level(scores, **({"solver": solver} | options))


def test_penalties_that_do_not_fit_beside_the_scores_are_refused():
    # an irrational ratio of two penalties far above the scores has no equivalent small integers
    with pytest.raises(ValueError, match="fit into int64"):
        solve_level(np.eye(4) * 1e-12, [0, 0, 1, 1], sibling_penalty=np.pi * 1e12, orthogonality_penalty=1e12)


@pytest.mark.parametrize("solver", ["auto", "scipy", "networkx"])
def test_no_classes_give_no_codes(solver):
    codes, energy = solve_level(np.zeros((0, 3)), return_energy=True, solver=solver)
    assert codes.shape == (0, 3)
    assert energy == 0


@pytest.mark.parametrize("parents", [None, [0, 0, 0, 0]])
def test_ties_go_to_the_lower_bucket_and_stay_there(parents):
    codes = solve_level(np.zeros((4, 4)), parents, orthogonality_penalty=0, sibling_penalty=0, sparsity=2)
    np.testing.assert_array_equal(codes, np.tile([True, True, False, False], (4, 1)))
    crowded = [solve_level(np.zeros((9, 4)), [0] * 9, sparsity=2) for _ in range(3)]
    np.testing.assert_array_equal(crowded[0], crowded[1])
    np.testing.assert_array_equal(crowded[0], crowded[2])


def test_one_bucket_takes_every_class():
    codes, energy = solve_level(np.ones((5, 1)), [0, 0, 0, 1, 1], return_energy=True)
    assert codes.all()
    assert energy == pytest.approx(-5 + 100 * 4 + 0.1 * 10)


def test_parents_are_labels_of_any_integers():
    scores = np.random.default_rng(0).normal(size=(6, 4))
    few = solve_level(scores, [0, 1, 0, 2, 1, 0])
    np.testing.assert_array_equal(few, solve_level(scores, np.array([-9, 2**60, -9, 2**62, 2**60, -9])))


@pytest.mark.slow
@given(instances(max_classes=60, max_buckets=48))
@settings(max_examples=3000, deadline=None)
def test_thousands_of_solutions_carry_certificates(instance):
    codes = solve_level(**instance)
    del instance["sparsity"]
    assert certificate(codes=codes, **instance).optimal


@pytest.mark.slow
@given(instances(max_classes=9, max_buckets=8))
@settings(max_examples=2500, deadline=None)
def test_energy_equals_that_of_the_network_simplex_on_thousands(instance):
    network = level_network(**instance)
    assert network.energy(solve_level(**instance)) == network.energy(codes_by("networkx", network))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_classes", "n_buckets"), [(512, 512), (1000, 128), (2000, 16), (16, 2000), (700, 64)]
)
@pytest.mark.parametrize("n_parents", [1, 3, 200])
@pytest.mark.parametrize("sparsity", [1, 5])
def test_large_solutions_carry_certificates(n_classes, n_buckets, n_parents, sparsity):
    rng = np.random.default_rng(n_classes)
    scores = rng.normal(size=(n_classes, n_buckets))
    parents = rng.integers(0, n_parents, n_classes)
    codes = solve_level(scores, parents, sparsity=sparsity)
    assert certificate(scores, codes, parents).optimal


@pytest.mark.parametrize("size", [2, 7, 8, 9, 30])
@pytest.mark.parametrize("sibling_penalty", [0.02, 0.5, 100.0])
def test_groups_of_every_size_are_placed_optimally(size, sibling_penalty):
    rng = np.random.default_rng(size)
    scores = rng.random((2 * size + 3, 12))
    parents = np.repeat([0, 1, 2, 3, 4], [size, size, 1, 1, 1])
    options = {"sibling_penalty": sibling_penalty, "orthogonality_penalty": 0.03}
    for sparsity in (1, 4, 11):
        codes = solve_level(scores, parents, sparsity=sparsity, **options)
        assert certificate(scores, codes, parents, **options).optimal


def test_a_solver_that_stops_early_raises():
    raise_for_status(integer_costs.STATUS_OPTIMAL)
    with pytest.raises(RuntimeError, match="without an optimal solution"):
        raise_for_status(integer_costs.STATUS_STUCK)
    with pytest.raises(ValueError, match="int64"):
        raise_for_status(integer_costs.STATUS_OVERFLOW)


def test_two_siblings_never_leave_a_bucket_in_one_search():
    # found by fuzzing: the second of them saves one sibling penalty less, so its path is no shortest one
    rng = np.random.default_rng(70)
    n_classes, n_buckets = rng.integers(1, 25), rng.integers(1, 21)
    sparsity, n_parents = int(rng.integers(1, n_buckets + 1)), rng.integers(1, 6)
    rng.random()
    parents = rng.integers(0, n_parents, n_classes)
    rng.choice(6), rng.choice(6), rng.choice(3), rng.random()
    scores = rng.normal(size=(n_classes, n_buckets))
    options = {"sibling_penalty": 0.1, "orthogonality_penalty": 0.1}
    codes = solve_level(scores, parents, sparsity=sparsity, **options)
    assert certificate(scores, codes, parents, **options).optimal
