"""Images/s of the trainer's whole step beside its bare encoder, and the loss's share of it.

    python -m directclr_fast.bench.trainer --rows 4096 8192 16384 --out trainer.json

On made-up images, variants in turn in one process: the step (batch, views, both encodings, loss,
head, backward, optimiser) with the fast loss and with loss=reference; the encoder's two forward
and backward passes alone, on views of the same batch; each loss alone, on representations of that
batch; and the views. An image is one of the batch, seen in two views.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch

from directclr_fast.bench import memory, timing
from directclr_fast.machine import machine
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.loop import Trainer
from directclr_fast.train.objective import Objective

LOSSES = ("fast", "reference")


def trainer(loss: str, rows: int, arguments: argparse.Namespace, folder: str) -> Trainer:
    """A run of one batch that has all the images, which is never started."""
    config = TrainConfig(
        data=f"fake:n={rows},size={arguments.image_size}",
        encoder=arguments.encoder,
        image_size=arguments.image_size,
        batch_size=rows,
        epochs=1000,
        optimizer="lars",
        loss=loss,
        amp=arguments.amp,
        device=arguments.device,
        checkpoint_dir=folder,
        name=loss,
    )
    return Trainer(config, progress=False)


def calls(rows: int, arguments: argparse.Namespace, folder: str) -> dict:
    """Name to a call of what is timed."""
    found, runs = {}, {loss: trainer(loss, rows, arguments, folder) for loss in LOSSES}
    for loss, run in runs.items():
        run.model.train()
        batches = itertools.chain.from_iterable(run.batches for _ in itertools.count())

        def step(run=run, batches=batches) -> None:
            images, labels, _ = next(batches)
            run._train_step(images, labels)

        found[f"step, {loss}"] = step
    run = runs["fast"]
    images, _, _ = next(iter(run.batches))
    make = run._views(images)
    whole = slice(0, rows)
    view1, view2 = make(0, whole), make(1, whole)
    encoder = run.model.encoder
    with torch.no_grad(), run._autocast():
        r1, r2 = encoder(view1), encoder(view2)
    upstream = [torch.randn_like(r) / rows for r in (r1, r2)]

    def bare() -> None:
        encoder.zero_grad(set_to_none=True)
        with run._autocast():
            outputs = [encoder(view1), encoder(view2)]
        torch.autograd.backward(outputs, upstream)

    def views() -> None:
        drawn = run._views(images)
        drawn(0, whole), drawn(1, whole)

    found["encoder"], found["views"] = bare, views
    config, width = run.config, run.model.width
    for loss in LOSSES:
        backend = "reference" if loss == "reference" else "auto"
        objective = Objective(
            config.mode, width, dim=config.dim, temperature=config.temperature, backend=backend
        )
        leaves = [r.detach().clone().requires_grad_() for r in (r1, r2)]

        def alone(objective=objective, leaves=leaves) -> None:
            leaves[0].grad = leaves[1].grad = None
            with run._autocast():
                value = objective(*leaves)
            value.backward()

        found[f"loss, {loss}"] = alone
    found["shape"] = (width, run.model.objective.dim, run.device.type)
    return found


def measure(rows: int, arguments: argparse.Namespace) -> dict:
    """One case: times, images/s, the loss's share, the step against the bare encoder."""
    with tempfile.TemporaryDirectory() as folder, memory.limited():
        timed = calls(rows, arguments, folder)
        width, dim, device = timed.pop("shape")
        times = timing.interleaved(timed, arguments.rounds, device=device)
    case = {"rows": rows, "width": width, "dim": dim, "device": device, "variants": times}
    bare = times["encoder"]
    for loss in LOSSES:
        step, alone = times[f"step, {loss}"], times[f"loss, {loss}"]
        if "median" not in step or "median" not in bare:
            continue
        case[loss] = {
            "images_per_second": rows / step["median"],
            "of_bare_encoder": timing.ratio(bare, step),
            "share_of_loss": timing.ratio(alone, step),
        }
    if "median" in bare:
        case["bare_images_per_second"] = rows / bare["median"]
    return case


def main(argv: list[str] | None = None) -> int:
    """Measures the sizes asked for; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[4096])
    parser.add_argument("--encoder", default="small")
    parser.add_argument("--image-size", type=int, default=8, help="pixels of a side")
    parser.add_argument("--amp", default="none", choices=("none", "bf16", "fp16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args(argv)
    results = {"machine": machine(), "command": ["directclr_fast/bench/trainer.py", *sys.argv[1:]]}
    results["settings"] = {
        key: getattr(arguments, key) for key in ("encoder", "image_size", "amp", "rounds")
    }
    results["cases"] = []
    for rows in arguments.rows:
        case = measure(rows, arguments)
        results["cases"].append(case)
        print(
            f"N {rows}, {arguments.encoder} (R {case['width']}) on {arguments.image_size} pixels, "
            f"d {case['dim']}: bare encoder {case.get('bare_images_per_second', 0):.0f} images/s"
        )
        for name, values in case["variants"].items():
            shown = f"{1e3 * values['median']:.1f} ms" if "median" in values else values["failed"]
            print(f"  {name:<16} {shown}")
        for loss in LOSSES:
            if loss in case:
                values = case[loss]
                print(
                    f"  with {loss}: {values['images_per_second']:.0f} images/s, "
                    f"{100 * values['of_bare_encoder']:.0f} % of the bare encoder's, "
                    f"loss {100 * values['share_of_loss']:.1f} % of the step",
                    flush=True,
                )
        if arguments.out:
            path = Path(arguments.out)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
