"""What the papers' experiments are to reach, and whether a result does.

(i) As precise as exhaustive search, at a speed-up near the number of classes; (ii) on the classes of the
training near the softmax control and above every other baseline; (iii) on other classes above the control and
IVF at every speed-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KS = (1, 4, 16)
DIRECTIONS = ("test->train", "test->test")
# The three ways to search an index: what is added to a system's name, and their name.
WAYS = {"": "index", ", listed by codes": "listed by codes", ", own leaves": "the codes' leaves"}
# What is added to the name of a system for its curve over epsilon.
OVER_EPSILON = ", over epsilon"
# The speed-up from which on curves are compared.
LEAST_SUF = 5.0

PRECISION, SPEEDUP = "(i) exhaustive search", "(i) speed-up"
CONTROL, BASELINES, SLOWER = "(ii) control", "(ii) baselines", "(ii) slower baselines"
CURVE_CONTROL, CURVE_MIXED, CURVE_IVF = "(iii) control", "(iii) control, our embedding", "(iii) IVF"
# Beyond the goals.
FURTHER_LEAVES = "(ii) control, further leaves"
CURVE_HNSW = "(iii) HNSW"
KINDS = (
    PRECISION,
    SPEEDUP,
    CONTROL,
    BASELINES,
    SLOWER,
    FURTHER_LEAVES,
    CURVE_CONTROL,
    CURVE_MIXED,
    CURVE_IVF,
    CURVE_HNSW,
)
OTHER_INDEXES = {"IVF-Flat": CURVE_IVF, "HNSW": CURVE_HNSW}


@dataclass(frozen=True)
class Verdict:
    """Whether a goal is reached in one place.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    goal, where : str
        In words.
    reached : bool or None
        Whether it is; None where nothing is asked.
    worst : float
        The smallest difference, in points, or for a speed-up its ratio to what is asked; NaN where there is
        none.
    figure : str
        The differences, or the speed-up.
    """

    kind: str
    goal: str
    where: str
    reached: bool | None
    worst: float
    figure: str


def collect(result):
    """Sort records by (protocol, direction, system, s): a list over the seeds each."""
    found = {}
    for r in result["records"]:
        found.setdefault((r["protocol"], r["direction"], r["system"], r["s"]), []).append(r)
    return found


def mean(records, name):
    """Mean over the seeds."""
    return float(np.mean([r[name] for r in records]))


def curves(found, protocol, direction, k):
    """Mean curve of each system: name to (SUF, precision), along the points that all seeds have.

    A curve of some seeds only is none: galleries are noticed one by one.
    """
    out = {}
    n_seeds = max(
        (len(records) for key, records in found.items() if key[:2] == (protocol, direction)), default=0
    )
    for (p, d, system, _), records in found.items():
        if (
            (p, d) != (protocol, direction)
            or len(records) < n_seeds
            or "curve" not in records[0]
            or f"SUF@{k}" not in records[0]["curve"][0]
        ):
            continue
        n = min(len(r["curve"]) for r in records)
        points = np.array([[(c[f"SUF@{k}"], c[f"P@{k}"]) for c in r["curve"][:n]] for r in records]).mean(0)
        out[system] = points[:, 0], points[:, 1]
    return out


def at(curve, suf):
    """Precision of a curve at given speed-ups, linear in log SUF; NaN beyond its ends."""
    order = np.argsort(curve[0])
    x, y = np.log(np.asarray(curve[0])[order]), np.asarray(curve[1])[order]
    return np.interp(np.log(suf), x, y, left=np.nan, right=np.nan)


def at_or_end(curve, suf):
    """Precision of a curve at a speed-up; beyond its ends that of its last point on that side."""
    return float(at(curve, np.clip(suf, curve[0].min(), curve[0].max())))


def of_differences(kind, goal, where, reached, gaps):
    """Make the verdict on differences of precision."""
    worst = 100 * float(min(gaps))
    return Verdict(kind, goal, where, bool(reached), worst, ", ".join(f"{100 * gap:+.2f}" for gap in gaps))


def against_exhaustive(result, found):
    """Goal (i): as precise as exhaustive search, at a speed-up near the number of classes."""
    for (protocol, direction), s in {(key[:2], key[3]): None for key in found if key[2] == "hqsearch"}:
        ours = found[protocol, direction, "hqsearch", s]
        where = f"{protocol}, {direction}, s = {s}"
        for system in ("exhaustive", "exhaustive, trained embedding alone"):
            # The second one is there only where the embedding can be joined with the hidden layer.
            if system != "exhaustive" and (protocol, direction, system, None) not in found:
                continue
            # Seed by seed: both search embeddings of one network.
            theirs = {r["seed"]: r for r in found[protocol, direction, system, None]}
            pairs = [[r[f"P@{k}"] - theirs[r["seed"]][f"P@{k}"] for r in ours] for k in KS]
            gaps = [float(np.mean(of_seeds)) for of_seeds in pairs]
            slack = [float(np.abs(np.array(d) - np.mean(d)).max()) for d in pairs]
            held = all(gap >= -room for gap, room in zip(gaps, slack, strict=True))
            goal = system.replace("exhaustive", "exhaustive search", 1)
            goal = f"precision@1, 4, 16 of {goal}, within the seeds' spread"
            yield of_differences(PRECISION, goal, where, held, gaps)
        if s == 1:
            n_classes = result["n_classes"][protocol]
            suf = mean(ours, "SUF@1")
            goal, ratio = f"SUF >= 0.8 x {n_classes} classes at s = 1", suf / (0.8 * n_classes)
            yield Verdict(SPEEDUP, goal, f"{protocol}, {direction}", ratio >= 1, ratio, f"{suf:.1f}")


def closed_set(found):
    """Goal (ii): near the softmax control and above every other baseline, ours at s = 1.

    A baseline counts, at any sparsity, where its speed-up is at least 0.8 of ours. Slower ones, from SUF 5
    on, are compared at 1 and 16, at their speed-ups, with our curve over the number of probes: searched in
    the same way where that is as fast, else as an index does by default, or with the end of that.
    The goal is about the control's nearest leaf; that our curve is above the one of its further leaves too is
    asked by none.
    """
    for direction in dict.fromkeys(key[1] for key in found if key[0] == "closed"):
        group = {key[2:]: records for key, records in found.items() if key[:2] == ("closed", direction)}
        if ("hqsearch", 1) not in group:
            continue
        ours, where = group["hqsearch", 1], f"closed, {direction}"

        def ahead_of(records, ours=ours):
            return [mean(ours, f"P@{k}") - mean(records, f"P@{k}") for k in KS]

        for name in (f"softmax{way}" for way in WAYS):
            # Some runs are without it.
            if (name, 1) not in group:
                continue
            control = group[name, 1]
            gaps = ahead_of(control)
            fast = mean(ours, "SUF@16") >= 0.99 * mean(control, "SUF@16")
            goal = f"within 0.5 points of {name}, the control, at its SUF or higher"
            yield of_differences(CONTROL, goal, where, fast and min(gaps) >= -0.005, gaps)
        drawn = {k: curves(found, "closed", direction, k) for k in (1, 16)}
        fast_enough = 0.8 * mean(ours, "SUF@16")
        for (name, s), records in group.items():
            if not name.startswith(("one level", "Th", "VQ", "LSH")) or name.endswith(OVER_EPSILON):
                continue
            suf = mean(records, "SUF@16")
            goal = f"above {name}, s = {s}, at SUF@16 {suf:.0f}"
            if suf >= fast_enough:
                gaps = ahead_of(records)
                yield of_differences(BASELINES, goal, where, min(gaps) >= 0, gaps)
            elif suf >= LEAST_SUF and "hqsearch" in drawn[16]:
                same = f"hqsearch{way_of(name)}"
                reaches = all(
                    same in named and named[same][0].max() >= mean(records, f"SUF@{k}")
                    for k, named in drawn.items()
                )
                gaps = [
                    at_or_end(named[same if reaches else "hqsearch"], mean(records, f"SUF@{k}"))
                    - mean(records, f"P@{k}")
                    for k, named in drawn.items()
                ]
                yield of_differences(SLOWER, f"our curve {goal}", where, min(gaps) >= 0, gaps)
        for k, named in drawn.items():
            for name, peer in named.items():
                if not name.startswith(tuple(OTHER_INDEXES)):
                    continue
                suf = np.clip(mean(ours, f"SUF@{k}"), peer[0].min(), peer[0].max())
                gap = mean(ours, f"P@{k}") - at_or_end(peer, suf)
                goal = f"precision@{k} above {name} at SUF {suf:.1f}"
                yield of_differences(BASELINES, goal, where, gap >= 0, [gap])
            for name in (f"softmax{way}" for way in WAYS):
                if name in named and "hqsearch" in named:
                    goal = f"precision@{k} curve above {name} from SUF 5 up"
                    yield Verdict(
                        FURTHER_LEAVES, goal, where, *compare_curves(named["hqsearch"], named[name])
                    )


def way_of(system):
    """End of a system's name that says how it is searched; none is as an index does by default."""
    return next((way for way in WAYS if way and system.endswith(way)), "")


