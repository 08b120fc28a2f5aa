"""The papers' experiments: learned codes against exhaustive search and everything a sceptic would ask for.

``python benchmarks/paper.py --dataset digits --loss npairs`` trains every system over three seeds and writes
``benchmarks/results/paper-digits-npairs.{json,md,png}``. What is done is kept below ``--work``, so a run that
was cut off goes on where it was, and where only search or measuring has changed nothing is trained again.
``--validation-only`` measures on held-out training items: the only place to choose anything on.
``--smallest`` is a smoke run.

Two protocols: *closed*, the papers' one, where queries are test items of the training
classes; and *unseen*, where the first 70 % of the classes are trained on, and gallery and queries are of the
others. Each is searched test->train (the gallery is the training part) and test->test (the other queries).
SUF counts distances; every precision@k is a search of its own. Microseconds are wall-clock, networks
included, in batches.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import tempfile
import time
from pathlib import Path

import compare
import machine
import numpy as np
import paper_data
import paper_peers
import paper_report
import paper_systems
import torch
from joblib import Parallel, delayed
from paper_presets import PRESETS, value_of
from sklearn.frozen import FrozenEstimator

import hqsearch
from hqsearch import HierarchicalHashEncoder, HierarchicalHashIndex
from hqsearch.embedding import (
    items_per_step,
    resolve_device,
    resolve_epochs,
    resolve_hash_start,
    resolve_hidden_weight,
    resolve_learning_rate,
    resolve_precision,
)

RESULTS = Path(__file__).parent / "results"
# Groups that a run may be without.
OPTIONAL_GROUPS = ("codes of one level", "softmax")
PACKAGES = ("hqsearch", "numpy", "scikit-learn", "torch", "numba", "faiss-cpu", "hnswlib")


def parse_arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", choices=paper_data.NAMES, default="digits")
    parser.add_argument("--loss", choices=("npairs", "triplet", "proxy"), default="proxy")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="default")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an encoder parameter"
    )
    parser.add_argument("--epochs", type=int, nargs=2, metavar=("METRIC", "HASH"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsities", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--protocols", nargs="+", choices=paper_data.PROTOCOLS, default=paper_data.PROTOCOLS)
    parser.add_argument("--data-home", type=Path, help="folder or file of the data set")
    parser.add_argument("--limit", type=int, help="at most this many training items, stratified")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--n-jobs", type=int, default=1, help="systems trained and measured at once; microseconds suffer"
    )
    parser.add_argument(
        "--without",
        nargs="+",
        choices=OPTIONAL_GROUPS,
        default=[],
        help="systems that there is no time to train",
    )
    parser.add_argument("--validation-only", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(".paper"), help="what a later run goes on from")
    parser.add_argument(
        "--results", type=Path, help="default: benchmarks/results, for a part of a run --work"
    )
    parser.add_argument("--smallest", action="store_true", help="a smoke run of digits")
    return parser.parse_args()


def encoder_parameters(arguments):
    """Make the encoder's parameters, those by sparsity, and the control's."""
    preset, by_sparsity = PRESETS[arguments.preset]
    parameters = {"loss": arguments.loss, **preset, "device": arguments.device}
    if parameters["loss"] != arguments.loss:
        raise SystemExit(f"--preset {arguments.preset} is of --loss {parameters['loss']}")
    if arguments.epochs:
        parameters["metric_epochs"], parameters["hash_epochs"] = arguments.epochs
    given = {name: value_of(value) for name, _, value in (s.partition("=") for s in arguments.set)}
    if "loss" in given:
        raise SystemExit("the loss is set by --loss")
    if given.get("shared_trunk", False) not in (False, "frozen"):
        raise SystemExit(
            "with shared_trunk=true the embedding depends on the codes; all systems here search one"
        )
    parameters |= given
    by_sparsity = {s: {k: v for k, v in more.items() if k not in given} for s, more in by_sparsity.items()}
    shared = ("network", "classes_per_batch", "batch_size", "device", "validation_fraction")
    control = {name: parameters[name] for name in shared if name in parameters}
    return parameters, by_sparsity, control


def what_auto_is(encoder, input_shape):
    """Say what an encoder's parameters that are "auto" stand for here, for items of this shape."""
    network = encoder["network"]
    device = resolve_device(encoder["device"])
    return {
        "device": device.type,
        "precision": resolve_precision(encoder["precision"], network, input_shape, device),
        **{
            name: resolve_learning_rate(encoder[name], network)
            for name in ("learning_rate", "hash_learning_rate")
        },
        "hidden_weight": resolve_hidden_weight(encoder["hidden_weight"], encoder["loss"]),
    }


