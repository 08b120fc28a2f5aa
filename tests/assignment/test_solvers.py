from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqsearch.assignment import certificate, level_network, solve_level
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
        st.sampled_from(["uniform", "normal", "few values", "all equal", "one class repeated", "integers"])
    )
    shape = (n_classes, n_buckets)
    scores = {
        "uniform": lambda: rng.random(shape),
        "normal": lambda: rng.normal(size=shape),
        "few values": lambda: rng.choice([0.0, 0.5, 1.0], size=shape),
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
@settings(max_examples=150, deadline=None)
def test_energy_equals_that_of_the_network_simplex(instance):
    network = level_network(**instance)
    assert network.energy(solve_level(**instance)) == network.energy(codes_by("networkx", network))


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
