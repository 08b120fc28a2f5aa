"""Every system of the comparison on one task: trained, searched, measured."""

from __future__ import annotations

import copy
import time
import warnings
from functools import cached_property, partial

import numpy as np
from paper_goals import KS, OVER_EPSILON
from paper_peers import PROBES, measure, search_as_many_lists, search_peers
from sklearn.base import BaseEstimator
from sklearn.frozen import FrozenEstimator

from hqsearch import HierarchicalHashEncoder
from hqsearch.baselines import (
    RandomHyperplaneHashEncoder,
    SoftmaxHashEncoder,
    ThresholdHashEncoder,
    VectorQuantizationHashEncoder,
)
from hqsearch.fitting import calibrate_again
from hqsearch.items import FittedItems
from hqsearch.metrics import bucket_nmi, precision_at_k

EPSILONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 2.0)

# Ways to search that are measured: what is added to a system's name, and the index's parameters. They are its
# defaults, items listed by their codes, and the papers' way.
VARIANTS = {
    "": {"probing": "centroids", "listing": "centroids"},
    ", listed by codes": {"probing": "centroids", "listing": "codes"},
    ", own leaves": {"probing": "best_first", "listing": "codes"},
}


class Embedded(BaseEstimator):
    """An encoder over items that are embedded already: baselines need not run the network again."""

    def fit(self, X, y=None):
        """Learn nothing."""
        self.fitted_ = True
        return self

    def embed(self, X):
        """Return X."""
        return X


class Places:
    """Where a task's searches take place: directions, and each one's gallery and queries by their names."""

    def __init__(self, task):
        self.parts = {"gallery": task.gallery_X, "query": task.query_X}
        self.labels = {"gallery": task.gallery_y, "query": task.query_y}
        self.directions = {"test->train": "gallery", "test->test": "query"}

    def by_gallery(self, encoder):
        """Yield what an encoder says of each gallery, with the places that search it; see `gallery_of`."""
        galleries = {name: encoder.gallery_of(self.parts[base]) for name, base in self.directions.items()}
        groups = [[name] for name, gallery in galleries.items() if gallery is not None]
        groups.append([name for name, gallery in galleries.items() if gallery is None])
        for directions in filter(None, groups):
            places = copy.copy(self)
            places.directions = {name: self.directions[name] for name in directions}
            used = {*places.directions.values(), "query"}
            places.parts = {name: X for name, X in self.parts.items() if name in used}
            yield galleries[directions[0]], places

    def apply(self, function):
        """Apply a function to both parts; return the results, and the query part's microseconds an item."""
        results = {}
        for name, X in self.parts.items():
            started = time.perf_counter()
            results[name] = function(X)
            seconds = time.perf_counter() - started
        return results, 1e6 * seconds / len(self.parts["query"])


def search_codes(system, sparsity, encoder, described, encode_us, places, *, gallery=None, curve=False):
    """Search a table of codes in both directions.

    Parameters
    ----------
    system : str
        Name of the system.
    sparsity : int
        Codes of an item.
    encoder : estimator
        For the shape of its codes, and how far a query looks by default.
    described : dict of str to tuple
        Embedding, level scores and codes of each part.
    encode_us : float
        Microseconds of a query in the networks.
    places : Places
        Where to search.
    gallery : Gallery or None, default=None
        How much the embedding counts when leaves are ranked, and which leaves a search opens by default.
    curve : bool, default=False
        Whether to search at several numbers of probes too, and in a gallery of other classes, where that is
        the default, at several epsilons.

    Yields
    ------
    dict
        One record for each direction and way to search.
    """
    for direction, base in places.directions.items():
        codes = described[base][2]
        own = np.arange(len(codes)) if base == "query" else None
        y, base_y = places.labels["query"], places.labels[base]
        by_listing = {
            listing: FittedItems.from_blocks(
                [described[base]],
                branching_factor=encoder.branching_factor,
                n_levels=encoder.n_levels,
                listing=listing,
                embedding_weight=1.0 if gallery is None else gallery.embedding_weight,
            )
            for listing in dict.fromkeys(way["listing"] for way in VARIANTS.values())
        }
        for suffix, way in VARIANTS.items():
            items = by_listing[way["listing"]]
            if way["probing"] == "centroids" and items.centroids is None:
                continue
            epsilon = default_epsilon(encoder, gallery, **way)
            search = partial(items.search, described["query"], probing=way["probing"], exclude=own, n_jobs=1)
            place = {"s": sparsity, "direction": direction, "n_leaves": len(items.table.occupied_leaves())}
            record = {"system": system + suffix, **place}
            for k in KS:
                # A search of its own for each k: leaves are opened until k candidates are there.
                started = time.perf_counter()
                found = search(k, epsilon=epsilon)
                search_us = 1e6 * (time.perf_counter() - started) / len(y)
                record |= measure(y, base_y[found.positions], (k,)) | {f"SUF@{k}": found.stats.suf()}
            # Of buckets, as the papers have it, not of their parts.
            buckets = items.table.stored_codes() // encoder.branching_factor ** (
                items.table.n_levels - items.n_levels
            )
            record |= {"us": encode_us + search_us, "NMI": bucket_nmi(buckets, base_y), "epsilon": epsilon}
            if curve:
                record["curve"] = _curve(search, "n_probes", PROBES, y, base_y)
            yield record
            if curve and gallery is not None and gallery.epsilon and way["probing"] == "centroids":
                points = _curve(search, "epsilon", EPSILONS, y, base_y)
                yield {"system": f"{system}{suffix}{OVER_EPSILON}", **place, "curve": points}


