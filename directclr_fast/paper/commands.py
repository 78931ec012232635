"""``directclr-fast spectrum``, ``toy``, ``compare`` and ``demo``: their flags and what they do.

What loads torch is imported by the bodies, so that a help text stays light.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_spectrum(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", help="checkpoint.pt or the folder that holds it")
    add("--data", help="another set than the one trained on")
    add("--data-root", help="folder of the torchvision sets")
    add("--threshold", type=float, default=1e-8, help="collapsed below this share of the largest")
    add("--device", default="auto")
    add("--workers", type=int, default=0)
    add("--out", help="folder (default: that of the checkpoint)")


def run_spectrum(arguments: argparse.Namespace) -> None:
    from ..train import probe
    from ..train.commands import folder_of
    from ..train.config import resolve_device
    from ..train.loop import load_model
    from . import spectrum

    spectrum.check(arguments.threshold)
    device = resolve_device(arguments.device)
    config, model, state = load_model(arguments.checkpoint, device)
    out = folder_of(arguments)
    features = probe.load_features(
        model.encoder,
        config,
        spec=arguments.data,
        root=arguments.data_root,
        channels=state["channels"],
        device=device,
        workers=arguments.workers,
    )
    spectra = spectrum.of_model(model, features.test, arguments.threshold)
    spectrum.save(spectra, out / "spectrum.json")
    spectrum.plot(spectra, out / "spectrum.png", f"{config.mode} on {config.data}")
    print("\n".join(spectrum.lines(spectra)))
    print(f"written to {out / 'spectrum.json'} and {out / 'spectrum.png'}")


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
    add("--data", help="default: cifar10 where it is there, otherwise patches")
    add("--data-root", help="folder of the torchvision sets")
    add("--download", action="store_true", help="fetch a missing torchvision set")
    add("--modes", help="comma-separated, default all")
    add("--seeds", type=int, default=3, help="of each mode, default 3")
    add("--encoder", help="default: the budget of the set, as for the next four")
    add("--image-size", type=int)
    add("--batch-size", type=int)
    add("--learning-rate", type=float, help="the middle of the three searched")
    add("--epochs", type=int)
    add("--device", default="auto")
    add("--jobs", type=int, help="runs side by side, default one for each core")
    add("--quick", action="store_true", help="20 steps, 2 seeds: a first look")


def run_compare(arguments: argparse.Namespace) -> None:
    from . import compare, report

    names = ("data_root", "encoder", "image_size", "batch_size", "learning_rate", "epochs")
    settings = {name: getattr(arguments, name) for name in (*names, "device")}
    if arguments.modes is not None:
        settings["modes"] = arguments.modes.split(",")
    plan = compare.plan(
        data_spec=arguments.data,
        seeds=arguments.seeds,
        quick=arguments.quick,
        download=arguments.download,
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
    from ..train.commands import baselines
    from ..train.config import TrainConfig
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
    device = config.device
    encoders = {"trained encoder": model.encoder} | baselines(config, state, device)
    features = {
        name: probe.load_features(encoder, config, device=device)
        for name, encoder in encoders.items()
    }
    accuracy = {name: probe.scores(part, device=device) for name, part in features.items()}
    spectra = spectrum.of_model(model, features["trained encoder"].test)

    metrics = {
        "accuracy": accuracy,
        "spectra": spectra,
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
    print()
    print("\n".join(spectrum.lines(spectra)))
    print(
        f"{result['images_per_second']:.0f} images per second, loss backend {result['backend']}\n"
        f"config.json, log.jsonl, checkpoint.pt, metrics.json, curves.png, spectrum.png in {out}"
    )
