"""The papers' training step written plainly in torch and OR-Tools, for comparison with ours.

One forward pass for the codes and one for the loss, items x items x buckets masks, and the flow network built
arc by arc.
"""

from __future__ import annotations

import numpy as np
import torch

from hqsearch.assignment import solve_level
from hqsearch.assignment.solvers import level_energy
from hqsearch.embedding.losses import npairs_loss


def naive_mask(codes):
    """Return M(i, j, t) = 1 - (1 - z_it)(1 - z_jt), items x items x buckets."""
    return 1 - (1 - codes[:, None]) * (1 - codes[None])


def naive_similarities(anchors, positives, codes):
    """Masked inner products by the whole mask."""
    return (naive_mask(codes) * anchors[:, None] * positives[None]).sum(-1)


def naive_distances(scores, codes):
    """Masked L1 distances by the whole mask."""
    return (naive_mask(codes) * (scores[:, None] - scores[None]).abs()).sum(-1)


def naive_semihard(distances, same, margin):
    """Semi-hard triplet loss by an items x items x items mask."""
    n = len(distances)
    other = ~same
    farther = other[:, None, :] & (distances[:, None, :] > distances[:, :, None])
    cube = distances[:, None, :].expand(n, n, n)
    nearest_farther = cube.masked_fill(~farther, torch.inf).amin(-1)
    farthest = distances.masked_fill(~other, -torch.inf).amax(-1, keepdim=True).expand(n, n)
    negative = torch.where(farther.any(-1), nearest_farther, farthest)
    pairs = same & ~torch.eye(n, dtype=torch.bool, device=same.device)
    return torch.where(pairs, (margin + distances - negative).clamp_min(0), 0.0).sum() / pairs.sum()


def ortools_cascade(class_scores, sparsity, *, sibling_penalty, orthogonality_penalty):
    """Codes of one batch, the network built arc by arc: (n_classes, n_levels, d) scores to codes."""
    from ortools.graph.python import min_cost_flow

    n_classes, n_levels, d = class_scores.shape
    codes = np.zeros(class_scores.shape, dtype=np.float32)
    parents = np.zeros(n_classes, dtype=np.int64)
    scale = 10**6
    for level in range(n_levels):
        k = sparsity if level == n_levels - 1 else 1
        groups = np.unique(parents, return_inverse=True)[1]
        flow = min_cost_flow.SimpleMinCostFlow()
        source, n_nodes = 0, 1 + n_classes
        bucket_node = list(range(n_nodes, n_nodes + d))
        n_nodes += d
        middle = {}
        arcs = []
        for c in range(n_classes):
            flow.add_arc_with_capacity_and_unit_cost(source, 1 + c, k, 0)
            for t in range(d):
                target = bucket_node[t]
                if level:
                    key = (groups[c], t)
                    if key not in middle:
                        middle[key] = n_nodes
                        n_nodes += 1
                        for w in range(int((groups == groups[c]).sum())):
                            cost = int(w * sibling_penalty * scale)
                            flow.add_arc_with_capacity_and_unit_cost(middle[key], target, 1, cost)
                    target = middle[key]
                cost = -int(class_scores[c, level, t] * scale)
                arcs.append((flow.add_arc_with_capacity_and_unit_cost(1 + c, target, 1, cost), c, t))
        sink = n_nodes
        for t in range(d):
            for w in range(n_classes):
                cost = int(w * orthogonality_penalty * scale)
                flow.add_arc_with_capacity_and_unit_cost(bucket_node[t], sink, 1, cost)
        flow.set_node_supply(source, n_classes * k)
        flow.set_node_supply(sink, -n_classes * k)
        if flow.solve() != flow.OPTIMAL:
            raise RuntimeError("OR-Tools found no optimum")
        for arc, c, t in arcs:
            codes[c, level, t] = flow.flow(arc)
        parents = parents * d + codes[:, level].argmax(1)
    return codes


