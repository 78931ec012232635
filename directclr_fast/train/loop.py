"""The trainer: one readable path from images to a checkpoint.

A step draws a batch, makes two views of it on the device, encodes each in a call of its own (so
that BatchNorm sees the views apart, as in the paper), takes the mode's loss, and adds the
cross-entropy of a linear head on the detached representation of view 1, which only measures.
Everything random comes from generators whose state the checkpoint holds, so a resumed run on the
CPU is bitwise the run that was not interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import nn

from .. import __version__
from ..dispatch import last_backend
from . import checkpoint, data, encoders, views
from .config import TrainConfig
from .objective import Objective
from .optim import build_optimizer, learning_rate

READ_EVERY = 0.25  # seconds between reads of losses from the device: each waits for its queue


class TrainingDiverged(RuntimeError):
    """The loss or a weight became NaN or infinite; the last good checkpoint is kept."""


class Model(nn.Module):
    """Encoder, mode and online head of a run; ``width`` R, the encoder's representation size.

    The weights are a function of the settings alone, and the caller's random state is left as is.
    """

    def __init__(self, config: TrainConfig, channels: int, classes: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.encoder = encoders.build(
                config.encoder, channels=channels, image_size=config.image_size
            )
            self.width = self.encoder.width
            self.objective = Objective(
                config.mode,
                self.width,
                dim=config.dim,
                temperature=config.temperature,
                negatives=config.negatives,
                backend="reference" if config.loss == "reference" else "auto",
                seed=config.seed,
            )
            self.head = nn.Linear(self.width, classes)


def load_model(path: str | os.PathLike, device: str = "cpu") -> tuple[TrainConfig, Model, dict]:
    """(settings, model in eval mode, checkpoint) of a run's ``checkpoint.pt`` or its folder."""
    state = checkpoint.load(path)
    config = TrainConfig.from_dict(state["config"])
    model = Model(config, state["channels"], state["classes"])
    model.load_state_dict(state["model"])
    return config, model.eval().to(device), state


