"""The trainer: one readable path from images to a checkpoint.

A step draws a batch, makes two views of it on the device, encodes each in a call of its own (so
that BatchNorm sees the views apart, as in the paper), takes the mode's loss, and adds the
cross-entropy of a linear head on the detached representation of view 1, which only measures.
Everything random comes from generators whose state the checkpoint holds, so a resumed run on the
CPU is bitwise the run that was not interrupted.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .. import __version__
from ..dispatch import last_backend
from . import checkpoint, data, encoders, views
from .config import TrainConfig
from .objective import Objective
from .optim import build_optimizer, learning_rate


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class Model(nn.Module):
    """Encoder, mode and online head of a run; ``width`` R, the encoder's representation size."""

    def __init__(self, config: TrainConfig, channels: int, classes: int) -> None:
        super().__init__()
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
    ``log_every`` steps) and ``checkpoint.pt``. ``resume`` continues from the folder's checkpoint;
    without it a folder that holds one is refused unless ``overwrite``.
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
        self.log_bytes = 0
        if state is not None:
            self._restore(state)
        self._open_files(new=state is None)

    # ------------------------------------------------------------------------ the run

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.config.epochs * len(self.sampler)

    def run(self, on_step: Callable[[dict], None] | None = None) -> dict:
        """Trains to the end and returns the last log line with totals.

        ``on_step`` is called with each log line. Raises :class:`TrainingDiverged` where the loss
        stopped being finite; the last good checkpoint is kept.
        """
        last = self.total_steps
        if self.config.max_steps is not None:
            last = min(last, self.config.max_steps)
        save_every = self.config.save_every or len(self.sampler)
        record = {"step": self.step}
        self._clock = None
        with self._bar(last) as bar:
            self.model.train()
            while self.step < last:
                for images, labels, _ in self.batches:
                    values = self._train_step(images, labels)
                    self.step += 1
                    self._tick(len(images))
                    if self.step % self.config.log_every == 0 or self.step == last:
                        record = self._log(values)
                        bar(record)
                        if on_step is not None:
                            on_step(record)
                    if self.step % save_every == 0 or self.step == last:
                        self.save()
                    if self.step == last:
                        break
        return {**record, "backend": last_backend(), "folder": str(self.folder)}

    def _train_step(self, images, labels) -> dict[str, torch.Tensor]:
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
        return {"loss": loss.detach(), "accuracy": accuracy, "learning_rate": rate}

    # ------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Writes the checkpoint, unless the loss has stopped being finite."""
        if not bool(self.finite):
            raise TrainingDiverged(
                f"loss: expected a finite number, got nan or inf by step {self.step}; "
                f"the last good checkpoint is {self.path}"
            )
        self.log.flush()
        os.fsync(self.log.fileno())
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
                "log_bytes": self.log.tell(),
            },
        )

    def _start_from(self, resume: bool, overwrite: bool) -> dict | None:
        """The checkpoint to continue from, None to start anew."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".writable.{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"checkpoint_dir: expected a folder to write to, got {self.folder} ({error})"
            ) from error
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
        self.path.unlink(missing_ok=True)
        older.unlink(missing_ok=True)
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

    def _open_files(self, new: bool) -> None:
        text = json.dumps(self.config.to_dict(), indent=2)
        (self.folder / "config.json").write_text(text + "\n")
        self.log = open(self.folder / "log.jsonl", "w" if new else "r+", encoding="utf-8")
        if new:
            header = {
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "directclr_fast": __version__,
                "torch": torch.__version__,
                "device": str(self.device),
                "threads": torch.get_num_threads(),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "steps": self.total_steps,
            }
            self.log.write(json.dumps(header) + "\n")
            self.log.flush()
        else:
            # What was logged after the checkpoint will be logged again.
            self.log.seek(self.log_bytes)
            self.log.truncate()

    def _tick(self, images: int) -> None:
        """Images and seconds since the first step of this process, which is left out (warm-up)."""
        now = time.perf_counter()
        if self._clock is None:
            self._clock, self._images = now, 0
        else:
            self._images += images
        self._seconds = now - self._clock

    def _log(self, values: dict) -> dict:
        record = {
            "step": self.step,
            "epoch": round(self.step / len(self.sampler), 4),
            **{k: float(v) for k, v in values.items()},
        }
        record["images_per_second"] = (
            round(self._images / self._seconds, 1) if self._images else None
        )
        finite = {
            k: v if v is None or not isinstance(v, float) or math.isfinite(v) else repr(v)
            for k, v in record.items()
        }
        self.log.write(json.dumps(finite) + "\n")
        self.log.flush()
        return record

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