def device_name(device):
    """Name of the device that networks run on."""
    resolved = resolve_device(device)
    return torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else resolved.type


def epochs_of(encoder, y):
    """Epochs of both stages on items of these labels, and of the control: as many as our longest network's.

    "auto" may be one epoch off: how many items are held out is drawn class by class.
    """
    n_train = round(len(y) * (1 - encoder["validation_fraction"]))
    batch = (encoder[name] for name in ("classes_per_batch", "batch_size", "class_groups_per_step"))
    items = {"n_items": n_train, "items_per_step": items_per_step(len(set(y.tolist())), *batch)}
    metric = resolve_epochs(encoder["metric_epochs"], "metric", **items)
    new_trunk, hashing = resolve_hash_start(
        *(encoder[name] for name in ("hash_trunk", "hash_epochs")),
        loss=encoder["loss"],
        shared_trunk=bool(encoder["shared_trunk"]),
        **items,
    )
    control = max(metric, hashing) if new_trunk else metric + hashing
    return {"metric": metric, "hash": hashing, "new_trunk": new_trunk, "control": control}


def training_source():
    """Digest of the code that trains: what an earlier version of it has trained is none of ours."""
    package = Path(hqsearch.__file__).parent
    modules = (package / name for name in ("fitting.py", "codes.py"))
    folders = (path for name in ("embedding", "assignment") for path in package.glob(f"{name}/*.py"))
    return digest_of([Path(paper_data.__file__), *modules, *folders])


def measuring_source():
    """Digest of the code that searches and measures."""
    package = Path(hqsearch.__file__).parent
    folders = (path for name in ("search", "baselines") for path in package.glob(f"{name}/*.py"))
    scripts = (Path(module.__file__) for module in (paper_systems, paper_peers))
    return digest_of([*scripts, *package.glob("*.py"), *folders]) + training_source()[:8]


def digest_of(files):
    """Digest of the contents of files."""
    return digest(path.read_bytes() for path in sorted(files))


def digest(buffers):
    """Digest of buffers, one after the other."""
    found = hashlib.sha256()
    for buffer in buffers:
        found.update(buffer)
    return found.hexdigest()[:16]


def buffers_of(array):
    """Bytes that tell an array apart from any other: of another shape or dtype it is another one."""
    return f"{array.dtype.str} {array.shape}".encode(), np.ascontiguousarray(array)


class Records:
    """Finished groups of records, a JSON line each, in the folder that a later run goes on from."""

    def __init__(self, folder, settings):
        # An encoder's training does not depend on what others are trained beside it.
        training = {name: value for name, value in settings.items() if name != "sparsities"}
        self.folder = folder / digest([json.dumps(training, sort_keys=True).encode()])
        self.folder.mkdir(parents=True, exist_ok=True)
        sparsities = "-".join(str(s) for s in settings["sparsities"])
        self.path = self.folder / f"records-{sparsities}-{measuring_source()}.jsonl"
        self.groups, self.places = {}, {}
        if self.path.exists():
            whole, _, torn = self.path.read_text().rpartition("\n")
            if torn:
                # Cut off while it was written: its group is done again.
                self.path.write_text(whole + "\n" if whole else "")
            for line in whole.splitlines():
                self._keep(json.loads(line))

    def _keep(self, group):
        key = tuple(group["key"])
        self.groups[key] = group["records"]
        self.places[key] = group["place"]

    def add(self, key, records, place):
        """Keep a group, and where it was measured: machine, device, versions, how many systems at once."""
        group = {"key": key, "records": records, "place": place}
        self._keep(group)
        with self.path.open("a") as file:
            file.write(json.dumps(group) + "\n")

    def places_of(self, keys):
        """Where groups were measured: every value of each entry, as a run may go on on another machine."""
        places = [self.places[key] for key in keys]
        values = {name: list(dict.fromkeys(place[name] for place in places)) for name in places[0]}
        n_jobs = max(values.pop("n_jobs"))
        return {name: ", ".join(map(str, found)) for name, found in values.items()} | {"n_jobs": n_jobs}


