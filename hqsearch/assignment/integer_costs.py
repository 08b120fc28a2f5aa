"""Scores and penalties to int64 costs, at a named scale and without overflow.

In floating point, rounding makes cycles of cost "almost zero" and an exact search can walk them for ever. So
every cost is an integer: a score ``u`` becomes ``-rint(u * 2**shift)``, where `shift` puts the largest
``|score|`` just under ``2**40`` (a resolution of 2e-12 of it), or under ``2**31`` (9.4e-10) where penalties
need the room.

Penalties may be any number of magnitudes above the scores. A penalty so large that no exchange of classes can
outweigh one unit of it is replaced by the smallest such integer, which has the same optimal codes:

* A code is optimal when its residual network has no negative simple cycle. Such a cycle visits a class once,
  hence changes the scores by at most ``reach = min(n_classes, ...) * 2 * largest |score|``; it visits the
  sink once, hence changes the orthogonality term by at most `n_classes` units; it visits a bucket once, hence
  changes the sibling term by at most ``branching_factor * largest group`` units.
* So a sibling penalty above ``reach + n_classes * orthogonality`` decides the sign of every cycle that it
  takes part in, and any other value above that bound decides the same signs. The same holds with the two
  penalties exchanged.
* Where neither rules the other but their ratio is a fraction ``a / b`` of small integers, each cycle pays a
  multiple of the common unit ``orthogonality / b``, and a unit above `reach` may be any other value above
  `reach`.

What still does not fit is refused.
"""

import math

import numpy as np
from numba import njit

FINE_BITS = 40
COARSE_BITS = 31
COST_LIMIT = 2.0**57
"""No single arc may cost more; potentials stay under twice that, and their sums inside int64."""
SCORE_LIMIT = 1e300
"""A larger score could not be summed into an energy in float64."""
HUGE = 1e150
MAGNITUDE = np.int64(2**63 - 1)
NOT_FINITE = np.int64(0x7FF << 52)

STATUS_OPTIMAL = 0
STATUS_NOT_FINITE = 1
STATUS_OVERFLOW = 2
STATUS_STUCK = 3


@njit(cache=True, nogil=True)
def common_unit(first, second):
    """Find integers a, b <= 2**20 with ``first / second == a / b`` to twelve digits, or (0, 0)."""
    ratio = first / second
    a0, b0, a1, b1 = 0.0, 1.0, 1.0, 0.0
    rest = ratio
    for _ in range(24):
        whole = math.floor(rest)
        a0, a1 = a1, whole * a1 + a0
        b0, b1 = b1, whole * b1 + b0
        if a1 > 2.0**20 or b1 > 2.0**20:
            break
        if abs(a1 - ratio * b1) <= 1e-12 * a1:
            return a1, b1
        if rest == whole:
            break
        rest = 1.0 / (rest - whole)
    return 0.0, 0.0


@njit(cache=True, nogil=True)
def scaled_penalties(sibling_penalty, orthogonality_penalty, first, second):
    """Return both penalties times ``first * second``, finite and with their ratio kept."""
    sibling = (sibling_penalty * first) * second
    orthogonality = (orthogonality_penalty * first) * second
    if min(sibling, orthogonality) > HUGE:
        ratio = sibling_penalty / orthogonality_penalty
        return HUGE * max(ratio, 1.0), HUGE * max(1.0 / ratio, 1.0)
    return min(sibling, HUGE * HUGE), min(orthogonality, HUGE * HUGE)


@njit(cache=True, nogil=True)
def equivalent_penalties(sibling, orthogonality, reach, n_classes, n_unit_steps):
    """Return penalties in cost units, each as small as the same optimal codes allow."""
    if sibling > reach + n_classes * orthogonality:
        orthogonality = min(orthogonality, reach + 1.0)
        return min(sibling, math.floor(reach + n_classes * orthogonality) + 1.0), orthogonality
    if orthogonality > reach + n_unit_steps * sibling:
        sibling = min(sibling, reach + 1.0)
        return sibling, min(orthogonality, math.floor(reach + n_unit_steps * sibling) + 1.0)
    if min(sibling, orthogonality) > reach:
        a, b = common_unit(sibling, orthogonality)
        if b > 0.0 and orthogonality / b > reach:
            unit = math.floor(reach) + 1.0
            return a * unit, b * unit
    return sibling, orthogonality


@njit(cache=True, nogil=True)
def integer_costs(scores, costs, sibling_penalty, orthogonality_penalty, largest_group):
    """Fill `costs` (int64) from `scores` (float64), both of shape (n_classes, branching_factor).

    Returns
    -------
    sibling, orthogonality : int64
        The penalties in units of the costs.
    shift : int
        A cost unit is ``2.0**-shift`` of a score.
    status : int
        `STATUS_OPTIMAL`, `STATUS_NOT_FINITE` or `STATUS_OVERFLOW`.
    """
    n_classes, n_buckets = scores.shape
    if n_classes == 0 or n_buckets == 0:
        return np.int64(0), np.int64(0), 0, STATUS_OPTIMAL
    # magnitudes compare as their bit patterns do, and integer maxima vectorise where NaN-aware ones do not
    bits_of = scores.view(np.int64)
    top = np.int64(0)
    for c in range(n_classes):
        for t in range(n_buckets):
            top = max(top, bits_of[c, t] & MAGNITUDE)
    if top >= NOT_FINITE:
        return np.int64(0), np.int64(0), 0, STATUS_NOT_FINITE
    largest = np.array([top]).view(np.float64)[0]
    if largest > SCORE_LIMIT:
        return np.int64(0), np.int64(0), 0, STATUS_OVERFLOW
    # where all scores are zero, only the ratio of the penalties matters
    exponent = math.frexp(largest if largest > 0.0 else max(sibling_penalty, orthogonality_penalty))[1]
    # a simple cycle alternates classes with buckets, unless siblings exchange places among themselves
    n_moves = n_classes if largest_group > 1 else min(n_classes, n_buckets + 1)
    for bits in (FINE_BITS, COARSE_BITS):
        shift = bits - exponent
        # two factors, as one alone may leave the range of float64
        first = math.ldexp(1.0, shift // 2)
        second = math.ldexp(1.0, shift - shift // 2)
        reach = n_moves * (2.0 * (largest * first) * second + 1.0)
        sibling, orthogonality = scaled_penalties(
            sibling_penalty if largest_group > 1 else 0.0, orthogonality_penalty, first, second
        )
        sibling, orthogonality = equivalent_penalties(
            sibling, orthogonality, reach, float(n_classes), float(n_buckets * largest_group)
        )
        if reach + sibling * largest_group + orthogonality * n_classes < COST_LIMIT:
            for c in range(n_classes):
                for t in range(n_buckets):
                    costs[c, t] = -np.int64(np.rint((scores[c, t] * first) * second))
            return np.int64(np.rint(sibling)), np.int64(np.rint(orthogonality)), shift, STATUS_OPTIMAL
    return np.int64(0), np.int64(0), 0, STATUS_OVERFLOW
