"""Data of the search benchmark: made-up classes with a simulated encoder, real items with a trained one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

NOISE = {16: 0.2, 64: 0.135, 256: 0.11}


def make_data(n_items, embedding_dim, n_queries, n_classes, seed):
    """Draw items and queries as the docstring of `bench_search.py` says."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n_classes, embedding_dim)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    similarity = centres @ centres.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1)[:, :5]

    def draw(n):
        labels = rng.integers(0, n_classes, n)
        vectors = rng.standard_normal((n, embedding_dim), dtype=np.float32)
        vectors *= NOISE[embedding_dim]
        vectors += centres[labels]
        wrong = rng.random(n) < 0.05
        coded_as = np.where(wrong, nearest[labels, rng.integers(0, nearest.shape[1], n)], labels)
        return vectors, labels, coded_as

    vectors, labels, coded_as = draw(n_items)
    queries, query_labels, query_coded_as = draw(n_queries)
    return {
        "vectors": vectors, "labels": labels, "coded_as": coded_as, "n_classes": n_classes,
        "queries": queries, "query_labels": query_labels, "query_coded_as": query_coded_as,
    }  # fmt: skip


def simulate_encoder(data, sparsity, seed):
    """Give the made-up items and queries codes and scores, as the docstring of `bench_search.py` says."""
    rng = np.random.default_rng([seed, sparsity])
    n_classes = data["n_classes"]
    factor = int(np.ceil(np.sqrt(n_classes * sparsity)))
    factor += -factor % sparsity
    slots = rng.permutation(factor * (factor // sparsity))[:n_classes]
    first = slots // (factor // sparsity) * factor + slots % (factor // sparsity) * sparsity
    class_codes = first[:, None] + np.arange(sparsity)

    def code(coded_as):
        codes = class_codes[coded_as]
        if sparsity > 1:
            n = len(codes)
            other = codes[:, -1] // factor * factor + rng.integers(0, factor, n)
            flipped = (rng.random(n) < 0.15) & (codes != other[:, None]).all(axis=1)
            codes[flipped, -1] = other[flipped]
        return codes

    def score(codes):
        scores = rng.random((len(codes), 2, factor), dtype=np.float32)
        rows = np.arange(len(codes))
        scores[rows, 0, codes[:, 0] // factor] += 1
        scores[rows[:, None], 1, codes % factor] += 1
        return scores

    def describe_items(size=16_384):
        for start in range(0, len(codes), size):
            block = slice(start, start + size)
            yield data["vectors"][block], score(codes[block]), codes[block]

    codes, query_codes = code(data["coded_as"]), code(data["query_coded_as"])
    return {
        "codes": codes, "query_codes": query_codes, "scores": score(query_codes), "factor": factor,
        "describe_items": describe_items,
    }  # fmt: skip


def encode_data(encoder, items, labels, queries, query_labels, cache):
    """Train an encoder on the items and describe items and queries, or read that from the file `cache`."""
    if cache.is_file():
        with np.load(cache) as kept:
            return {name: kept[name] for name in kept.files} | {"factor": int(kept["factor"])}
    encoder.fit(items, labels)
    vectors, _, codes = encoder.describe(items)
    query_vectors, scores, query_codes = encoder.describe(queries)
    data = {
        "vectors": vectors, "labels": labels, "codes": codes,
        "queries": query_vectors, "query_labels": query_labels,
        "query_codes": query_codes, "scores": scores, "factor": encoder.branching_factor,
    }  # fmt: skip
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed, so that a run that is stopped leaves no half of it.
    part = cache.with_name(cache.stem + ".part.npz")
    np.savez(part, **data)
    part.replace(cache)
    return data


def glyph_data(path: Path, cache: Path):
    """Glyphs of font families that training never saw, searched for among the training items."""
    from hqsearch import HierarchicalHashEncoder

    with np.load(path) as glyphs:
        images, labels, is_test = glyphs["X"][:, None], glyphs["y"], glyphs["is_test"]
    encoder = HierarchicalHashEncoder(
        loss="npairs", network="conv", metric_epochs=8, hash_epochs=8, random_state=0
    )
    return encode_data(
        encoder, images[~is_test], labels[~is_test], images[is_test], labels[is_test],
        cache / "glyph100_conv_8_8_seed0.npz",
    )  # fmt: skip


def digits_data(seed: int, cache: Path):
    """scikit-learn's digits, 70 % to train on and to search, 30 % as queries."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    from hqsearch import HierarchicalHashEncoder

    images, labels = load_digits(return_X_y=True)
    items, queries, item_labels, query_labels = train_test_split(
        images, labels, test_size=0.3, stratify=labels, random_state=seed
    )
    encoder = HierarchicalHashEncoder(loss="npairs", random_state=seed)
    return encode_data(
        encoder, items, item_labels, queries, query_labels, cache / f"digits_default_seed{seed}.npz"
    )