FIRSTS = ("control", "encoder")
FIRST_GROUPS = ("baselines", "softmax")


def train_first(systems, name):
    """Train what several systems of a protocol and seed share, where it is not kept yet."""
    if name == "encoder":
        systems.kept_encoder("hqsearch", systems.sparsities[0])
    else:
        systems.trained_control()


def measure_group(key, systems):
    """Train and search a group of systems: its key, its records, and the seconds that took."""
    protocol, seed, name = key
    started = time.perf_counter()
    records = [{"protocol": protocol, "seed": seed, **record} for record in systems.groups()[name]()]
    return key, records, time.perf_counter() - started


def load(arguments):
    """Read (X_train, X_test, y_train, y_test), as many training items as are asked for."""
    X_train, X_test, y_train, y_test = paper_data.load(arguments.dataset, arguments.data_home)
    X_train, y_train = paper_data.limited(X_train, y_train, arguments.limit)
    return X_train, X_test, y_train, y_test


def run(arguments):
    """Train and search what is not done yet, then write the results."""
    parameters, by_sparsity, control = encoder_parameters(arguments)
    settings = {
        "dataset": arguments.dataset, "loss": arguments.loss, "preset": arguments.preset,
        "parameters": parameters,
        # With the defaults: where one has changed, nothing that is kept counts any more.
        "encoder": HierarchicalHashEncoder(**parameters).get_params(),
        "by_sparsity": by_sparsity, "control": control,
        "sparsities": arguments.sparsities, "limit": arguments.limit,
        "validation_only": arguments.validation_only,
    }  # fmt: skip
    data = load(arguments)
    # Another file, or another way to read it, is another experiment.
    settings["data"] = digest(buffer for part in data for buffer in buffers_of(part))
    tasks = {
        p: paper_data.make_task(data, p, validation_only=arguments.validation_only)
        for p in arguments.protocols
    }
    epochs = {name: epochs_of(settings["encoder"], task.y) for name, task in tasks.items()}
    settings["auto"] = what_auto_is(settings["encoder"], data[0].shape[1:])
    kept = Records(arguments.work, settings)
    # Of the protocols that this run is for.
    settings["auto"]["epochs"] = epochs
    n_classes = {name: len(set(task.gallery_y.tolist())) for name, task in tasks.items()}
    # Neither depends on the sparsities, nor the control on the loss.
    cached = {**parameters, "memory": str(arguments.work / f"metric-{training_source()}")}
    classifier = {**control, "memory": str(arguments.work / f"control-{training_source()}")}
    systems, keys = {}, []
    for seed in arguments.seeds:
        for protocol, task in tasks.items():
            given = "metric_epochs" in parameters or "hash_epochs" in parameters
            classifier["epochs"] = epochs[protocol]["control"] if given else "auto"
            encoders = kept.folder / f"encoders-{training_source()}" / f"{protocol}-{seed}"
            systems[protocol, seed] = paper_systems.Systems(
                task, seed, cached, dict(classifier), arguments.sparsities, by_sparsity, encoders
            )
            names = [name for name in systems[protocol, seed].groups() if name not in arguments.without]
            keys += [(protocol, seed, name) for name in names]
    missing = [key for key in keys if key not in kept.groups]
    if arguments.n_jobs != 1:
        # First what several systems share: each would train it for itself.
        firsts = [name for name in FIRSTS if name != "control" or "softmax" not in arguments.without]
        firsts = [(systems[key], name) for name in firsts for key in sorted({key[:2] for key in missing})]
        Parallel(arguments.n_jobs)(delayed(train_first)(*first) for first in firsts)
        # Those that take longest.
        missing.sort(key=lambda key: FIRST_GROUPS.index(key[2]) if key[2] in FIRST_GROUPS else 2)
    place = {
        **machine.describe(), "device": device_name(arguments.device), "n_jobs": arguments.n_jobs,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }  # fmt: skip
    jobs = (delayed(measure_group)(key, systems[key[:2]]) for key in missing)
    for key, records, seconds in Parallel(arguments.n_jobs, return_as="generator_unordered")(jobs):
        kept.add(key, records, place)
        print(f"{key[0]}, seed {key[1]}, {key[2]}: {seconds:.0f} s", flush=True)
    measured = kept.places_of(keys)
    versions = {name: measured.pop(name) for name in PACKAGES}
    result = {
        "settings": settings,
        "seeds": arguments.seeds,
        "n_items": {name: [len(t.y), len(t.gallery_y), len(t.query_y)] for name, t in tasks.items()},
        "n_classes": n_classes,
        "without": arguments.without,
        "machine": measured,
        "versions": versions,
        "records": [record for key in keys for record in kept.groups[key]],
    }
    stem = f"paper-{arguments.dataset}-{arguments.loss}"
    if arguments.preset != "default":
        stem += f"-{arguments.preset}"
    if arguments.validation_only:
        stem += "-validation"
    # Parts of a run and trials don't replace the recorded results.
    folder = arguments.results or (RESULTS if is_whole(arguments) else arguments.work)
    folder.mkdir(parents=True, exist_ok=True)
    paper_report.write(result, folder / stem)
    print(f"written to {folder / stem}.md")


