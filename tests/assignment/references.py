"""Plain references for the flow problem of one level: exact arithmetic, no cleverness."""

from fractions import Fraction
from itertools import combinations, product

import numpy as np


def exact_energy(scores, codes, parents, sibling_penalty, orthogonality_penalty):
    """Energy of codes as a Fraction, from the definition: pairs of classes that share a bucket pay."""
    scores = np.asarray(scores)
    parents = np.arange(len(scores)) if parents is None else np.asarray(parents)
    energy = Fraction(0)
    for c, t in zip(*np.nonzero(codes), strict=True):
        energy -= Fraction(float(scores[c, t]))
    for t in range(scores.shape[1]):
        for c, r in combinations(np.flatnonzero(codes[:, t]).tolist(), 2):
            energy += Fraction(float(orthogonality_penalty))
            if parents[c] == parents[r]:
                energy += Fraction(float(sibling_penalty))
    return energy


def brute_force_energy(scores, sparsity, parents, sibling_penalty, orthogonality_penalty):
    """Least energy over every choice of buckets."""
    scores = np.asarray(scores)
    n_classes, n_buckets = scores.shape
    best = None
    for choice in product(combinations(range(n_buckets), sparsity), repeat=n_classes):
        codes = np.zeros(scores.shape, bool)
        for c, buckets in enumerate(choice):
            codes[c, list(buckets)] = True
        energy = exact_energy(scores, codes, parents, sibling_penalty, orthogonality_penalty)
        best = energy if best is None else min(best, energy)
    return best
