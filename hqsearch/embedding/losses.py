"""The losses of both stages: npairs and semi-hard triplet, plain and masked by codes, and cross-entropies.

All functions take leading batch dimensions, `...` or `n_groups`, one for each class group of a training step,
and return one loss for each group. Equations of npairs and triplet: Jeong, Kim & Song, CVPR 2019 (arXiv
1902.10990), sections 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def npairs_loss(
    similarities: Tensor, same: Tensor, anchors: Tensor, positives: Tensor, regularization: float
) -> Tensor:
    """Softmax cross-entropy of each anchor over all positives, plus a penalty on squared norms.

    Parameters
    ----------
    similarities : Tensor of shape (..., n_anchors, n_positives)
        Logits, `anchors @ positives.T` or their masked form.
    same : bool Tensor of shape (..., n_anchors, n_positives)
        Whether the two items share a label. The target of a row is uniform over its true entries, of which
        each row has at least one.
    anchors, positives : Tensor of shape (..., n_anchors, n_features) and (..., n_positives, n_features)
        The vectors whose norms are penalised.
    regularization : float
        Weight of `(mean |a|^2 + mean |p|^2) / 4`.

    Returns
    -------
    Tensor of shape (...)
        The loss of each group.
    """
    targets = same.to(similarities.dtype)
    targets = targets / targets.sum(-1, keepdim=True)
    cross_entropy = -(targets * similarities.log_softmax(-1)).sum(-1).mean(-1)
    norms = anchors.square().sum(-1).mean(-1) + positives.square().sum(-1).mean(-1)
    return cross_entropy + 0.25 * regularization * norms


def semihard_triplet_loss(distances: Tensor, same: Tensor, margin: float) -> Tensor:
    """Mean hinge over all ordered pairs of one label, each against its semi-hard negative.

    The negative of a pair (i, j) is the smallest distance from i to another label that is larger than
    D(i, j), or, where none is, the largest distance from i to another label.

    Parameters
    ----------
    distances : Tensor of shape (..., n, n)
        Distances between all items of a group.
    same : bool Tensor of shape (..., n, n)
        Whether two items share a label; the diagonal is left out.
    margin : float
        By how much a negative should be farther than the positive.

    Returns
    -------
    Tensor of shape (...)
        The loss of each group; 0 where there is no pair or no negative.
    """
    # A GPU does all rows as fast as some, and the latter would have to wait for how many there are.
    over = semihard_over_rows if distances.is_cuda else semihard_over_pairs
    return over(distances, same, margin)


def semihard_over_pairs(distances: Tensor, same: Tensor, margin: float) -> Tensor:
    """`semihard_triplet_loss` from the rows of pairs only, a bounded number of them at a time.

    A class-balanced batch has few pairs, and neither a sort of all rows nor a cube of distances is needed.
    """
    n = distances.shape[-1]
    rows, labels = distances.flatten(0, -2), same.flatten(0, -2)
    row, other = _without_diagonal(same).flatten(0, -2).nonzero(as_tuple=True)
    with torch.no_grad():
        farthest = rows.masked_fill(labels, -torch.inf).max(-1)
        chosen = torch.cat(
            [
                _nearest_farther(rows[i], labels[i], rows[i, j], farthest.indices[i])
                for i, j in zip(row.split(_ROWS_AT_ONCE), other.split(_ROWS_AT_ONCE), strict=True)
            ]
        )
        has_negative = farthest.values[row] > -torch.inf
    hinge = (margin + rows[row, other] - rows[row, chosen]).clamp_min(0) * has_negative
    n_groups = rows.shape[0] // n
    group = row // n
    total = rows.new_zeros(n_groups).index_add(0, group, hinge)
    n_pairs = rows.new_zeros(n_groups).index_add(0, group, has_negative.to(rows.dtype))
    return (total / n_pairs.clamp_min(1)).view(distances.shape[:-2])


def semihard_over_rows(distances: Tensor, same: Tensor, margin: float) -> Tensor:
    """`semihard_triplet_loss` from all rows, sorted: the same kernels whatever the labels are."""
    with torch.no_grad():
        ordered, order = distances.masked_fill(same, torch.inf).sort(dim=-1, stable=True)
        n_negatives = (~same).sum(-1, keepdim=True)
        rank = torch.searchsorted(ordered, distances.contiguous(), right=True)
        nearest = order.gather(-1, rank.clamp_max(distances.shape[-1] - 1))
        farthest = distances.masked_fill(same, -torch.inf).argmax(-1, keepdim=True)
        chosen = torch.where(rank < n_negatives, nearest, farthest)
        counts = _without_diagonal(same) & (n_negatives > 0)
    hinge = (margin + distances - distances.gather(-1, chosen)).clamp_min(0) * counts
    return hinge.sum((-2, -1)) / counts.sum((-2, -1)).clamp_min(1)


def _without_diagonal(same: Tensor) -> Tensor:
    return same & ~torch.eye(same.shape[-1], dtype=torch.bool, device=same.device)


# Rows of this many pairs are searched together: of 512 distances each, 8 MiB.
_ROWS_AT_ONCE = 4096


def _nearest_farther(rows: Tensor, labels: Tensor, bounds: Tensor, otherwise: Tensor) -> Tensor:
    """Column of the least distance above the bound among other labels, or `otherwise` where there is none."""
    nearest = rows.masked_fill(labels | (rows <= bounds[:, None]), torch.inf).min(-1)
    return torch.where(nearest.values < torch.inf, nearest.indices, otherwise)


def class_cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Softmax cross-entropy of every item over all classes.

    Parameters
    ----------
    logits : Tensor of shape (n_groups, n_classes, items_per_class, n_all_classes)
        One logit for each class of the training items.
    classes : int64 Tensor of shape (n_groups, n_classes)
        Which classes a group holds.

    Returns
    -------
    Tensor of shape (n_groups,)
        Mean over the items of each group.

    Notes
    -----
    Over cosines to class proxies: A. Zhai and H.-Y. Wu, BMVC 2019 (arXiv 1811.12649).
    """
    log_probabilities = logits.log_softmax(-1)
    index = classes[:, :, None, None].expand(*logits.shape[:-1], 1)
    return -log_probabilities.gather(-1, index).flatten(1).mean(1)


