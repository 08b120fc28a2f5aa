"""The papers' published settings, and others, as parameters of `HierarchicalHashEncoder`.

Not as published: rates warm up and follow a cosine, where the papers' fall to 0.3 every 50,000 steps; images
are standardised channel by channel, without crops or a mean image.
"""

from __future__ import annotations

import json

COMMON = {
    "network": "nin",
    "classes_per_batch": 64,
    "batch_size": 128,
    "metric_epochs": 300,
    "hash_epochs": 300,
    "learning_rate": 3e-3,
    "hash_learning_rate": 1e-3,
    "trunk_learning_rate_ratio": 0.1,
    "sibling_penalty": 100.0,
    "code_assignment": "batch",
}
NPAIRS = {**COMMON, "loss": "npairs", "embedding_dim": 64, "regularization": 0.003}
TRIPLET = {**COMMON, "loss": "triplet", "embedding_dim": 256, "margin": 0.3, "orthogonality_penalty": 1.0}
# What the papers set for each sparsity.
BY_SPARSITY_NPAIRS = {
    1: {"hash_regularization": 0.03, "orthogonality_penalty": 0.07},
    2: {"hash_regularization": 0.01, "orthogonality_penalty": 0.1},
    3: {"hash_regularization": 0.003, "orthogonality_penalty": 0.1},
    4: {"hash_regularization": 0.001, "orthogonality_penalty": 0.1},
}
BY_SPARSITY_TRIPLET = {s: {"hash_margin": 0.3 if s == 2 else 0.5} for s in (1, 2, 3, 4)}

# name -> (parameters, parameters by sparsity)
PRESETS = {
    "default": ({}, {}),
    "cvpr19-cifar100-npairs": ({**NPAIRS, "n_levels": 2, "branching_factor": 32}, BY_SPARSITY_NPAIRS),
    "cvpr19-cifar100-triplet": ({**TRIPLET, "n_levels": 2, "branching_factor": 64}, BY_SPARSITY_TRIPLET),
    "icml18-cifar100-npairs": ({**NPAIRS, "n_levels": 1, "branching_factor": 64}, {}),
    "icml18-imagenet32-npairs": ({**NPAIRS, "n_levels": 1, "branching_factor": 512}, {}),
    # One network for a query, and a hash stage of seconds.
    "frozen-trunk": ({"shared_trunk": "frozen"}, {}),
    # Epochs, nothing else.
    "thirty-epochs": ({"metric_epochs": 30, "hash_epochs": 30}, {}),
}


def value_of(text):
    """Read a --set value: a number, a list, null, or a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
