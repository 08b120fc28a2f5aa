import networkx
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse

from hqsearch.assignment import certificate, level_network, solve_level

OPTIONS = {"sibling_penalty": 2.0, "orthogonality_penalty": 0.25}


@pytest.fixture(
    params=[None, [0, 0, 0, 0, 0], [1, 2, 1, 2, 3]], ids=["no parents", "one parent", "three parents"]
)
def instance(request):
    scores = np.random.default_rng(0).integers(-8, 8, (5, 4)) / 8
    return scores, None if request.param is None else np.array(request.param)


def test_networkx_view_solves_to_the_same_energy(instance):
    network = level_network(*instance, sparsity=2, **OPTIONS)
    cost, _ = networkx.network_simplex(network.to_networkx())
    assert cost == network.energy(solve_level(*instance, sparsity=2, **OPTIONS))


def test_sparse_view_solves_to_the_same_energy(instance):
    network = level_network(*instance, sparsity=2, **OPTIONS)
    graph = network.to_sparse()
    arcs = graph.cost.tocoo()
    n_arcs = arcs.nnz
    incidence = scipy.sparse.coo_array(
        (np.repeat([1.0, -1.0], n_arcs), (np.concatenate(arcs.coords), np.tile(np.arange(n_arcs), 2))),
        shape=(len(graph.roles), n_arcs),
    )
    scale = float(np.abs(arcs.data).max())
    result = scipy.optimize.linprog(
        arcs.data / scale,
        A_eq=incidence,
        b_eq=graph.supply,
        bounds=list(zip(np.zeros(n_arcs), graph.capacity.tocoo().data, strict=True)),
    )
    energy = network.energy(solve_level(*instance, sparsity=2, **OPTIONS))
    assert result.fun == pytest.approx(energy / scale, abs=1e-7)


def test_both_views_have_the_same_nodes_roles_and_arcs(instance):
    network = level_network(*instance, sparsity=2, **OPTIONS)
    sparse, digraph = network.to_sparse(), network.to_networkx()
    assert [digraph.nodes[v]["role"] for v in range(len(sparse.roles))] == sparse.roles.tolist()
    assert digraph.number_of_edges() == sparse.cost.nnz == sparse.capacity.nnz
    assert {role for _, role in digraph.nodes(data="role")} >= {
        "source",
        "class",
        "bucket",
        "bucket_slot",
        "sink",
    }
    for tail, head in digraph.edges:
        layers = digraph.nodes[tail]["layer"], digraph.nodes[head]["layer"]
        assert layers[0] < layers[1]


def test_group_nodes_exist_for_siblings_only():
    graph = level_network(np.zeros((3, 4)), [7, 7, 9]).to_sparse()
    inner = graph.roles == "group_bucket"
    assert inner.sum() == 4
    assert set(graph.groups[inner]) == {0}
    np.testing.assert_array_equal(graph.buckets[inner], range(4))


def test_energy_is_that_of_the_definition(instance):
    scores, parents = instance
    codes, energy = solve_level(scores, parents, sparsity=2, return_energy=True, **OPTIONS)
    network = level_network(scores, parents, sparsity=2, **OPTIONS)
    assert network.energy(codes) == pytest.approx(energy * 2.0**network.shift)


def test_problem_falls_apart_by_parent_without_orthogonality_penalty():
    scores = np.zeros((5, 3))
    parents = [4, 8, 4, 8, 6]
    apart = level_network(scores, parents, orthogonality_penalty=0).components()
    assert len(set(apart)) == 3
    assert apart[0] == apart[2] != apart[1] == apart[3]
    assert len(set(level_network(scores, parents, orthogonality_penalty=0.1).components())) == 1


@pytest.mark.parametrize("sparsity", [1, 3])
def test_components_solved_in_parallel_give_the_codes_of_one_thread(sparsity):
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(60, 7))
    parents = rng.integers(0, 11, 60)
    options = {"sparsity": sparsity, "sibling_penalty": 0.4, "orthogonality_penalty": 0.0}
    expected = solve_level(scores, parents, **options)
    assert certificate(scores, expected, parents, sibling_penalty=0.4, orthogonality_penalty=0.0).optimal
    for n_jobs in (2, 3, -1):
        np.testing.assert_array_equal(solve_level(scores, parents, n_jobs=n_jobs, **options), expected)


def test_certificate_refuses_every_worse_choice(instance):
    scores, parents = instance
    rng = np.random.default_rng(1)
    network = level_network(scores, parents, sparsity=2, **OPTIONS)
    best = network.energy(solve_level(scores, parents, sparsity=2, **OPTIONS))
    seen = set()
    for _ in range(100):
        codes = np.zeros(scores.shape, bool)
        for row in codes:
            row[rng.permutation(4)[:2]] = True
        optimal = network.energy(codes) == best
        assert certificate(scores, codes, parents, **OPTIONS).optimal == optimal
        seen.add(optimal)
    assert False in seen


def test_prices_of_a_certificate_bound_every_residual_arc(instance):
    from hqsearch.assignment.certificate import residual_arcs

    scores, parents = instance
    codes = solve_level(scores, parents, sparsity=2, **OPTIONS)
    prices = certificate(scores, codes, parents, **OPTIONS).prices
    tails, heads, costs, _ = residual_arcs(level_network(scores, parents, sparsity=2, **OPTIONS), codes)
    assert (prices[heads] <= prices[tails] + costs).all()


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((2, 3), int), "Expected codes to be a bool array"),
        (np.zeros((3, 2), bool), "of the shape of scores"),
        (np.array([[True, True, False], [True, False, False]]), "between 1 and 2"),
        (np.zeros((2, 3), bool), "1 <= sparsity"),
    ],
)
def test_wrong_codes_are_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        certificate(np.zeros((2, 3)), codes)
