"""X to embedding and level scores: trunks, losses, batches and the two training stages.

The only folder that imports torch, so nothing outside imports this door before torch is needed.
"""

from hqsearch.embedding.automatic import (
    resolve_captured,
    resolve_epochs,
    resolve_gallery,
    resolve_hash_start,
    resolve_hidden_weight,
    resolve_learning_rate,
    resolve_precision,
)
from hqsearch.embedding.batches import items_per_step, split_validation
from hqsearch.embedding.checkpoints import open_checkpoints
from hqsearch.embedding.classifier import ClassifierModel
from hqsearch.embedding.model import EmbeddingModel, resolve_device
from hqsearch.embedding.stage import StageSettings, standard_error
from hqsearch.embedding.training import CodeProblem
from hqsearch.embedding.weights import pack_model, unpack_model

__all__ = [
    "ClassifierModel",
    "CodeProblem",
    "EmbeddingModel",
    "StageSettings",
    "items_per_step",
    "open_checkpoints",
    "pack_model",
    "resolve_captured",
    "resolve_device",
    "resolve_epochs",
    "resolve_gallery",
    "resolve_hash_start",
    "resolve_hidden_weight",
    "resolve_learning_rate",
    "resolve_precision",
    "split_validation",
    "standard_error",
    "unpack_model",
]