class Trainer:
    """One run: ``Trainer(config).run()``. Files go to ``checkpoint_dir/name``.

    ``config.json`` (every setting), ``log.jsonl`` (a header line, then a line a step or every
    ``log_every`` steps) and ``checkpoint.pt``. ``resume`` continues from the folder's checkpoint,
    where there is one; without it a folder that holds one is refused unless ``overwrite``. Nothing
    there is changed before ``run``.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = True,
    ) -> None:
        config = config.resolve()
        self.config = config
        self.progress = progress
        self.folder = Path(config.checkpoint_dir) / config.name
        self.path = self.folder / "checkpoint.pt"
        state = self._start_from(resume, overwrite)

        torch.manual_seed(config.seed)
        self.device = torch.device(config.device)
        dataset = data.load(
            config.data,
            root=config.data_root,
            download=config.download,
            train=True,
            image_size=config.image_size,
            seed=config.seed,
        )
        self.channels, self.classes = dataset.shape[0], dataset.num_classes
        if isinstance(dataset, data.ImageSet):
            dataset = dataset.to(self.device)
        self.sampler = data.EpochSampler(
            len(dataset),
            config.batch_size,
            config.seed,
            what=f"training images of {config.data}",
        )
        self.batches = data.Batches(dataset, self.sampler, self.device, config.workers)
        self.make_views = views.make_views(config.views, config.image_size, self.channels)
        self.view_generator = torch.Generator(self.device).manual_seed(config.seed + 1)

        self.model = Model(config, self.channels, self.classes).to(self.device)
        if config.channels_last:
            self.model.encoder.to(memory_format=torch.channels_last)
        self.encode = torch.compile(self.model.encoder) if config.compile else self.model.encoder
        self.optimizer = build_optimizer(
            config.optimizer, self.model, config.learning_rate, config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.step = 0
        self.finite = torch.ones((), dtype=torch.bool, device=self.device)
        self.log_bytes = None  # of the log that belong to `step`; None: a new run
        if state is not None:
            self._restore(state)

    # ------------------------------------------------------------------------ the run

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.config.epochs * len(self.sampler)

    def run(self, on_step: Callable[[dict], None] | None = None) -> dict:
        """Trains to the end and returns the last log line with totals.

        ``on_step`` is called with each log line, some steps after its own. Raises
        :class:`TrainingDiverged` where the loss or a weight stopped being finite; the last good
        checkpoint is kept.
        """
        last = self.total_steps
        if self.config.max_steps is not None:
            last = min(last, self.config.max_steps)
        save_every = self.config.save_every or len(self.sampler)
        self.record, self.waiting, self.read_at = {"step": self.step}, [], 0.0
        self.clock = None
        with self._files() as self.log, self._bar(last) as bar:
            show = (bar,) if on_step is None else (bar, on_step)
            self.model.train()
            while self.step < last:
                for images, labels, _ in self.batches:
                    values = self._train_step(images, labels)
                    self.step += 1
                    self._tick(len(images))
                    end = self.step == last
                    if self.step % self.config.log_every == 0 or end:
                        self.waiting.append((self.step, *values))
                    saving = self.step % save_every == 0 or end
                    if saving or time.perf_counter() - self.read_at > READ_EVERY:
                        self._write_log(show)
                    if saving:
                        self._save()
                    if end:
                        break
        return {**self.record, "backend": last_backend(), "folder": str(self.folder)}

    def _train_step(self, images, labels) -> tuple[float, torch.Tensor, torch.Tensor]:
        """One update; learning rate, loss and online accuracy, the latter two on the device."""
        config = self.config
        rate = learning_rate(
            self.step,
            self.total_steps,
            config.warmup_epochs * len(self.sampler),
            config.learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        view1, view2 = self.make_views(images, self.view_generator)
        if config.channels_last:
            view1 = view1.contiguous(memory_format=torch.channels_last)
            view2 = view2.contiguous(memory_format=torch.channels_last)
        dtype = torch.float16 if config.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=config.amp != "none"):
            r1, r2 = self.encode(view1), self.encode(view2)
            loss = self.model.objective(r1, r2)
            scores = self.model.head(r1.detach())
            # Unlabelled images have label -1; a batch may hold nothing else.
            known = (labels >= 0).sum().clamp_min(1)
            head_loss = nn.functional.cross_entropy(
                scores, labels, ignore_index=-1, reduction="sum"
            )
            head_loss = head_loss / known
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss + head_loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.finite &= torch.isfinite(loss.detach())
        accuracy = (scores.detach().argmax(1) == labels).sum() / known
        return rate, loss.detach(), accuracy

    # ------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        # A finite loss may still have sent the weights off with its gradient.
        values = [v for v in self.model.state_dict().values() if v.is_floating_point()]
        if not torch.stack([self.finite, *(v.isfinite().all() for v in values)]).all():
            raise self._diverged()
        os.fsync(self.log.fileno())
        self.log_bytes = self.log.tell()
        checkpoint.save(
            self.path,
            {
                "config": self.config.to_dict(),
                "channels": self.channels,
                "classes": self.classes,
                "step": self.step,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "sampler": self.sampler.state_dict(),
                "rng": checkpoint.rng_state(self.view_generator),
                "log_bytes": self.log_bytes,
            },
        )

    def _diverged(self) -> TrainingDiverged:
        kept = f"the last good checkpoint is {self.path}"
        return TrainingDiverged(
            f"loss: expected finite numbers, got nan or inf by step {self.step}; "
            + (kept if self.path.exists() else "there is no checkpoint yet")
        )

    def _start_from(self, resume: bool, overwrite: bool) -> dict | None:
        """The checkpoint to continue from, None to start anew."""
        checkpoint.writable("checkpoint_dir", self.folder)
        older = checkpoint.previous(self.path)
        there = self.path.exists() or older.exists()
        if resume and there:
            state = checkpoint.load(self.path)
            self._check_same(state["config"])
            return state
        if there and not overwrite:
            raise ValueError(
                f"name: expected a folder without a checkpoint, got {self.folder}; "
                "give --resume to continue it, --overwrite to start anew, or another --name"
            )
        if resume:
            warnings.warn(f"resume: no checkpoint in {self.folder}, starting anew", stacklevel=3)
        return None

    def _check_same(self, saved: dict) -> None:
        for name, value in self.config.to_dict().items():
            if name not in self.config.FREE and saved.get(name) != value:
                raise ValueError(
                    f"{name}: expected {saved.get(name)!r} as in the checkpoint being resumed, "
                    f"got {value!r}"
                )

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.sampler.load_state_dict(state["sampler"])
        checkpoint.set_rng_state(state["rng"], self.view_generator)
        self.step = state["step"]
        self.log_bytes = state["log_bytes"]

    # ------------------------------------------------------------------------ what is shown

    @contextlib.contextmanager
    def _files(self) -> Iterator[IO]:
        """Writes config.json and opens the log where `step` left it."""
        with checkpoint.replacing(self.folder / "config.json") as file:
            file.write(json.dumps(self.config.to_dict(), indent=2) + "\n")
        log = self.folder / "log.jsonl"
        if self.log_bytes is None:  # only here, with all of the settings checked, are old ones lost
            for path in (self.path, checkpoint.previous(self.path)):
                path.unlink(missing_ok=True)
        with open(log, "a", encoding="utf-8") as file:
            # What was logged after the checkpoint will be logged again.
            file.truncate(min(self.log_bytes or 0, file.tell()))
            if file.seek(0, os.SEEK_END) == 0:
                header = {
                    "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                    "directclr_fast": __version__,
                    "torch": torch.__version__,
                    "device": str(self.device),
                    "threads": torch.get_num_threads(),
                    "parameters": sum(p.numel() for p in self.model.parameters()),
                    "steps": self.total_steps,
                }
                file.write(json.dumps(header) + "\n")
            yield file

    def _tick(self, images: int) -> None:
        """Counts images from the first step of this process on, which is left out (warm-up)."""
        if self.clock is None:
            self.clock, self.images = time.perf_counter(), 0
        else:
            self.images += images

    def _write_log(self, show: Sequence[Callable[[dict], None]]) -> None:
        """A line for each step that waits for one, and the same to each of ``show``."""
        if not self.waiting:
            return
        steps, rates, *values = zip(*self.waiting)
        losses, accuracies = torch.stack([torch.stack(v).float() for v in values]).tolist()
        self.waiting, self.read_at = [], time.perf_counter()
        speed = round(self.images / (self.read_at - self.clock), 1) if self.images else None
        for step, rate, loss, accuracy in zip(steps, rates, losses, accuracies):
            self.record = {
                "step": step,
                "epoch": round(step / len(self.sampler), 4),
                "loss": loss if math.isfinite(loss) else repr(loss),  # JSON has no nan
                "accuracy": accuracy,
                "learning_rate": rate,
                "images_per_second": speed,
            }
            self.log.write(json.dumps(self.record) + "\n")
            self.record["loss"] = loss
            for call in show:
                call(self.record)
        self.log.flush()
        if not all(map(math.isfinite, losses)):
            raise self._diverged()

    def _bar(self, last: int):
        return _Progress(self.progress, self.step, last, self._banner())

    def _banner(self) -> str:
        config = self.config
        dim = "" if self.model.objective.dim is None else f", dim {self.model.objective.dim}"
        return (
            f"{config.mode}{dim} on {config.data}: {config.encoder} (R {self.model.width}), "
            f"batch {config.batch_size}, {config.epochs} epochs of {len(self.sampler)} steps, "
            f"{config.optimizer} {config.learning_rate:g}, {self.device}, amp {config.amp}"
        )


class _Progress:
    """A tqdm bar on a terminal; elsewhere a line for every tenth of the run."""

    def __init__(self, show: bool, start: int, last: int, banner: str) -> None:
        self.show, self.last, self.bar = show, last, None
        if not show:
            return
        print(banner, flush=True)
        if sys.stderr.isatty() and shutil.get_terminal_size().columns >= 40:
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=last, initial=start, unit="step", dynamic_ncols=True)
        self.next = start

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, record: dict) -> None:
        if not self.show:
            return
        rate = record["images_per_second"]
        text = f"loss {record['loss']:.4f}  accuracy {100 * record['accuracy']:.1f} %"
        text += f"  {rate:.0f} images/s" if rate else ""
        if self.bar is not None:
            self.bar.update(record["step"] - self.bar.n)
            self.bar.set_postfix_str(text)
        elif record["step"] >= self.next or record["step"] == self.last:
            print(f"step {record['step']:>6}/{self.last}  {text}  [{last_backend()}]", flush=True)
            self.next = record["step"] + max(1, self.last // 10)