def level_scores(stage, items):
    """Level scores of a batch, (n_classes, items_per_class, n_levels, d), from a forward pass."""
    problem = stage.problem
    outputs = stage.network(stage.data.X[items.flatten()])
    scores = outputs.view(*items.shape, problem.n_levels, problem.branching_factor)
    return torch.nn.functional.normalize(scores, dim=-1) if stage.settings.loss == "triplet" else scores


def published_codes(stage, items, penalties):
    """Codes of a batch's classes, (n_classes, n_levels, d), 0 or 1, from a forward pass of their own."""
    with torch.no_grad():
        class_scores = level_scores(stage, items).mean(1).cpu().numpy()
    codes = ortools_cascade(class_scores, stage.problem.sparsity, **penalties)
    return torch.from_numpy(codes).to(stage.data.X.device)


def published_loss(stage, items, codes):
    """Masked loss of a batch, summed over levels, by whole masks."""
    per_class, settings = items.shape[1], stage.settings
    scores = level_scores(stage, items)
    total = 0.0
    for level in range(stage.problem.n_levels):
        member, of_level = codes[:, level], scores[:, :, level]
        same = (member[:, None] == member[None]).all(-1)
        if settings.loss == "npairs":
            half = per_class // 2
            anchors, positives = of_level[:, :half].flatten(0, 1), of_level[:, half:].flatten(0, 1)
            mask = member.repeat_interleave(half, 0)
            same = same.repeat_interleave(half, 0).repeat_interleave(half, 1)
            similarities = naive_similarities(anchors, positives, mask)
            total = total + npairs_loss(similarities, same, anchors, positives, settings.regularization)
        else:
            mask = member.repeat_interleave(per_class, 0)
            same = same.repeat_interleave(per_class, 0).repeat_interleave(per_class, 1)
            total = total + naive_semihard(
                naive_distances(of_level.flatten(0, 1), mask), same, settings.margin
            )
    return total


def published_step(stage, items, penalties):
    """One update as published: a forward pass for the codes, another for the loss, whole masks."""
    items = items[0]
    loss = published_loss(stage, items, published_codes(stage, items, penalties))
    stage._optimizer.zero_grad(set_to_none=True)
    loss.backward()
    stage._optimizer.step()


@torch.no_grad()
def check_same_step(stage, items, penalties):
    """Refuse to time steps that differ from ours: at each level codes as good, and for them an equal loss."""
    # Without dropout, which draws anew in each pass, and with scores that make a difference to the loss.
    stage.network.eval()
    head = stage.network.head
    weight = head.weight.clone()
    head.weight *= 100
    codes = published_codes(stage, items[0], penalties)
    scores = stage._split(stage.network(stage.data.X[items.flatten()]).float().unflatten(0, items.shape))
    class_scores, chosen = scores[0].mean(1).double().cpu().numpy(), codes.cpu().numpy() > 0
    # The first level has no siblings.
    paths = np.arange(len(chosen))
    for level in range(stage.problem.n_levels):
        u, z = class_scores[:, level], chosen[:, level]
        best = solve_level(u, paths, sparsity=z[0].sum(), return_energy=True, **penalties)[1]
        energy = level_energy(u, z, np.unique(paths, return_inverse=True)[1], **penalties)
        # OR-Tools' costs are integers, millionths here; so its codes may be others that are as good.
        if abs(energy - best) > 1e-5 * len(z):
            raise RuntimeError(f"Expected codes of the energy {best} in the published step, got {energy}.")
        parents = paths if level else np.zeros_like(paths)
        paths = parents * stage.problem.branching_factor + z.argmax(1)
    losses = stage._masked_loss(scores, codes[None] > 0).item(), published_loss(stage, items[0], codes).item()
    if not np.isclose(*losses, rtol=1e-4):
        raise RuntimeError(f"Expected the published step's loss to be ours, {losses[0]}, got {losses[1]}.")
    head.weight.copy_(weight)
    stage.network.train()
