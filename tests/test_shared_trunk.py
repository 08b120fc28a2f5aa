"""One trunk for embedding and level scores: trained for both or frozen, run once, saved once."""

import copy
import pickle

import numpy as np
import pytest
import torch

from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.embedding import EmbeddingModel
from hqsearch.embedding import model as model_module
from hqsearch.embedding.losses import class_cross_entropy, npairs_loss, semihard_triplet_loss
from hqsearch.embedding.networks import joined_heads, new_head, parted_heads
from hqsearch.embedding.proxies import ProxyHashStage
from hqsearch.embedding.settling import SettledHashStage
from hqsearch.embedding.training import HashStage
from hqsearch.metrics import bucket_nmi
from hqsearch.search import LeafTable

LOSSES = ["npairs", "triplet", "proxy"]


def make(**parameters):
    defaults = {"metric_epochs": 2, "hash_epochs": 2, "branching_factor": 8, "embedding_dim": 16}
    defaults |= {"learning_rate": 1e-3, "hash_learning_rate": 1e-3}
    return HierarchicalHashEncoder(**{**defaults, "shared_trunk": True, "random_state": 0, **parameters})


@pytest.fixture(scope="module", params=[(loss, shared) for loss in LOSSES for shared in (True, "frozen")])
def fitted(request, digits):
    loss, shared_trunk = request.param
    return make(loss=loss, shared_trunk=shared_trunk).fit(digits[0], digits[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_frozen_trunk_is_the_metric_stages_and_does_not_run_in_the_hash_stage(digits, monkeypatch, loss):
    X, y, X_query, _ = digits
    seen = []
    fit_hash = EmbeddingModel.fit_hash

    def watch(model, *arguments, **parameters):
        trunk = model.metric_network.trunk
        handle = trunk.register_forward_hook(lambda _, __, hidden: seen.append(len(hidden)))
        before = copy.deepcopy(trunk.state_dict())
        history = fit_hash(model, *arguments, **parameters)
        handle.remove()
        for name, value in trunk.state_dict().items():
            assert torch.equal(value, before[name])
        return history

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingModel, "fit_hash", watch)
        frozen = make(loss=loss, shared_trunk="frozen", hash_epochs=5).fit(X, y)
    assert seen == []
    apart = make(loss=loss, shared_trunk=False, hash_epochs=5).fit(X, y)
    np.testing.assert_array_equal(frozen.embed(X_query), apart.embed(X_query))
    assert frozen._model.hash_network.trunk is frozen._model.metric_network.trunk


@pytest.mark.parametrize("loss", LOSSES)
def test_the_layer_above_a_frozen_trunk_is_trained_on_the_hidden_layer(digits, monkeypatch, loss):
    X, y, *_ = digits
    trained_on = []
    data = model_module.TrainingData

    def watch(items, *arguments):
        trained_on.append(items)
        return data(items, *arguments)

    monkeypatch.setattr(model_module, "TrainingData", watch)
    encoder = make(loss=loss, shared_trunk="frozen").fit(X, y)
    (items,) = trained_on
    network = encoder._model.hash_network
    with torch.no_grad():
        torch.testing.assert_close(items, network.hidden(torch.from_numpy(X)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_layer_above_a_frozen_trunk_learns_codes(digits, loss):
    X, y, X_query, y_query = digits
    untrained, trained = (
        make(loss=loss, shared_trunk="frozen", hash_epochs=epochs, metric_epochs=5).fit(X, y)
        for epochs in (1, 20)
    )
    losses = [record["loss"] for record in trained.history_[5:]]
    assert losses[-1] < 0.8 * losses[0]
    nmi = [bucket_nmi(encoder.encode(X_query), y_query) for encoder in (untrained, trained)]
    assert nmi[1] > max(0.75, nmi[0])


def test_heads_joined_and_parted_are_the_same():
    generator = torch.Generator().manual_seed(0)
    first, second = new_head(5, 3, generator), new_head(5, 4, generator)
    x = torch.rand(2, 5)
    joined = joined_heads(first, second)
    torch.testing.assert_close(joined(x), torch.cat([first(x), second(x)], 1))
    for part, whole in zip(parted_heads(joined, 3), (first, second), strict=True):
        assert torch.equal(part.weight, whole.weight)
        assert torch.equal(part.bias, whole.bias)


def test_one_pass_gives_both_and_the_same_as_one_by_one(fitted, digits):
    X = digits[2]
    calls = []
    trunk = fitted._model.metric_network.trunk
    handle = trunk.register_forward_hook(lambda *_: calls.append(1))
    embedding, scores, codes = fitted.describe(X)
    handle.remove()
    assert fitted._model.hash_network.trunk is trunk
    assert len(calls) == 1
    np.testing.assert_array_equal(embedding, fitted.embed(X))
    np.testing.assert_array_equal(scores, fitted.level_scores(X))
    np.testing.assert_array_equal(codes, fitted.encode(X))
    if fitted.loss != "npairs":
        np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("code_assignment", ["batch", "settled"])
def test_the_hash_stage_goes_on_training_the_embedding(digits, monkeypatch, loss, code_assignment):
    X, y, *_ = digits
    parameters = {
        "loss": loss,
        "code_assignment": code_assignment,
        "validation_fraction": 0,
        "hash_epochs": 6,
    }
    trained = make(**parameters).fit(X, y)
    alone = make(**parameters, shared_trunk=False).fit(X, y)
    # Its own loss is what does it, not that of the codes on the trunk below.
    monkeypatch.setattr(HashStage, "_metric_loss", lambda stage, embedding, *_: embedding.sum() * 0)
    monkeypatch.setattr(ProxyHashStage, "_metric_loss", lambda stage, embedding, *_: embedding.sum() * 0)
    along = make(**parameters).fit(X, y)
    for other in (along, alone):
        assert closeness(trained, X, y) > 1.15 * closeness(other, X, y)


def test_proxies_that_are_trained_along_start_at_the_class_means(digits, monkeypatch):
    X, y, *_ = digits
    seen = {}
    start = ProxyHashStage._start_classes

    def watch(stage, outputs):
        start(stage, outputs)
        seen["proxies"], seen["hidden"] = stage._proxies.detach().clone(), stage.network.hidden(stage.data.X)
        seen["network"] = copy.deepcopy(stage.network)

    monkeypatch.setattr(ProxyHashStage, "_start_classes", watch)
    make(loss="proxy", hash_epochs=1, validation_fraction=0).fit(X, y)
    means = torch.stack([seen["hidden"][y == label].mean(0) for label in range(10)])
    expected = torch.nn.functional.normalize(seen["network"].head(means)[:, :16], dim=-1) * 4
    torch.testing.assert_close(seen["proxies"], expected.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_codes_that_settle_leave_the_embeddings_rows_of_the_head_alone(digits, monkeypatch, loss):
    X, y, *_ = digits
    heads = []
    start = SettledHashStage._start_head

    def watch(stage, *arguments):
        for step in (lambda: None, lambda: start(stage, *arguments)):
            step()
            heads.append(stage.network.head.weight.detach().clone())

    monkeypatch.setattr(SettledHashStage, "_start_head", watch)
    make(loss=loss, code_assignment="settled", hash_epochs=1, validation_fraction=0).fit(X, y)
    before, after = heads
    assert torch.equal(before[:16], after[:16])
    # Every row of the level scores starts anew.
    assert (before[16:] != after[16:]).any(1).all()


@pytest.mark.parametrize("shared_trunk", [False, True])
def test_an_epoch_is_validated_by_the_embedding_it_has(digits, monkeypatch, shared_trunk):
    X, y, *_ = digits
    seen = []
    build = LeafTable.build

    def watch(vectors, *arguments, **parameters):
        seen.append(vectors.copy())
        return build(vectors, *arguments, **parameters)

    monkeypatch.setattr(LeafTable, "build", watch)
    make(shared_trunk=shared_trunk).fit(X, y)
    # Of two epochs; the calibration builds tables too.
    first, second = seen[:2]
    assert np.array_equal(first, second) != shared_trunk


def closeness(encoder, X, y):
    """How much nearer an item is to its own class: by squared distances, or for npairs by softmax."""
    embedding = encoder.embed(X)
    same = y[:, None] == y
    if encoder.loss == "npairs":
        logits = torch.from_numpy(embedding @ embedding.T)
        share = float((logits.softmax(1) * torch.from_numpy(same)).sum(1).mean())
        return share / (1 - share)
    D = np.square(embedding[:, None] - embedding[None]).sum(-1)
    return D[~same].mean() / D[same].mean()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_the_sum_of_both(blobs, monkeypatch, loss):
    """One step of the hash stage against the two losses by their definitions."""
    from hqsearch.embedding import proxies, training

    X, y = blobs
    seen = {}

    def watch(module, name):
        function = getattr(module, name)

        def call(*arguments):
            value = function(*arguments)
            # Copies: proxies move with the step.
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            seen.setdefault(name, []).append((copies, value.detach()))
            return value

        monkeypatch.setattr(module, name, call)

    watch(training, "metric_loss")
    watch(proxies, "proxy_loss")
    totals, codes = [], []
    stage = proxies.ProxyHashStage if loss == "proxy" else training.HashStage
    loss_of, code_loss_of = training.HashStage._loss, stage._code_loss

    def total(self, outputs, classes):
        totals.append((outputs.detach(), classes, loss_of(self, outputs, classes)))
        return totals[-1][-1]

    def code_loss(self, scores, classes):
        codes.append(code_loss_of(self, scores, classes))
        return codes[-1]

    monkeypatch.setattr(training.HashStage, "_loss", total)
    monkeypatch.setattr(stage, "_code_loss", code_loss)
    regularization, margin, scale = 0.5, 0.7, 3.0
    encoder = make(
        loss=loss, metric_epochs=0, hash_epochs=1, regularization=regularization, margin=margin,
        proxy_scale=scale, validation_fraction=0, batch_size=24,
    )  # fmt: skip
    encoder.fit(X, y)
    outputs, classes, value = totals[0]
    embedding = outputs[..., :16]
    name = "proxy_loss" if loss == "proxy" else "metric_loss"
    (arguments, metric) = seen[name][0]
    torch.testing.assert_close(arguments[0], embedding)
    torch.testing.assert_close(value.detach(), metric + codes[0].detach())
    labels = torch.arange(6).repeat_interleave(4)
    if loss == "npairs":
        anchors, positives = (part.flatten(0, 1) for part in embedding[0].tensor_split(2, dim=1))
        same = torch.arange(6).repeat_interleave(2)
        expected = npairs_loss(
            anchors @ positives.T, same[:, None] == same, anchors, positives, regularization
        )
    elif loss == "triplet":
        unit = torch.nn.functional.normalize(embedding[0].flatten(0, 1), dim=-1)
        expected = semihard_triplet_loss(torch.cdist(unit, unit) ** 2, labels[:, None] == labels, margin)
    else:
        # At the first step the proxies are at the class means.
        unit = torch.nn.functional.normalize(embedding, dim=-1)
        means = torch.nn.functional.normalize(arguments[1], dim=-1)
        expected = class_cross_entropy(scale * unit @ means.T, classes)[0]
    torch.testing.assert_close(metric[0], expected, rtol=1e-4, atol=1e-5)


def test_it_is_saved_once_and_loads_the_same_bits(fitted, digits, tmp_path):
    X = digits[2]
    fitted.save(tmp_path / "shared")
    loaded = HierarchicalHashEncoder.load(tmp_path / "shared")
    pickled = pickle.loads(pickle.dumps(fitted))
    for again in (loaded, pickled, copy.deepcopy(fitted)):
        assert again._model.hash_network.trunk is again._model.metric_network.trunk
        for a, b in zip(again.describe(X), fitted.describe(X), strict=True):
            np.testing.assert_array_equal(a, b)
    apart = make(loss=fitted.loss, shared_trunk=False).fit(digits[0], digits[1])
    apart.save(tmp_path / "apart")
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / name).rglob("*.safetensors"))
        for name in ("shared", "apart")
    ]
    assert sizes[0] < 0.6 * sizes[1]


def test_an_index_over_it_answers(fitted, digits):
    X, y, X_query, y_query = digits
    index = HierarchicalHashIndex(fitted, n_neighbors=3).fit(X, y)
    assert index.score(X_query, y_query) > 0.5