def default_epsilon(encoder, gallery, *, probing, listing):
    """Return what an index's epsilon="auto" is with this encoder and gallery."""
    known = listing == "centroids" and isinstance(encoder, HierarchicalHashEncoder)
    of_encoder = encoder.epsilon_ if known else 0.0
    of_gallery = 0.0 if gallery is None else gallery.epsilon
    return max(of_encoder, of_gallery) if probing == "centroids" else 0.0


def _curve(search, name, values, y, base_y):
    """SUF and precision over a parameter of the search."""
    points = []
    for value in values:
        point = {name: value}
        for k in (1, 16):
            found = search(k, **{name: value})
            precision = precision_at_k(y, base_y[found.positions])
            point |= {f"SUF@{k}": found.stats.suf(), f"P@{k}": precision}
        points.append(point)
        if point["SUF@1"] < 1.5:
            break
    return points


def weights_of(gallery):
    """Weights of a gallery as entries of a record; those of trained classes are left out."""
    if gallery is None:
        return {}
    return {name: getattr(gallery, name) for name in ("hidden_weight", "embedding_weight")}


def with_sparsity(encoder, sparsity, described):
    """Return a fitted encoder with codes of another sparsity, and these of what it has described already."""
    coder = copy.copy(encoder).set_params(sparsity=sparsity)
    codes = {name: (e, scores, coder._codes(scores)) for name, (e, scores, _) in described.items()}
    return coder, codes