def code_cross_entropy(level_scores: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of every item's level scores to its class's code, summed over the levels.

    Parameters
    ----------
    level_scores : Tensor of shape (n_groups, n_classes, items_per_class, n_levels, d)
        Log-probabilities of the buckets of each level.
    codes : Tensor of shape (n_groups, n_classes, n_levels, d)
        Active buckets, 0 or 1, of the scores' dtype. The target of a level is uniform over them.

    Returns
    -------
    Tensor of shape (n_groups,)
        Mean over the items of each group.
    """
    targets = codes / codes.sum(-1, keepdim=True)
    return -(level_scores * targets[:, :, None]).sum((-2, -1)).flatten(1).mean(1)


def squared_distances(vectors: Tensor) -> Tensor:
    """Squared Euclidean distances between all items: (..., n, n_features) to (..., n, n)."""
    squares = vectors.square().sum(-1)
    products = vectors @ vectors.transpose(-2, -1)
    return (squares.unsqueeze(-1) + squares.unsqueeze(-2) - 2 * products).clamp_min(0)


def masked_similarities(
    anchors: Tensor, positives: Tensor, anchor_codes: Tensor, positive_codes: Tensor
) -> Tensor:
    """Inner products over the dimensions that either item's code activates.

    `S(i, j) = sum_t (1 - (1 - z_it)(1 - z_jt)) a_it p_jt`, as two matrix products: what i activates, and
    what j activates but not i.

    Parameters
    ----------
    anchors, positives : Tensor of shape (..., n_anchors, d) and (..., n_positives, d)
        Level scores.
    anchor_codes, positive_codes : Tensor of the same shapes
        Active buckets, 0 or 1, of the scores' dtype.

    Returns
    -------
    Tensor of shape (..., n_anchors, n_positives)
    """
    active = anchors * anchor_codes
    return active @ positives.transpose(-2, -1) + (anchors - active) @ (positives * positive_codes).transpose(
        -2, -1
    )


def masked_l1_distances(scores: Tensor, active_buckets: Tensor) -> Tensor:
    """L1 distances over the dimensions that either item's code activates.

    `D(i, j) = sum_t (1 - (1 - z_it)(1 - z_jt)) |f_it - f_jt|`, touching `2 * sparsity` numbers a pair
    instead of d.

    Parameters
    ----------
    scores : Tensor of shape (..., n, d)
        Level scores.
    active_buckets : int64 Tensor of shape (..., n, sparsity)
        The buckets that each item's code activates, all different.

    Returns
    -------
    Tensor of shape (..., n, n)
    """
    n, sparsity = active_buckets.shape[-2:]
    flat = active_buckets.flatten(-2)
    own = scores.gather(-1, active_buckets).flatten(-2)
    columns = scores.gather(-1, flat.unsqueeze(-2).expand(*scores.shape[:-1], n * sparsity))
    gaps = (columns - own.unsqueeze(-2)).abs()
    # gaps[j, (i, q)] = |f_j - f_i| at the q-th active bucket of i
    member = torch.zeros_like(scores).scatter_(-1, active_buckets, 1.0)
    theirs_too = member.gather(-1, flat.unsqueeze(-2).expand(*scores.shape[:-1], n * sparsity))
    split = (*scores.shape[:-1], n, sparsity)
    either_side = gaps.view(split).sum(-1)
    both = (gaps * theirs_too).view(split).sum(-1)
    return either_side + either_side.transpose(-2, -1) - both
