"""``directclr-fast spectrum``, ``toy``, ``compare`` and ``demo``: their flags and what they do.

What loads torch is imported by the bodies, so that a help text stays light.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ..train import commands as train
from ..train.config import TrainConfig, resolve_device


def add_spectrum(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", nargs="*", help="runs, files of features or of weights: in one figure")
    train.add_source(parser)
    add(
        "--threshold",
        type=float,
        help="collapsed up to this share of the largest eigenvalue (default 1e-8, or what the "
        "rounding of the features leaves)",
    )
    add("--out", help="folder (default: that of the first source)")


def run_spectrum(arguments: argparse.Namespace) -> None:
    from ..train.checkpoint import write_json
    from . import spectrum

    spectrum.check(arguments.threshold)
    if not arguments.source and arguments.encoder is None:
        raise ValueError("source: expected runs, files, or --encoder, got none")
    sources = arguments.source or [None]
    picture, numbers = train.outputs_of(arguments, "spectrum.png", "spectrum.json")
    reports, titles = {}, []
    for source in sources:
        spectra, title = _spectra_of(source, arguments)
        titles.append(title)
        start = f"{title}, " if len(sources) > 1 else ""
        reports |= {_unlike(f"{start}{name}", reports): values for name, values in spectra.items()}
    write_json(numbers, {name: asdict(report) for name, report in reports.items()}, indent=1)
    spectrum.plot(reports, picture, titles[0] if len(titles) == 1 else "")
    print(*(f"{name}: {report}" for name, report in reports.items()), sep="\n")
    print(f"written to {numbers} and {picture}")


def _unlike(name: str, others) -> str:
    """``name``, with a number behind it where it is taken."""
    names = [name, *(f"{name} ({k})" for k in range(2, len(others) + 3))]
    return next(n for n in names if n not in others)


def _spectra_of(source: str | None, arguments) -> tuple[dict, str]:
    """Spectra by name of a run or of a file, and what to call it; None is the encoder alone."""
    from ..train import foreign, probe
    from . import spectrum

    threshold = arguments.threshold
    run = source is not None and foreign.is_run(source)
    arrays = source is not None and Path(source).suffix in (".npy", ".npz")
    if not run and (arrays or arguments.encoder is None):
        parts = foreign.features_in(source, arguments.key, arguments.trust_pickle)
        names = ["features"] if len(parts) == 1 else [f"features, {part}" for part in parts]
        reports = [
            spectrum.collapse_report(p.features, threshold=threshold) for p in parts.values()
        ]
        return dict(zip(names, reports)), Path(source).name
    device = resolve_device(arguments.device)
    if not run:
        config, encoder = train.load_foreign(arguments, source, device)
        features, *_ = probe.load_part(encoder, config, False)
        report = spectrum.collapse_report(features, threshold=threshold)
        name = arguments.encoder if source is None else Path(source).name
        return {"representation": report}, f"{name} on {config.data}"
    config, model, state = train.load_run(arguments, source, device)
    features, *_ = probe.load_part(model.encoder, config, False, channels=state["channels"])
    spectra = spectrum.of_model(model, features, threshold)
    alone = len(arguments.source) == 1
    return spectra, f"{config.mode} on {config.data}" if alone else config.name


def add_toy(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("task", help="augmentation, regularization, depth, alignment")
    add("--out", default="runs/toy", help="folder of toy-TASK.png and .json")
    add("--loss", default="both", help="released, paper (Eq. 2), both (default)")
    add("--seeds", type=int, default=5, help="runs 0 to N - 1, default 5")
    add("--steps", type=int, default=10_000, help="of SGD, default 10000")


def run_toy(arguments: argparse.Namespace) -> None:
    from . import toy

    settings = {key: getattr(arguments, key) for key in ("out", "loss", "seeds", "steps")}
    results = toy.run(arguments.task, **settings)
    print("\n".join(toy.lines(results)))
    print(f"{results['seconds']:.0f} s; toy-{results['task']}.json, .png in {arguments.out}")


def add_compare(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", help="folder of report.md and all runs; default runs/compare")
    add("--modes", help="comma-separated, default all")
    add("--seeds", type=int, help="of each mode, default 3 (fashion-mnist: 5)")
    add(
        "--dims",
        type=int,
        nargs="*",
        help="d0 beside the default one; default a quarter to 4 times",
    )
    train.add_settings(
        parser, "data", "data_root", "download", "encoder", "image_size", "batch_size",
        "learning_rate", "epochs", "temperature", "device",
        data="default: cifar10 where it is there, otherwise patches",
        encoder="default: the budget of the set, as for the next four",
        learning_rate="the middle of the three searched",
    )  # fmt: skip
    add("--jobs", type=int, help="runs side by side, default one for each core")
    add("--quick", action="store_true", help="directclr and baseline, one epoch: a first look")


def run_compare(arguments: argparse.Namespace) -> None:
    from . import compare, report

    settings = train.settings_of(arguments)
    plan = compare.plan(
        data_spec=settings.pop("data", None),
        modes=None if arguments.modes is None else arguments.modes.split(","),
        seeds=arguments.seeds,
        dims=arguments.dims,
        quick=arguments.quick,
        **settings,
    )
    out = arguments.out or ("runs/compare-quick" if arguments.quick else "runs/compare")
    numbers = compare.run(out, plan, jobs=arguments.jobs)
    print(report.table(numbers))
    print(f"written to {Path(out) / 'report.md'} and {Path(out) / 'results.json'}")


def add_demo(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", default="runs/demo", help="folder, an older demo is overwritten")
    add("--epochs", type=int, default=None)
    add("--seed", type=int, default=0)


def run_demo(arguments: argparse.Namespace) -> None:
    from .. import plots
    from ..train import checkpoint, probe
    from ..train.loop import Trainer
    from . import spectrum

    out = Path(arguments.out)
    config = TrainConfig(
        data="digits",
        checkpoint_dir=str(out.parent),
        name=out.name,
        seed=arguments.seed,
        epochs=arguments.epochs,
    )
    trainer = Trainer(config, overwrite=True)
    config = trainer.config
    result = trainer.run()
    model = trainer.model.eval()

    state = {"channels": trainer.channels, "classes": trainer.classes}
    encoders = {"trained encoder": model.encoder} | train.baselines(config, state, config.device)
    features = {name: probe.load_features(each, config) for name, each in encoders.items()}
    accuracy = {name: probe.scores(part, device=config.device) for name, part in features.items()}
    spectra = spectrum.of_model(model, features["trained encoder"].test)

    metrics = {
        "accuracy": accuracy,
        "spectra": {name: asdict(report) for name, report in spectra.items()},
        "images_per_second": result["images_per_second"],
        "loss_backend": result["backend"],
        "final_loss": result["loss"],
        "steps": result["step"],
    }
    checkpoint.write_json(out / "metrics.json", metrics, indent=2)
    title = f"{config.mode}, dim {model.objective.dim} of {model.width}, {config.data}"
    spectrum.plot(spectra, out / "spectrum.png", title)
    plots.curves(out / "log.jsonl", out / "curves.png", title)

    print(f"\n{'held-out accuracy':<20}{'linear probe':>14}{'kNN (k=200)':>14}")
    for name, values in accuracy.items():
        print(f"{name:<20}{100 * values['linear']:>12.1f} %{100 * values['knn']:>12.1f} %")
    print(*(f"\n{name}: {report}" for name, report in spectra.items()), sep="")
    print(
        f"{result['images_per_second']:.0f} images per second, loss backend {result['backend']}\n"
        f"config.json, log.jsonl, checkpoint.pt, metrics.json, curves.png, spectrum.png in {out}"
    )