class Systems:
    """The systems of one task and seed, as named groups of records; whoever resumes skips groups.

    Parameters
    ----------
    task : Task
        What to train on and to search.
    seed : int
        Of all systems.
    parameters : dict
        Of `HierarchicalHashEncoder`; `memory` keeps the metric stage between groups.
    control : dict
        Of `SoftmaxHashEncoder`.
    sparsities : sequence of int
        Codes of an item.
    by_sparsity : dict of int to dict
        Further encoder parameters for each sparsity, as the papers' settings have them.
    folder : Path
        Where trained encoders are kept: what is measured may change without training anew.
    """

    def __init__(self, task, seed, parameters, control, sparsities, by_sparsity, folder):
        self.by_sparsity = by_sparsity
        self.folder = folder
        self.task, self.seed, self.sparsities = task, seed, sparsities
        self.parameters, self.control = parameters, control
        self.places = Places(task)
        self.n_classes = len(np.unique(task.y))
        encoder = HierarchicalHashEncoder(**parameters)
        # "auto" joins it among other classes with every loss.
        self.joins_hidden_layer = isinstance(encoder.hidden_weight, str) or encoder.hidden_weight > 0

    def groups(self):
        """Return the function of each group by name."""
        return {
            **{f"codes s={s}": partial(self.codes, "hqsearch", s) for s in self.sparsities},
            "codes of one level": partial(self.codes, "one level", self.sparsities[0], n_levels=1),
            "softmax": self.softmax,
            "baselines": self.baselines,
            **({"trained embedding": self.trained_embedding} if self.joins_hidden_layer else {}),
        }

    def encoder(self, **more):
        """Train an encoder; its metric stage comes from the cache where it was trained before."""
        return self.fit(HierarchicalHashEncoder(random_state=self.seed, **(self.parameters | more)))

    def fit(self, estimator):
        """Fit an estimator to the training items; an interrupted fit is none to measure or keep."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Training of the .* was interrupted")
            return estimator.fit(self.task.X, self.task.y)

    def trained_control(self):
        """Train the control, or get it from its cache."""
        return self.fit(SoftmaxHashEncoder(random_state=self.seed, **self.control))

    def kept_encoder(self, system, sparsity, **more):
        """Train an encoder of some sparsity, or load what an earlier run trained."""
        kept = self.folder / f"{system}, {sparsity}"
        # What a run that was killed had begun to save has no manifest.
        if (kept / "manifest.json").exists():
            encoder = HierarchicalHashEncoder.load(kept)
            # Searching may have changed since.
            encoder._keep(calibrate_again(encoder, self.task.X, self.task.y))
            return encoder
        encoder = self.encoder(sparsity=sparsity, **self.by_sparsity.get(sparsity, {}), **more)
        encoder.save(kept)
        return encoder

    def codes(self, system, sparsity, **more):
        """Learned codes of one sparsity."""
        encoder = self.kept_encoder(system, sparsity, **more)
        fit_seconds = sum(record["seconds"] for record in encoder.history_)
        first = sparsity == self.sparsities[0]
        for gallery, places in self.galleries:
            described, us = places.apply(partial(encoder.describe, gallery=gallery))
            more = {"fit_seconds": fit_seconds, "epochs": len(encoder.history_), **weights_of(gallery)}
            n_leaves = {}
            for record in search_codes(
                system, sparsity, encoder, described, us, places, gallery=gallery, curve=first
            ):
                yield record | more
                # Of the first way that the encoder's tree allows.
                n_leaves.setdefault(record["direction"], record["n_leaves"])
            if system == "hqsearch" and first:
                vectors = {name: parts[0] for name, parts in described.items()}
                yield from search_as_many_lists(vectors, n_leaves, places)

    @cached_property
    def first_encoder(self):
        """Our encoder of the first sparsity, by whose embedding all systems search."""
        return self.kept_encoder("hqsearch", self.sparsities[0])

    @cached_property
    def galleries(self):
        """Galleries and places of all systems: the encoders of other sparsities have the same embedding."""
        return list(self.places.by_gallery(self.first_encoder))

    def softmax(self):
        """Search by the control: a plain classifier, ranked by its hidden layer, and by our embedding."""
        control = self.trained_control()
        described, us = self.places.apply(control.describe)
        hidden = {name: parts[0] for name, parts in described.items()}
        yield from search_peers("softmax, exhaustive", hidden, us, self.places)
        encoder = self.first_encoder
        ours = [
            (gallery, places, *places.apply(partial(encoder.embed, gallery=gallery)))
            for gallery, places in self.galleries
        ]
        for s in [s for s in self.sparsities if s <= self.n_classes]:
            coder, own = with_sparsity(control, s, described)
            for gallery, places, embedding, embed_us in ours:
                # Among other classes its embedding counts as much as ours does.
                more = {"gallery": gallery, "curve": s == self.sparsities[0]}
                yield from search_codes("softmax", s, coder, own, us, places, **more)
                same = {name: (vectors, *own[name][1:]) for name, vectors in embedding.items()}
                yield from search_codes(
                    "softmax, our embedding", s, coder, same, us + embed_us, places, **more
                )

    def trained_embedding(self):
        """Exhaustive search of the trained embedding, where ours is joined with the hidden layer."""
        vectors, us = self.places.apply(self.encoder(hash_epochs=0, hidden_weight=0).embed)
        yield from search_peers("exhaustive, trained embedding alone", vectors, us, self.places)

    def baselines(self):
        """Exhaustive search, flat hashes and the usual indexes, all on the encoder's embedding."""
        for gallery, places in self.galleries:
            yield from self.baselines_on(gallery, places)

    def baselines_on(self, gallery, places):
        """`baselines` on the embedding that suits one gallery."""
        encoder = self.first_encoder
        embed = partial(encoder.embed, gallery=gallery)
        vectors, us = places.apply(embed)
        yield from search_peers("exhaustive", vectors, us, places, n_lists=self.n_classes)
        train = embed(self.task.X)
        dim = train.shape[1]
        n_leaves = encoder.branching_factor**encoder.n_levels
        n_cells = min(n_leaves, len(train) // 4)
        frozen = FrozenEstimator(Embedded().fit(train))
        makers = {
            "Th": ThresholdHashEncoder(frozen),
            f"VQ, {dim} cells": VectorQuantizationHashEncoder(frozen, n_buckets=min(dim, len(train))),
            f"VQ, {n_cells} cells": VectorQuantizationHashEncoder(frozen, n_buckets=n_cells),
            "LSH": RandomHyperplaneHashEncoder(frozen),
        }
        embedded = copy.copy(places)
        embedded.parts = vectors
        for name, maker in makers.items():
            if "random_state" in maker.get_params():
                maker.set_params(random_state=self.seed)
            maker.fit(train)
            described, more_us = embedded.apply(maker.describe)
            for s in self.sparsities:
                coder, own = with_sparsity(maker, s, described)
                yield from search_codes(name, s, coder, own, us + more_us, embedded, gallery=gallery)
