"""Images/s of the trainer's whole step beside its bare encoder, and the loss's share of it.

On made-up images, in turn in one process: the step with the fast loss and with loss=reference; the
encoder's two forward and backward passes alone; each loss alone; and the views. An image is one of
the batch, seen in two views.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator

import torch

from ..train.config import TrainConfig
from ..train.loop import Trainer
from . import memory, study, timing

LOSSES = ("fast", "reference")
FLAGS = {
    "--rows": {"type": int, "nargs": "+", "default": [4096]},
    "--encoder": {"default": "small"},
    "--image-size": {"type": int, "default": 8, "help": "pixels of a side"},
    "--amp": {"nargs": "+", "default": ["none"], "help": "none, bf16, fp16: taking turns"},
    "--device": {"default": "auto"},
    "--rounds": {"type": int, "default": 5},
}


def trainer(loss: str, rows: int, amp: str, arguments: argparse.Namespace, folder: str) -> Trainer:
    """A run that is never started, of one batch with all the images."""
    config = TrainConfig(
        data=f"fake:n={rows},size={arguments.image_size}", encoder=arguments.encoder,
        image_size=arguments.image_size, batch_size=rows, epochs=1000, optimizer="lars", loss=loss,
        amp=amp, device=arguments.device, checkpoint_dir=folder, name=f"{loss}-{amp}",
    )  # fmt: skip
    made = Trainer(config, progress=False)
    made.model.train()
    return made


def step(run: Trainer) -> Callable[[], tuple]:
    """A call of one whole step, the reading of its batch included."""
    batches = run.endless()
    return lambda: run.train_step(*next(batches)[:2])


def backward(run: Trainer, function: Callable, leaves: list[torch.Tensor], upstream=None):
    """A call of ``function`` of the leaves, under the run's autocast, and its backward pass."""

    def call() -> None:
        run.model.zero_grad(set_to_none=True)
        for leaf in leaves:
            leaf.grad = None
        with run.autocast():
            outputs = function(*leaves)
        torch.autograd.backward(outputs, upstream)

    return call


def calls(runs: dict[str, Trainer]) -> dict[str, Callable[[], None]]:
    """The call to time, by name."""
    run = runs["fast"]
    images, _, _ = next(iter(run.batches))
    whole, encoder = slice(0, len(images)), run.model.encoder

    def views() -> list[torch.Tensor]:
        make = run.views_of(images)
        return [make(which, whole) for which in (0, 1)]

    def encode(*both: torch.Tensor) -> list[torch.Tensor]:
        return [encoder(view) for view in both]

    seen = views()
    with torch.no_grad(), run.autocast():
        encoded = encode(*seen)
    leaves = [r.clone().requires_grad_() for r in encoded]
    upstream = [torch.randn_like(r) / len(r) for r in encoded]
    return {
        **{f"step, {loss}": step(run) for loss, run in runs.items()},
        "encoder": backward(run, encode, seen, upstream),
        "views": views,
        **{f"loss, {k}": backward(r, r.model.objective, leaves) for k, r in runs.items()},
    }


def measure(arguments: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """For each N and amp: times, images/s, the loss's share, the step against the bare encoder."""
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder, memory.limited():
            runs = {
                amp: {loss: trainer(loss, rows, amp, arguments, folder) for loss in LOSSES}
                for amp in arguments.amp
            }
            named = {(amp, k): call for amp in runs for k, call in calls(runs[amp]).items()}
            run = runs[arguments.amp[0]]["fast"]
            timed = timing.interleaved(named, arguments.rounds, device=run.device.type)
        for amp in runs:
            yield _case(
                rows, amp, {k: t for (a, k), t in timed.items() if a == amp}, run, arguments
            )


def _case(
    rows: int, amp: str, times: dict, run: Trainer, arguments: argparse.Namespace
) -> tuple[dict, str]:
    case = {"rows": rows, "amp": amp, "width": run.model.width, "dim": run.model.objective.dim}
    case |= {"device": run.device.type, "variants": times}
    lines = [
        f"N {rows}, {arguments.encoder} (R {case['width']}) on {arguments.image_size} pixels, "
        f"d {case['dim']}, amp {amp}"
    ]
    for name, row in times.items():
        shown = f"{1e3 * row['median']:.1f} ms" if "median" in row else row["failed"]
        lines.append(f"  {name:<16} {shown}")
    bare = times["encoder"]
    if "median" in bare:
        case["bare_images_per_second"] = rows / bare["median"]
    for loss in LOSSES:
        whole, alone = times[f"step, {loss}"], times[f"loss, {loss}"]
        if "median" not in whole or "median" not in bare:
            continue
        case[loss] = rates = {
            "images_per_second": rows / whole["median"],
            "of_bare_encoder": timing.ratio(bare, whole),
            "share_of_loss": timing.ratio(alone, whole),
        }
        lines.append(
            f"  with {loss}: {rates['images_per_second']:.0f} images/s, "
            f"{100 * rates['of_bare_encoder']:.0f} % of the bare encoder's "
            f"{case['bare_images_per_second']:.0f}, "
            f"loss {100 * rates['share_of_loss']:.1f} % of the step"
        )
    return case, "\n".join(lines)


study.as_script(__name__)