def over_of(system):
    """Tell what a system's curve is over by its name: epsilon, or else the number of probes."""
    return OVER_EPSILON if system.endswith(OVER_EPSILON) else ""


def unseen_classes(found):
    """Goal (iii): the curve over n_probes above the control's and IVF's at every speed-up from 5 up.

    The curve over epsilon likewise, where there is one; the control's own one is then its peer.
    """
    for direction in dict.fromkeys(key[1] for key in found if key[0] == "unseen"):
        for k in (1, 16):
            all_curves = curves(found, "unseen", direction, k)
            for peer, over in (
                (peer, over)
                for peer in all_curves
                for over in ("", OVER_EPSILON)
                if f"hqsearch{over}" in all_curves
                and (
                    peer.startswith(tuple(OTHER_INDEXES))
                    or (peer.startswith("softmax") and over_of(peer) == over)
                )
            ):
                goal = f"precision@{k} curve{over} above {peer} from SUF 5 up"
                kind = OTHER_INDEXES.get(peer.partition(",")[0], CURVE_CONTROL)
                if peer.startswith("softmax, our embedding"):
                    kind = CURVE_MIXED
                compared = compare_curves(all_curves[f"hqsearch{over}"], all_curves[peer])
                yield Verdict(kind, goal, f"unseen, {direction}", *compared)


def compare_curves(curve, peer):
    """Whether a curve is above a peer's from SUF 5 up, its smallest difference in points, and them all.

    Nothing is asked where the peer ends below that.
    """
    end = peer[0].max()
    if end < LEAST_SUF:
        return None, float("nan"), f"the peer ends at SUF {end:.1f}"
    suf = np.geomspace(LEAST_SUF, end, 20)
    ours, theirs = at(curve, suf), at(peer, suf)
    # Where the peer reaches and we do not, it is ahead.
    missing = np.isnan(ours) & ~np.isnan(theirs)
    ahead = 100 * (ours - theirs)[~np.isnan(ours - theirs)]
    text = f"{ahead.min():+.1f} to {ahead.max():+.1f}" if len(ahead) else "no SUF in common"
    if missing.any():
        text += f"; only the peer reaches SUF {suf[missing].max():.0f}"
    reached = len(ahead) > 0 and not missing.any() and bool((ahead >= 0).all())
    return reached, float(ahead.min()) if len(ahead) else float("nan"), text


def verdicts(result):
    """Say of every goal whether a result reaches it."""
    found = collect(result)
    return [*against_exhaustive(result, found), *closed_set(found), *unseen_classes(found)]