def is_whole(arguments):
    """Tell whether this run is one to record: three seeds, all sparsities and protocols, nothing changed."""
    whole = len(arguments.seeds) >= 3 and len(arguments.sparsities) == 4 and len(arguments.protocols) == 2
    changed = ("set", "epochs", "limit", "without", "validation_only")
    return whole and not any(getattr(arguments, name) for name in changed)


def check_index(arguments, folder):
    """Refuse records of ours that `HierarchicalHashIndex` does not find with its defaults.

    In test->train: without queries an index takes its items' own level scores as those of their leaves, while
    here every query runs through the network.
    """
    result = json.loads(next(folder.glob("paper-*.json")).read_text())
    for protocol in arguments.protocols:
        task = paper_data.make_task(load(arguments), protocol, validation_only=arguments.validation_only)
        kept = next(folder.glob(f"*/encoders-*/{protocol}-0/hqsearch, 1"))
        index = HierarchicalHashIndex(FrozenEstimator(HierarchicalHashEncoder.load(kept)))
        place = task.gallery_X, task.gallery_y, task.query_X, task.query_y
        *_, p1, p16, suf = compare.measure(index.fit(task.gallery_X), *place)
        sought = protocol, "test->train", "hqsearch", 1
        (ours,) = (
            record
            for record in result["records"]
            if tuple(record[name] for name in ("protocol", "direction", "system", "s")) == sought
        )
        found = [p1 / 100, p16 / 100, suf]
        if not np.allclose(found, [ours[name] for name in ("P@1", "P@16", "SUF@1")]):
            raise SystemExit(f"Expected of an index what is recorded, {ours}, got {found}.")


def main():
    """Run from the command line."""
    arguments = parse_arguments()
    if not arguments.smallest:
        run(arguments)
        return
    arguments.dataset, arguments.seeds, arguments.sparsities = "digits", [0], [1, 2]
    arguments.epochs, arguments.limit = (2, 2), 400
    with tempfile.TemporaryDirectory() as folder:
        arguments.work, arguments.results = Path(folder), Path(folder)
        # First without what a run may be without: none of that may be trained.
        arguments.without = list(OPTIONAL_GROUPS)
        run(arguments)
        (records,) = Path(folder).glob("*/records-*.jsonl")
        trained = {json.loads(line)["key"][2] for line in records.read_text().splitlines()}
        if trained & set(OPTIONAL_GROUPS) or list(Path(folder).glob("control-*")):
            raise SystemExit(
                f"Expected no {' or '.join(OPTIONAL_GROUPS)} to be trained, got {sorted(trained)}"
            )
        arguments.without = []
        run(arguments)
        # Again, the last line torn: all other groups are there, so only that one may be trained.
        records.write_text(records.read_text()[:-20])
        started = time.perf_counter()
        run(arguments)
        print(f"resumed in {time.perf_counter() - started:.1f} s")
        check_index(arguments, Path(folder))
        print(next(Path(folder).glob("*.md")).read_text())


if __name__ == "__main__":
    main()
