"""``directclr-fast train`` and ``probe``: their flags and what they do.

What loads torch is imported by the bodies, so that a help text and the process that restarts a run
stay light.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from .config import TrainConfig, resolve_device

_SEEN = ("data", "data_root", "workers", "skip_unreadable")  # settings of the images


def add_settings(parser: argparse.ArgumentParser, *names: str, **helps: str) -> None:
    """Flags for these settings of TrainConfig, all without ``names``; None where not given.

    They are named as in the released trainer where it has them. ``helps``: other words on some.
    """
    fields = TrainConfig.__dataclass_fields__
    for field in (fields[name] for name in names or fields):
        kind = {"int": int, "float": float}.get(field.type.partition(" ")[0])
        how = {"type": kind} if kind else {}
        if field.type == "bool":
            on = field.metadata["default"]
            how = {"action": argparse.BooleanOptionalAction if on else "store_true"}
        how["help"] = helps.get(field.name, field.metadata["help"])
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=None, **how)


def settings_of(arguments: argparse.Namespace) -> dict:
    """The settings of TrainConfig that were given, by name."""
    names = TrainConfig.__dataclass_fields__
    return {k: v for k, v in vars(arguments).items() if k in names and v is not None}


def add_train(parser: argparse.ArgumentParser) -> None:
    add_settings(parser)
    restarts = "resume by itself after a crash, this often (default 0)"
    parser.add_argument("--max-restarts", type=int, help=restarts)
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="continue from the run's checkpoint, if it has one"
    )
    start.add_argument("--overwrite", action="store_true", help="start anew where a checkpoint is")


def run_train(arguments: argparse.Namespace, on_step=None) -> None:
    from . import job, ranks, supervise
    from .loop import Trainer, TrainingDiverged

    start = {"resume": arguments.resume, "overwrite": arguments.overwrite}
    job.place()  # or what is wrong with it
    config = TrainConfig(**settings_of(arguments))
    with ranks.launched(config.checked("timeout")):
        trainer = Trainer(config, **start)
        try:
            result = trainer.run(on_step)
        except (OSError, RuntimeError) as error:  # of the machine, not of the settings
            if not isinstance(error, TrainingDiverged):
                error.exit_code = supervise.FAILED
            raise
    if trainer.ranks.rank == 0:
        backend = result["backend"] or "not needed"  # a finished run that is resumed takes no step
        print(f"done: step {result['step']}, loss backend {backend}, {result['folder']}")


def add_source(parser: argparse.ArgumentParser) -> None:
    """The flags of ``probe`` and ``spectrum`` for what they look at."""
    add_settings(
        parser, *_SEEN, "image_size", "device", data="another set than the one trained on",
        image_size="what a network of --encoder sees, pixels (default: as the data's recipe)",
    )  # fmt: skip
    add = parser.add_argument
    add(
        "--encoder",
        metavar="NAME",
        help="network of torchvision or timm whose weights the source has; or MODULE:FUNCTION, "
        "which returns one",
    )
    add("--key", help="name of the features in a file that holds more than one matrix")
    add(
        "--trust-pickle",
        action="store_true",
        help="open files that run code of whoever made them; only for files you trust",
    )


def load_foreign(arguments: argparse.Namespace, source: str | None, device: str):
    """(settings of the images, the network) of ``--encoder``; says where its weights are from."""
    from . import foreign

    if arguments.data is None:
        raise ValueError("data: expected a set for the encoder to see, got none; give --data")
    config = TrainConfig(**_seen(arguments, device), image_size=arguments.image_size).resolve()
    encoder = foreign.load_encoder(arguments.encoder, source, arguments.trust_pickle).to(device)
    encoder.check(config.images(False).shape[0], config.image_size)
    print(encoder.said)
    return config, encoder.eval()


def load_run(arguments: argparse.Namespace, source: str, device: str):
    """As :func:`.loop.load_model`, the settings of the images being those of the flags."""
    from .loop import load_model

    config, model, state = load_model(source, device)
    return dataclasses.replace(config, **_seen(arguments, device)), model, state


def _seen(arguments: argparse.Namespace, device: str) -> dict:
    """The settings of TrainConfig that the flags have for the images."""
    given = {name: getattr(arguments, name) for name in _SEEN}
    return {k: v for k, v in given.items() if v is not None} | {"device": device}


def add_probe(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", nargs="?", help="a run; or a file of features and labels, or of weights")
    add_source(parser)
    add("--labels", help="file of the labels, where that of the features has none")
    add("--test", help="file of features to test on (default: the last fifth of each class)")
    add("--test-labels", help="file of their labels, where that one has none")
    add("--schedule", choices=("constant", "cosine", "both"), default="both")
    add("--epochs", type=int, default=100)
    add("--learning-rate", type=float, default=0.1)
    add("--raw-features", action="store_true", help="do not centre and scale the features")
    add("--k", type=int, default=200, help="neighbours (default 200)")
    add("--temperature", type=float, default=0.07, help="of the kNN vote: 0.07, 0.1")
    add("--dim", type=int, help="also probe the first DIM columns of r")
    add("--baselines", action="store_true", help="also untrained encoder and pixels")
    add("--out", help="folder (default: that of the source)")


def run_probe(arguments: argparse.Namespace) -> None:
    from . import checkpoint, probe

    linear = {"epochs": arguments.epochs, "learning_rate": arguments.learning_rate}
    vote = {"k": arguments.k, "temperature": arguments.temperature}
    probe.check(**linear, **vote)
    device = resolve_device(arguments.device)
    rows, sub_vector, about = _subject(arguments, device)
    (out,) = outputs_of(arguments, "probe.json")
    schedules = probe.SCHEDULES if arguments.schedule == "both" else (arguments.schedule,)
    how = {**linear, "scaled": not arguments.raw_features, "device": device}
    result = {
        **about,
        **linear,
        **vote,
        "features": "raw" if arguments.raw_features else "centred, divided by their rms",
        "accuracy": {},
    }
    for name, make in rows.items():
        features = make()
        parts = {name: features}
        if name != "raw pixels" and arguments.dim is not None:
            parts[f"{name}, r[:, :{arguments.dim}]"] = features.columns(slice(0, arguments.dim))
        if name == "trained" and sub_vector is not None:
            parts["trained, sub-vector"] = features.columns(sub_vector)
        for part, values in parts.items():
            row = {f"linear, {s} rate": probe.linear_probe(values, s, **how) for s in schedules}
            row["knn"] = probe.knn(values, device=device, **vote)
            result["accuracy"][part] = row
            print(f"{part}: " + ", ".join(f"{k} {100 * v:.2f} %" for k, v in row.items()))
    checkpoint.write_json(out, result, indent=2)
    print(f"written to {out}")


def _subject(
    arguments: argparse.Namespace, device: str
) -> tuple[dict[str, Callable], slice | None, dict]:
    """What is probed: functions that make the probe.Features of each row, by its name; the columns
    of the first row that have one of their own; what to say of it in the file."""
    from . import foreign, probe

    if arguments.source is None and arguments.encoder is None:
        raise ValueError("source: expected a run, a file, or --encoder, got none")
    about = {"checkpoint": str(arguments.source)}
    columns = None
    if arguments.encoder is None and not foreign.is_run(arguments.source):
        return _subject_of_features(arguments)
    for name in ("labels", "test", "test_labels"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{name}: expected a file of features with it, got a network")
    if arguments.encoder is not None:
        config, encoder = load_foreign(arguments, arguments.source, device)
        channels, width = None, encoder.width
        networks = {"encoder": encoder}
        if arguments.baselines:
            fresh = foreign.load_encoder(arguments.encoder).to(device).eval()
            networks |= {"untrained encoder": fresh, "raw pixels": None}
        about |= {"encoder": encoder.said}
    else:
        config, model, state = load_run(arguments, arguments.source, device)
        channels, width = state["channels"], model.width
        networks = {"trained": model.encoder}
        if arguments.baselines:
            networks |= baselines(config, state, device)
        about |= {"step": state["step"]}
        columns = None if model.objective.dim is None else model.objective.sub_vector
    _check_dim(arguments, width, "the encoder's width")

    rows = {
        name: functools.partial(probe.load_features, network, config, channels)
        for name, network in networks.items()
    }
    return rows, columns, about | {"data": config.data}


def _subject_of_features(arguments: argparse.Namespace) -> tuple:
    from . import foreign

    if arguments.baselines:
        raise ValueError("baselines: expected a network, got a file of features")
    files = (arguments.source, arguments.labels, arguments.test, arguments.test_labels)
    split, tested = foreign.probe_features(*files, key=arguments.key, trust=arguments.trust_pickle)
    _check_dim(arguments, split.train.shape[1], "the features' width")
    about = {"data": arguments.source, "tested on": tested, "classes": split.classes}
    print(f"{split.classes} classes, {len(split.train)} features to train on, tested on {tested}")
    return {"features": lambda: split}, None, about


def _check_dim(arguments: argparse.Namespace, width: int, what: str) -> None:
    if arguments.dim is not None and not 0 < arguments.dim <= width:
        raise ValueError(f"dim: expected 1 to {width} ({what}), got {arguments.dim}")


def baselines(config, state: dict, device: str) -> dict:
    """The encoder with the weights the run started from, and None for raw pixels."""
    from .loop import Model

    untrained = Model(config, state["channels"], state["classes"]).encoder
    return {"untrained encoder": untrained.eval().to(device), "raw pixels": None}


def outputs_of(arguments: argparse.Namespace, *names: str) -> list[Path]:
    """Where these files go: asked before anything long is done, as it may be no place to write to.
    Beside one file that is no run they bear its name, too."""
    from . import foreign
    from .checkpoint import writable

    sources = [arguments.source] if isinstance(arguments.source, str) else arguments.source or []
    first = Path(sources[0] if sources else ".")
    folder = writable("out", arguments.out or (first if first.is_dir() else first.parent))
    named = len(sources) == 1 and not arguments.out and not foreign.is_run(first)
    return [folder / (f"{first.stem}-{name}" if named else name) for name in names]
