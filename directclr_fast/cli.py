"""``directclr-fast``: train, probe, spectrum, toy, compare, bench, demo and doctor."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from . import __version__
from .bench import command as timed


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; what was wrong is printed in one sentence.

    0: done. 1: training failed on the way (disk, memory, device). 2: refused, or diverged. 75:
    stopped by a signal, after saving. 130: interrupted at once.
    """
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "max_restarts", None):
        return _restarting(arguments)
    return _run(arguments)


def _run(arguments: argparse.Namespace, *more) -> int:
    from .train import supervise

    # Under torchrun what is the same on every rank is said by the first.
    rank = int(os.environ.get("RANK", "0"))

    def note(message, *_, **__) -> None:
        if rank == 0:
            print(f"note: {message}", file=sys.stderr)

    def say(text: str) -> None:
        if rank == 0:
            # Errors of torch may span lines.
            print(f"directclr-fast: {' '.join(text.split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = note
        try:
            arguments.run(arguments, *more)
            return 0
        except KeyboardInterrupt:
            say("interrupted")
            return supervise.INTERRUPTED
        except supervise.TrainingStopped as stopped:
            say(str(stopped))
            return supervise.STOPPED
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            if arguments.debug:
                raise
            code = getattr(error, "exit_code", supervise.REFUSED)
            if rank and isinstance(error, OSError | RuntimeError):  # may be of this rank alone
                print(f"directclr-fast: rank {rank}: error: {error}", file=sys.stderr)
            say(f"error: {error}")
            return code


def _restarting(arguments: argparse.Namespace) -> int:
    from .train import supervise

    expected = "at least 0" if arguments.max_restarts < 0 else None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        expected = "it given to torchrun, and --resume here"
    if expected is not None:
        problem = f"max_restarts: expected {expected}, got {arguments.max_restarts}"
        print(f"directclr-fast: error: {problem}", file=sys.stderr)
        return supervise.REFUSED
    return supervise.restarting(_run, arguments, arguments.max_restarts)


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"directclr-fast: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="directclr-fast",
        description="Fast, exact DirectCLR / InfoNCE: training, probes, spectra.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train an encoder: DirectCLR or another mode")
    _add_train_arguments(train)
    train.set_defaults(run=_train)

    probe = commands.add_parser("probe", help="linear probe and kNN accuracy of a checkpoint")
    probe.add_argument("checkpoint", help="checkpoint.pt or the folder that holds it")
    probe.add_argument("--data", help="another set than the one trained on")
    probe.add_argument("--data-root", help="folder of the torchvision sets")
    probe.add_argument("--schedule", choices=("constant", "cosine", "both"), default="both")
    probe.add_argument("--epochs", type=int, default=100)
    probe.add_argument("--learning-rate", type=float, default=0.1)
    probe.add_argument(
        "--raw-features", action="store_true", help="do not centre and scale the features"
    )
    probe.add_argument("--k", type=int, default=200, help="neighbours (default 200)")
    probe.add_argument("--temperature", type=float, default=0.07, help="of the kNN vote: 0.07, 0.1")
    probe.add_argument("--dim", type=int, help="also probe the first DIM columns of r")
    probe.add_argument("--baselines", action="store_true", help="also untrained encoder and pixels")
    probe.add_argument("--device", default="auto")
    probe.add_argument("--workers", type=int, default=0)
    probe.add_argument("--out", help="folder (default: that of the checkpoint)")
    probe.set_defaults(run=_probe)

    spectrum = commands.add_parser("spectrum", help="covariance spectra, collapsed dimensions")
    spectrum.add_argument("checkpoint", help="checkpoint.pt or the folder that holds it")
    spectrum.add_argument("--data", help="another set than the one trained on")
    spectrum.add_argument("--data-root", help="folder of the torchvision sets")
    spectrum.add_argument(
        "--threshold", type=float, default=1e-8, help="collapsed below this share of the largest"
    )
    spectrum.add_argument("--device", default="auto")
    spectrum.add_argument("--workers", type=int, default=0)
    spectrum.add_argument("--out", help="folder (default: that of the checkpoint)")
    spectrum.set_defaults(run=_spectrum)

    toy = commands.add_parser("toy", help="the paper's two mechanisms of collapse, as figures")
    toy.add_argument("task", help="augmentation, regularization, depth, alignment")
    toy.add_argument("--out", default="runs/toy", help="folder of toy-TASK.png and .json")
    toy.add_argument("--loss", default="both", help="released, paper (Eq. 2), both (default)")
    toy.add_argument("--seeds", type=int, default=5, help="runs 0 to N - 1, default 5")
    toy.add_argument("--steps", type=int, default=10_000, help="of SGD, default 10000")
    toy.set_defaults(run=_toy)

    compare = commands.add_parser("compare", help="the paper's comparison of projectors in small")
    compare.add_argument("--out", help="folder of report.md and all runs; default runs/compare")
    compare.add_argument("--data", help="default: cifar10 where it is there, otherwise patches")
    compare.add_argument("--data-root", help="folder of the torchvision sets")
    compare.add_argument("--download", action="store_true", help="fetch a missing torchvision set")
    compare.add_argument("--modes", help="comma-separated, default all")
    compare.add_argument("--seeds", type=int, default=3, help="of each mode, default 3")
    compare.add_argument("--encoder", help="default: the budget of the set, as for the next four")
    compare.add_argument("--image-size", type=int)
    compare.add_argument("--batch-size", type=int)
    compare.add_argument("--learning-rate", type=float, help="the middle of the three searched")
    compare.add_argument("--epochs", type=int)
    compare.add_argument("--device", default="auto")
    compare.add_argument("--jobs", type=int, help="runs side by side, default one for each core")
    compare.add_argument("--quick", action="store_true", help="20 steps, 2 seeds: a first look")
    compare.set_defaults(run=_compare)

    demo = commands.add_parser("demo", help="train, probe and draw on handwritten digits")
    demo.add_argument("--out", default="runs/demo", help="folder, an older demo is overwritten")
    demo.add_argument("--epochs", type=int, default=None)
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        "bench",
        help="time the loss beside its peers, on this machine",
        description=timed.DESCRIPTION,
    )
    timed.add_arguments(bench)
    bench.set_defaults(run=timed.run)

    doctor = commands.add_parser("doctor", help="versions, devices, backends and why not")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the settings in TrainConfig; names of the released trainer where it has them."""
    add = parser.add_argument
    add(
        "--data",
        help="digits, patches, cifar10, cifar100, stl10, folder:PATH, fake (default digits)",
    )
    add("--data-root", help="folder of the torchvision sets (default: data)")
    add("--download", action="store_true", default=None, help="fetch a missing torchvision set")
    add("--encoder", help="resnet18, resnet50, small")
    add("--image-size", type=int, help="side of the crops, pixels")
    add("--views", help="imagenet, small, affine")
    add(
        "--mode",
        help="baseline, directclr, single, simclr, group, diagonal, orthogonal, lowrank, random "
        "(default directclr)",
    )
    add("--dim", type=int, help="columns of r the loss reads (default 360 of 2048, in proportion)")
    add("--temperature", type=float, help="default 0.1")
    add("--negatives", help="cross or both (default cross)")
    add("--loss", help="fast or reference (default fast)")
    add("--optimizer", help="lars, sgd, adamw")
    add("--batch-size", type=int)
    add("--learning-rate", type=float, help="peak, not scaled by the batch size")
    add("--weight-decay", type=float)
    add("--epochs", type=int)
    add("--warmup-epochs", type=int)
    add("--amp", help="none, bf16, fp16 (default none)")
    add("--chunk-size", type=int, help="images encoded at a time: a batch beyond memory; exact")
    add(
        "--cache-bn",
        help="what BatchNorm normalises such a chunk by: 'chunk', its own statistics; 'two-pass', "
        "the whole batch's from an extra pass, without their gradient; 'frozen-stats', the running "
        "ones, which then stay",
    )
    add("--max-skipped", type=int, help="stop after this many steps in a row with nan (default 10)")
    add("--compile", action="store_true", default=None, help="torch.compile the encoder")
    add("--channels-last", action=argparse.BooleanOptionalAction, default=None)
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--workers", type=int, help="processes that decode a folder's images")
    add("--seed", type=int)
    add("--max-steps", type=int, help="stop early; the schedule stays that of --epochs")
    add("--save-every", type=int, help="steps between checkpoints (default: an epoch)")
    add("--log-every", type=int, help="steps between log lines (default 1)")
    add("--checkpoint-dir", help="folder of the runs (default runs)")
    add("--name", help="folder of this run (default directclr)")
    add("--max-restarts", type=int, help="resume by itself after a crash, this often (default 0)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume", action="store_true", help="continue from the run's checkpoint, if it has one"
    )
    start.add_argument("--overwrite", action="store_true", help="start anew where a checkpoint is")


def _train(arguments: argparse.Namespace, on_step=None) -> None:
    from .train import ranks, supervise
    from .train.config import TrainConfig
    from .train.loop import Trainer, TrainingDiverged

    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {k: v for k, v in vars(arguments).items() if k in names and v is not None}
    start = {"resume": arguments.resume, "overwrite": arguments.overwrite}
    with ranks.launched():
        trainer = Trainer(TrainConfig(**given), **start)
        try:
            result = trainer.run(on_step)
        except (OSError, RuntimeError) as error:  # of the machine, not of the settings
            if not isinstance(error, TrainingDiverged):
                error.exit_code = supervise.FAILED
            raise
    if trainer.ranks.rank == 0:
        backend = result["backend"] or "not needed"  # a finished run that is resumed takes no step
        print(f"done: step {result['step']}, loss backend {backend}, {result['folder']}")


def _out(arguments: argparse.Namespace) -> Path:
    """The folder to write to, asked before anything long is done."""
    from .train.checkpoint import writable

    path = Path(arguments.checkpoint)
    return writable("out", arguments.out or (path if path.is_dir() else path.parent))


def _write_json(path: Path, values: dict) -> None:
    from .train.checkpoint import replacing

    with replacing(path) as file:
        file.write(json.dumps(values, indent=2) + "\n")


def _probe(arguments: argparse.Namespace) -> None:
    from .train import probe
    from .train.config import resolve_device
    from .train.loop import load_model

    linear = {"epochs": arguments.epochs, "learning_rate": arguments.learning_rate}
    vote = {"k": arguments.k, "temperature": arguments.temperature}
    probe.check(**linear, **vote)
    device = resolve_device(arguments.device)
    config, model, state = load_model(arguments.checkpoint, device)
    if arguments.dim is not None and not 0 < arguments.dim <= model.width:
        raise ValueError(
            f"dim: expected 1 to {model.width} (the encoder's width), got {arguments.dim}"
        )
    out = _out(arguments) / "probe.json"
    rows = {"trained": model.encoder}
    if arguments.baselines:
        rows |= _baselines(config, state, device)
    schedules = probe.SCHEDULES if arguments.schedule == "both" else (arguments.schedule,)
    result = {
        "checkpoint": str(arguments.checkpoint),
        "step": state["step"],
        "data": arguments.data or config.data,
        **linear,
        **vote,
        "features": "raw" if arguments.raw_features else "centred, divided by their rms",
        "accuracy": {},
    }
    for name, encoder in rows.items():
        features = probe.load_features(
            encoder,
            config,
            spec=arguments.data,
            root=arguments.data_root,
            channels=state["channels"],
            device=device,
            workers=arguments.workers,
        )
        parts = {name: features}
        if encoder is not None and arguments.dim is not None:
            parts[f"{name}, r[:, :{arguments.dim}]"] = features.columns(slice(0, arguments.dim))
        if name == "trained" and model.objective.dim is not None:
            parts["trained, sub-vector"] = features.columns(model.objective.sub_vector)
        for part, values in parts.items():
            row = {
                f"linear, {schedule} rate": probe.linear_probe(
                    values,
                    schedule,
                    scaled=not arguments.raw_features,
                    device=device,
                    **linear,
                )
                for schedule in schedules
            }
            row["knn"] = probe.knn(values, device=device, **vote)
            result["accuracy"][part] = row
            print(f"{part}: " + ", ".join(f"{k} {100 * v:.2f} %" for k, v in row.items()))
    _write_json(out, result)
    print(f"written to {out}")


def _baselines(config, state: dict, device: str) -> dict:
    """The encoder with the weights the run started from, and None for raw pixels."""
    from .train.loop import Model

    untrained = Model(config, state["channels"], state["classes"]).encoder
    return {"untrained encoder": untrained.eval().to(device), "raw pixels": None}


def _spectrum(arguments: argparse.Namespace) -> None:
    from .paper import spectrum
    from .train import probe
    from .train.config import resolve_device
    from .train.loop import load_model

    spectrum.check(arguments.threshold)
    device = resolve_device(arguments.device)
    config, model, state = load_model(arguments.checkpoint, device)
    out = _out(arguments)
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
    _print_spectra(spectra)
    print(f"written to {out / 'spectrum.json'} and {out / 'spectrum.png'}")


def _print_spectra(spectra: dict[str, dict]) -> None:
    for name, values in spectra.items():
        samples, dimensions = values["samples"], values["dimensions"]
        few = f", {samples} images show at most {samples - 1}" if samples <= dimensions else ""
        print(
            f"{name}: {values['collapsed']} of {dimensions} dimensions collapsed "
            f"(eigenvalue at most {values['threshold']:g} of the largest{few}), "
            f"effective rank {values['effective_rank']:.1f}"
        )


def _toy(arguments: argparse.Namespace) -> None:
    from .paper import toy

    settings = {key: getattr(arguments, key) for key in ("out", "loss", "seeds", "steps")}
    found = toy.run(arguments.task, **settings)
    print("\n".join(toy.lines(found)))
    print(f"{found['seconds']:.0f} s; toy-{found['task']}.json, .png in {arguments.out}")


def _compare(arguments: argparse.Namespace) -> None:
    from .paper import compare, report

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
    found = compare.run(out, plan, jobs=arguments.jobs)
    print(report.table(found))
    print(f"written to {Path(out) / 'report.md'} and {Path(out) / 'results.json'}")


def _demo(arguments: argparse.Namespace) -> None:
    from . import plots
    from .paper import spectrum
    from .train import probe
    from .train.config import TrainConfig
    from .train.loop import Trainer

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
    rows = {"trained encoder": model.encoder} | _baselines(config, state, device)
    accuracy = {}
    features = None
    for name, encoder in rows.items():
        found = probe.load_features(encoder, config, device=device)
        features = found if features is None else features
        accuracy[name] = probe.scores(found, device=device)
    spectra = spectrum.of_model(model, features.test)

    metrics = {
        "accuracy": accuracy,
        "spectra": spectra,
        "images_per_second": result["images_per_second"],
        "loss_backend": result["backend"],
        "final_loss": result["loss"],
        "steps": result["step"],
    }
    _write_json(out / "metrics.json", metrics)
    title = f"{config.mode}, dim {model.objective.dim} of {model.width}, {config.data}"
    spectrum.plot(spectra, out / "spectrum.png", title)
    plots.curves(out / "log.jsonl", out / "curves.png", title)

    print(f"\n{'held-out accuracy':<20}{'linear probe':>14}{'kNN (k=200)':>14}")
    for name, values in accuracy.items():
        print(f"{name:<20}{100 * values['linear']:>12.1f} %{100 * values['knn']:>12.1f} %")
    print()
    _print_spectra(spectra)
    print(
        f"{result['images_per_second']:.0f} images per second, loss backend {result['backend']}\n"
        f"config.json, log.jsonl, checkpoint.pt, metrics.json, curves.png, spectrum.png in {out}"
    )


def _doctor(arguments: argparse.Namespace) -> None:
    from . import doctor

    found = doctor.report()
    print(json.dumps(found, indent=2) if arguments.json else doctor.text(found))
