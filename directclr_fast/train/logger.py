"""TensorBoard and Weights & Biases beside log.jsonl, through their own packages."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

PACKAGES = {"tensorboard": ("torch.utils.tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}
LOGGERS = ("none", *PACKAGES)


class Logger:
    """Sends lines of the log to ``name``, one of LOGGERS. ImportError where its package is missing.

    What fails there later is said once, and the training goes on without it.
    """

    def __init__(self, name: str) -> None:
        self.name, self.id = name, None  # by which W&B knows a run again
        self.writer = None
        if name in PACKAGES:
            module, package = PACKAGES[name]
            try:
                self.package = importlib.import_module(module)
            except ImportError as error:
                raise ImportError(
                    f"logger: expected {package}, got {error}; "
                    f"install it with: pip install {package}"
                ) from error

    def open(self, folder: Path, settings: dict, step: int) -> None:
        """For the run in ``folder`` that goes on after ``step``; RuntimeError where it cannot."""
        try:
            self._open(folder, settings, step)
        except Exception as error:  # a service's own, of any kind
            raise RuntimeError(f"logger: expected to start {self.name}, got {error}") from error

    def _open(self, folder: Path, settings: dict, step: int) -> None:
        if self.name == "tensorboard":
            # What an interrupted run sent after its checkpoint comes again.
            self.writer = self.package.SummaryWriter(str(folder), purge_step=step + 1)
        elif self.name == "wandb":
            self.writer = self.package.init(
                project="directclr-fast",
                name=settings["name"],
                dir=str(folder),
                config=settings,
                id=self.id,
                resume="allow",
            )
            self.id = self.writer.id

    def add(self, record: dict) -> None:
        """A line of log.jsonl, as numbers at its step."""
        values = {k: v for k, v in record.items() if k != "step" and v is not None}

        def send(writer) -> None:
            if self.name == "wandb":
                writer.log(values, step=record["step"])
                return
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
