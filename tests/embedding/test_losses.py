"""Each loss against the definition, written as plain loops over numpy numbers."""

import numpy as np
import pytest
import torch

from hqsearch.embedding.losses import (
    masked_l1_distances,
    masked_similarities,
    npairs_loss,
    semihard_over_pairs,
    semihard_over_rows,
    semihard_triplet_loss,
    squared_distances,
)


def naive_npairs(similarities, same, anchors, positives, regularization):
    total = 0.0
    for i in range(len(similarities)):
        normalizer = np.log(sum(np.exp(s) for s in similarities[i]))
        columns = [j for j in range(similarities.shape[1]) if same[i, j]]
        total += sum(normalizer - similarities[i, j] for j in columns) / len(columns)
    norms = np.mean([a @ a for a in anchors]) + np.mean([p @ p for p in positives])
    return total / len(similarities) + 0.25 * regularization * norms


def naive_semihard(distances, same, margin):
    n = len(distances)
    total, n_pairs = 0.0, 0
    for i in range(n):
        for j in range(n):
            if i == j or not same[i, j]:
                continue
            negatives = [distances[i, k] for k in range(n) if not same[i, k]]
            if not negatives:
                continue
            farther = [d for d in negatives if d > distances[i, j]]
            negative = min(farther) if farther else max(negatives)
            total += max(0.0, margin + distances[i, j] - negative)
            n_pairs += 1
    return total / max(n_pairs, 1)


def naive_masked(first, second, first_codes, second_codes, term):
    result = np.zeros((len(first), len(second)))
    for i in range(len(first)):
        for j in range(len(second)):
            for t in range(first.shape[1]):
                mask = 1 - (1 - first_codes[i, t]) * (1 - second_codes[j, t])
                result[i, j] += mask * term(first[i, t], second[j, t])
    return result


def labels_of(rng, kind, n):
    return {
        "random": rng.integers(0, 4, n),
        "one label": np.zeros(n, int),
        "all different": np.arange(n),
        "one odd": np.r_[np.zeros(n - 1, int), 1],
    }[kind]


def random_codes(rng, n, d, sparsity):
    codes = np.zeros((n, d))
    for row in codes:
        row[rng.choice(d, sparsity, replace=False)] = 1
    return codes


@pytest.mark.parametrize("seed", range(5))
def test_npairs_is_the_cross_entropy_to_a_uniform_target(seed):
    rng = np.random.default_rng(seed)
    anchors, positives = rng.normal(size=(2, 8, 5))
    labels = rng.integers(0, 3, 8)
    same = labels[:, None] == labels
    expected = naive_npairs(anchors @ positives.T, same, anchors, positives, 0.02)
    a, p = torch.tensor(anchors), torch.tensor(positives)
    found = npairs_loss(a @ p.T, torch.tensor(same), a, p, 0.02)
    assert found.item() == pytest.approx(expected, rel=1e-12)


both_ways = pytest.mark.parametrize("semihard", [semihard_over_pairs, semihard_over_rows])


@both_ways
@pytest.mark.parametrize("kind", ["random", "one label", "all different", "one odd"])
@pytest.mark.parametrize("seed", range(3))
def test_semihard_triplet_takes_the_nearest_farther_negative_or_else_the_farthest(kind, seed, semihard):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(10, 3))
    labels = labels_of(rng, kind, 10)
    same = labels[:, None] == labels
    distances = squared_distances(torch.tensor(vectors))
    expected = naive_semihard(distances.numpy(), same, 0.3)
    found = semihard(distances, torch.tensor(same), 0.3)
    assert found.item() == pytest.approx(expected, rel=1e-12)


@both_ways
def test_semihard_triplet_on_ties_needs_a_strictly_farther_negative(semihard):
    # From item 0: its positive is at 1, negatives at 1 and 2, so the negative is the one at 2.
    distances = torch.tensor([[0.0, 1, 1, 2], [1, 0, 3, 3], [1, 3, 0, 1], [2, 3, 1, 0]])
    same = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    expected = naive_semihard(distances.numpy(), same.numpy(), 1.5)
    assert semihard(distances, same, 1.5).item() == pytest.approx(expected)
    assert expected == pytest.approx((0.5 + 0 + 0 + 0.5) / 4)


def test_both_ways_to_the_semihard_triplet_loss_have_the_same_gradients():
    rng = np.random.default_rng(0)
    scores = torch.tensor(rng.normal(size=(3, 14, 4)), requires_grad=True)
    labels = rng.integers(0, 4, (3, 14))
    same = torch.tensor(labels[:, :, None] == labels[:, None])
    gradients = []
    for semihard in (semihard_over_pairs, semihard_over_rows):
        losses = semihard(squared_distances(scores), same, 0.8)
        assert losses.shape == (3,)
        gradients.append(
            torch.autograd.grad(losses @ torch.tensor([1.0, 2, 3], dtype=losses.dtype), scores)[0]
        )
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@both_ways
def test_semihard_triplet_has_finite_gradients_where_a_row_has_no_negative(semihard):
    scores = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    semihard(squared_distances(scores), torch.ones(6, 6, dtype=torch.bool), 0.3).backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize("sparsity", [1, 3, 6])
def test_masked_similarities_equal_the_triple_loop(sparsity):
    rng = np.random.default_rng(sparsity)
    anchors, positives = rng.normal(size=(2, 7, 6))
    a_codes, p_codes = random_codes(rng, 7, 6, sparsity), random_codes(rng, 7, 6, sparsity)
    expected = naive_masked(anchors, positives, a_codes, p_codes, lambda a, p: a * p)
    found = masked_similarities(*map(torch.tensor, (anchors, positives, a_codes, p_codes)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sparsity", [1, 3, 6])
def test_masked_l1_distances_equal_the_triple_loop(sparsity):
    rng = np.random.default_rng(sparsity)
    scores = rng.normal(size=(9, 6))
    codes = random_codes(rng, 9, 6, sparsity)
    expected = naive_masked(scores, scores, codes, codes, lambda a, b: abs(a - b))
    active = torch.tensor(np.stack([np.flatnonzero(row) for row in codes]))
    np.testing.assert_allclose(
        masked_l1_distances(torch.tensor(scores), active).numpy(), expected, atol=1e-12
    )


def test_masked_losses_have_the_gradient_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    codes = torch.tensor(random_codes(np.random.default_rng(0), 6, 5, 2))
    active = codes.topk(2, dim=-1).indices
    same = torch.tensor([0, 0, 1, 1, 2, 2])[:, None] == torch.tensor([0, 0, 1, 1, 2, 2])

    def both(x):
        npairs = npairs_loss(masked_similarities(x, x, codes, codes), same, x, x, 0.1)
        return npairs + semihard_triplet_loss(masked_l1_distances(x, active), same, 0.5)

    assert torch.autograd.gradcheck(both, (scores,))


def test_groups_of_a_step_do_not_influence_each_other():
    rng = np.random.default_rng(1)
    scores = torch.tensor(rng.normal(size=(3, 8, 4)))
    labels = torch.tensor(rng.integers(0, 3, (3, 8)))
    same = labels[..., None] == labels[:, None]
    active = torch.tensor(rng.integers(0, 4, (3, 8, 1)))
    together = semihard_triplet_loss(masked_l1_distances(scores, active), same, 0.4)
    alone = [
        semihard_triplet_loss(masked_l1_distances(s, a), t, 0.4)
        for s, a, t in zip(scores, active, same, strict=True)
    ]
    np.testing.assert_allclose(together.numpy(), [loss.item() for loss in alone], rtol=1e-12)
