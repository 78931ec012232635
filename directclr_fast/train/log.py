"""log.jsonl of a run: a header line, then lines of steps; TensorBoard, Weights & Biases beside it.

A step's values stay on the device until lines are written: reading them waits for its queue.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..machine import needs

READ_EVERY = 0.25  # seconds between reads of losses from the device
PACKAGES = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}


class Log:
    """``path`` None: written and shown nowhere, as on every rank but the first.

    ``images``: of a step, on all ranks; ``steps``: of an epoch; ``labelled``: whether an accuracy
    says anything. ``kept``: bytes of the file that belong to the last checkpoint, None for a new
    run. ``record``: the last line of a step.
    """

    def __init__(self, path: Path | None, images: int, steps: int, labelled: bool = True) -> None:
        self.path, self.images, self.steps, self.labelled = path, images, steps, labelled
        self.kept: int | None = None
        self.record: dict = {}
        self.file: IO | None = None
        self.waiting: list[tuple] = []
        self.read_at = 0.0
        self.began, self.timed = None, 0  # when the first step ended, steps since then

    @contextlib.contextmanager
    def open(self, header: Callable[[], dict]) -> Iterator[None]:
        """Opens the file where the checkpoint left it; an empty one gets ``header``'s line."""
        self.waiting, self.began, self.timed = [], None, 0  # another run of the same trainer
        with open(self.path or os.devnull, "a", encoding="utf-8") as self.file:
            if self.path is not None:
                # What was logged after the checkpoint will be logged again.
                self.file.truncate(min(self.kept or 0, self.file.tell()))
                if self.file.seek(0, os.SEEK_END) == 0:
                    self.file.write(json.dumps(header()) + "\n")
            yield

    def tick(self) -> None:
        """A step has ended. The first of this process is not timed: it warms up."""
        if self.began is None:
            self.began = time.perf_counter()
        else:
            self.timed += 1

    def add(self, step: int, rate: float, loss: Tensor, accuracy: Tensor, skipped: Tensor) -> None:
        """A line that waits: learning rate and, on the device, loss, accuracy, steps skipped."""
        self.waiting.append((step, rate, loss, accuracy, skipped))

    @property
    def due(self) -> bool:
        """Whether the last read is long enough ago."""
        return time.perf_counter() - self.read_at > READ_EVERY

    def write(self, show: Sequence[Callable[[dict], None]]) -> None:
        """Writes the lines that wait and calls each of ``show`` with them."""
        waiting, self.waiting = self.waiting, []
        if not waiting or self.path is None:
            return
        steps, rates, *values = zip(*waiting)
        # One read for all. The values are fp32 and a count; Apple's MPS has no fp64.
        losses, accuracies, skips = torch.stack([torch.stack(v).float() for v in values]).tolist()
        self.read_at = time.perf_counter()
        seconds = self.read_at - self.began
        speed = round(self.images * self.timed / seconds, 1) if self.timed else None
        for step, rate, loss, accuracy, skipped in zip(steps, rates, losses, accuracies, skips):
            self.record = {
                "step": step,
                "epoch": round(step / self.steps, 4),
                "loss": loss if math.isfinite(loss) else repr(loss),  # JSON has no nan
                "accuracy": accuracy if self.labelled else None,
                "learning_rate": rate,
                "skipped": int(skipped),
                "images_per_second": speed,
            }
            self.file.write(json.dumps(self.record) + "\n")
            self.record["loss"] = loss
            for call in show:
                call(self.record)
        self.file.flush()

    def end(self, line: dict) -> None:
        """A last line, which a run that goes on writes anew."""
        if self.path is not None:
            self.file.write(json.dumps(line) + "\n")

    def sync(self) -> int:
        """Bytes of the file, all of them on the disk: from now on ``kept``."""
        os.fsync(self.file.fileno())
        self.kept = self.file.tell()
        return self.kept


class Logger:
    """Sends lines of the log to ``name``, one of PACKAGES, or nowhere for "none".

    ImportError where the package is missing. What fails there later is said once, and the training
    goes on without it.
    """

    def __init__(self, name: str) -> None:
        self.name, self.id = name, None  # by which W&B knows a run again
        self.writer = None
        if name in PACKAGES:
            module, package = PACKAGES[name]
            with needs("logger", package, package):
                self.package = importlib.import_module(module)

    def open(self, folder: Path, settings: dict, step: int) -> None:
        """For the run in ``folder`` that goes on after ``step``; RuntimeError where it cannot."""
        try:
            if self.name == "tensorboard":
                # What an interrupted run sent after its checkpoint comes again.
                self.writer = self.package.SummaryWriter(str(folder), purge_step=step + 1)
            elif self.name == "wandb":
                about = {"project": "directclr-fast", "name": settings["name"], "config": settings}
                self.writer = self.package.init(
                    **about, dir=str(folder), id=self.id, resume="allow"
                )
                self.id = self.writer.id
        except Exception as error:  # a service's own, of any kind
            raise RuntimeError(f"logger: expected to start {self.name}, got {error}") from error

    def add(self, record: dict) -> None:
        """A line of log.jsonl, as numbers at its step."""
        values = {k: v for k, v in record.items() if k != "step" and v is not None}

        def send(writer) -> None:
            if self.name == "wandb":
                writer.log(values, step=record["step"])
            else:
                for key, value in values.items():
                    writer.add_scalar(key, value, record["step"])

        self._try(send)

    def close(self) -> None:
        self._try(lambda writer: writer.finish() if self.name == "wandb" else writer.close())

    def _try(self, call) -> None:
        if self.writer is None:
            return
        try:
            call(self.writer)
        except Exception as error:  # a service's own, of any kind
            self.writer = None
            warnings.warn(
                f"logger: {self.name} takes no more lines ({type(error).__name__}: {error}); "
                "log.jsonl goes on",
                stacklevel=2,
            )
