"""The trainer: one readable path from images to a checkpoint.

A step draws a batch, makes two views of it on the device, encodes each in a call of its own (so
that BatchNorm sees the views apart, as in the paper), takes the mode's loss, and adds the
cross-entropy of a linear head on the detached representation of view 1, which only measures.

Under torchrun every rank runs this; rank 0 alone writes files and shows anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..dispatch import last_backend
from ..machine import machine
from ..progress import Progress
from . import checkpoint, data, encoders, folder, views
from .batchnorm import synchronise
from .config import TrainConfig
from .gradcache import GradientCache
from .guard import Guard
from .log import Log, Logger
from .objective import Objective
from .optim import build_optimizer, learning_rate
from .ranks import Ranks, mean_in_order
from .supervise import Signals, TrainingStopped

STATEFUL = ("model", "optimizer", "scaler", "sampler")  # parts of a run that have a state dict


class TrainingDiverged(RuntimeError):
    """Losses, gradients or a weight stayed NaN or infinite; the last good checkpoint is kept."""


class Model(nn.Module):
    """Encoder, mode and online head of a run; ``width`` R, the encoder's representation size.

    The weights are a function of the settings alone, and the caller's random state is left as is.
    ``ranks``: those over which a batch lies.
    """

    def __init__(
        self, config: TrainConfig, channels: int, classes: int, ranks: Ranks | None = None
    ) -> None:
        super().__init__()
        self.ranks = ranks or Ranks()
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
                group=self.ranks.group,
                seed=config.seed,
            )
            self.head = nn.Linear(self.width, max(classes, 1))  # pictures may have none

    def as_in(self, state: dict) -> Model:
        """This model in the form of an older version that ``state``, a state dict, has."""
        start = "objective."
        self.objective.as_in({k[len(start) :] for k in state if k.startswith(start)})
        return self

    def forward(self, view1, view2=None, labels=None):
        """:meth:`losses` of two views (B, C, S, S); of one alone its representation (B, R)."""
        r1 = self.encoder(view1)
        return r1 if view2 is None else self.losses(r1, self.encoder(view2), labels)

    def losses(self, r1, r2, labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss of the mode, loss and accuracy of the head, of the batch of all ranks.

        r1, r2 (B, R), labels (B,). Gradients are such that their mean over the ranks is that of the
        whole batch.
        """
        loss = self.objective(r1, r2)
        scores = self.head(r1.detach())
        # Unlabelled images have label -1; a batch may hold nothing else.
        counts = torch.stack(((labels >= 0).sum(), (scores.detach().argmax(1) == labels).sum()))
        known, right = self.ranks.sum(counts)
        known = known.clamp_min(1)
        head_loss = nn.functional.cross_entropy(scores, labels, ignore_index=-1, reduction="sum")
        return loss, head_loss * self.ranks.size / known, right / known


def load_model(path: str | os.PathLike, device: str = "cpu") -> tuple[TrainConfig, Model, dict]:
    """(settings, model in eval mode, checkpoint) of a run's ``checkpoint.pt`` or its folder."""
    state = checkpoint.load(path)
    config = TrainConfig.from_dict(state["config"])
    model = Model(config, state["channels"], state["classes"]).as_in(state["model"])
    model.load_state_dict(state["model"])
    return config, model.eval().to(device), state


class Trainer:
    """One run: ``Trainer(config).run()``. Files go to ``checkpoint_dir/name``.

    ``config.json`` (every setting), ``log.jsonl`` (a header line, then a line a step or every
    ``log_every`` steps) and ``checkpoint.pt``. ``resume`` continues from the folder's checkpoint,
    where there is one, with its settings where ``config`` has none, on the same images wherever
    they lie now; without it a folder that holds one is refused unless ``overwrite``. Nothing there
    is changed before ``run``.

    Where torch.distributed is initialised the run is shared by its processes, which all do this.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = True,
    ) -> None:
        self.ranks = ranks = Ranks.joined(config.checked("timeout"))
        self.progress = progress and ranks.rank == 0
        self.folder = config.folder
        self.path = self.folder / "checkpoint.pt"
        there = resume and ranks.first(lambda: checkpoint.exists(self.path))
        state = ranks.first(lambda: checkpoint.load(self.path)) if there else None
        if state is not None:
            config = config.continuing(state["config"])
        self.config = config = config.resolve()
        ranks.first(lambda: self._check_folder(state, resume, overwrite))

        torch.manual_seed(config.seed + ranks.rank)
        self.device = ranks.device(torch.device(config.device))
        dataset = self._load_data(state)
        self.identity = data.identity(dataset)
        if state is not None and "data" in state:  # older ones do not say
            data.check_same(state["data"], self.identity, config.data)
        self.channels, self.classes = dataset.shape[0], dataset.num_classes
        self.make_views = views.make_views(config.views, config.image_size, self.channels)
        if isinstance(dataset, data.ImageSet):
            dataset = dataset.to(self.device)
        else:
            dataset = dataclasses.replace(dataset, crops=self.make_views.crops)
        self.dataset = dataset
        share = {"rank": ranks.rank, "world_size": ranks.size}
        share["what"] = f"training images of {config.data}"
        self.sampler = data.EpochSampler(len(dataset), config.batch_size, config.seed, **share)
        self.batches = data.Batches(dataset, self.sampler, self.device, config.workers)
        self.view_generator = torch.Generator(self.device).manual_seed(config.seed + 1)

        self.model = self.module = Model(config, self.channels, self.classes, ranks).to(self.device)
        if state is not None:  # before the optimiser, which counts the parameters
            self.model.as_in(state["model"])
        if config.channels_last:
            self.model.encoder.to(memory_format=torch.channels_last)
        if ranks.size > 1:
            if config.chunk_size is None:  # the ranks may differ in their number of chunks
                self.model.encoder = synchronise(self.model.encoder)
            self.model.objective = synchronise(self.model.objective)
            gpu = [self.device] if self.device.type == "cuda" else None
            # The ranks' buffers agree already. Torch 2.15 has a new name for that.
            names = inspect.signature(DistributedDataParallel).parameters
            name = {"forward_sync_buffers", "broadcast_buffers"} & set(names)
            self.module = DistributedDataParallel(self.model, gpu, **{max(name): False})
            if gpu is None and ranks.size > 2:
                self.module.register_comm_hook(None, mean_in_order)
        if config.compile:
            self.model.encoder.compile()
        self.optimizer = build_optimizer(
            config.optimizer, self.model, config.learning_rate, config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.guard = Guard(self.model, self.optimizer, self.scaler, ranks)
        self.cache = None
        if config.chunk_size is not None:
            self.cache = GradientCache(
                self.model, self.module, config.chunk_size, config.cache_bn, self.autocast, ranks
            )
        self.step, self.now = 0, "before the first step"  # now: where the run is, in words
        log = self.folder / "log.jsonl" if ranks.rank == 0 else None
        self.log = Log(log, config.batch_size, len(self.sampler), labelled=self.classes > 0)
        self.logger = Logger(config.logger if ranks.rank == 0 else "none")
        if state is not None:
            self._restore(state)

    def _load_data(self, state: dict | None) -> data.ImageSet | data.FolderSet:
        download = self.config.download
        if download and self.ranks.size > 1:  # one fetches, the others find it
            self.ranks.first(lambda: self.config.images(True, download) and None)
            download = False
        try:
            return self.config.images(True, download)
        except FileNotFoundError as error:
            if state is None:
                raise
            hint = "where they have been moved to is for --data or --data-root to say"
            raise FileNotFoundError(f"{error}; {hint}") from error

    # ------------------------------------------------------------------------ the run

    @property
    def total_steps(self) -> int:
        """Steps of the whole schedule."""
        return self.config.steps or self.config.epochs * len(self.sampler)

    def run(
        self,
        on_step: Callable[[dict], None] | None = None,
        look: Callable[[Trainer], None] | None = None,
    ) -> dict:
        """Trains to the end and returns the last log line with totals.

        ``on_step`` is called with each log line, some steps after its own, on rank 0; ``look`` with
        this trainer, before the first step and after each. A step whose loss or gradient is not
        finite changes nothing but the log's ``skipped``. Raises :class:`TrainingDiverged` after
        ``max_skipped`` of them in a row (on a GPU, up to twice as many) or where a weight is not
        finite: the last good checkpoint is kept. SIGTERM or SIGINT raise :class:`TrainingStopped`
        at the end of the step, after a checkpoint, unless that step was skipped.
        """
        last = min(self.total_steps, self.config.max_steps or self.total_steps)
        save_every = self.config.save_every or len(self.sampler)
        due = False
        self.logger.open(self.folder, self.config.to_dict(), self.step)
        self._begin()
        signals = Signals(impatient=self.ranks.size == 1)
        bar = {"start": self.step, "show": self.progress, "banner": self._banner()}

        def kept() -> str:  # what a sentence about lost ranks ends with
            return "; " + self._last_good() if self.ranks.rank == 0 else ""

        with (
            self.ranks.watched(lambda: self.now, kept),
            contextlib.closing(self.logger),
            self.log.open(self._header),
            Progress(last, **bar) as progress,
            signals,
        ):
            show = [lambda record: self._show(progress, record)]
            show += [self.logger.add, *([] if on_step is None else [on_step])]
            self.model.train()
            look = look or (lambda _: None)
            look(self)
            for images, labels, _ in itertools.islice(self.endless(), max(0, last - self.step)):
                self.now = f"in step {self.step + 1}"
                values = self.train_step(images, labels)
                self.step += 1
                look(self)
                self.log.tick()
                end = self.step == last
                if self.step % self.config.log_every == 0 or end:
                    self.log.add(self.step, *values)
                due |= self.step % save_every == 0
                stop = self.ranks.any(signals.caught is not None)
                if due or stop or end or self.log.due:
                    self.log.write(show)
                in_a_row = self._skipped_in_a_row(due or stop or end)
                # While steps are skipped nothing has proved the weights, so the last checkpoint
                # stays.
                if end or (due or stop) and not in_a_row:
                    self._save()
                    due = False
                if stop and not end:
                    raise self._stopped(signals, saved=not in_a_row)
            if failed := self._unreadable():
                self.log.end({"unreadable": failed})
        if failed := self._unreadable():
            warnings.warn(f"{folder.said_unreadable(failed)}; log.jsonl has all", stacklevel=2)
        end = {"step": self.step, "backend": last_backend(), "folder": str(self.folder)}
        return self.log.record | end

    def endless(self) -> Iterator[tuple]:
        """The batches of one epoch after the other, from where the run is."""
        while True:
            yield from self.batches

    def train_step(self, images, labels) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
        """One update; learning rate and, on the device, loss, online accuracy, steps skipped."""
        config = self.config
        warmup = config.warmup_epochs * len(self.sampler)
        rate = learning_rate(self.step, self.total_steps, warmup, config.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        make = self.views_of(images)
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.start()
        if self.cache is not None:
            loss, accuracy = self.cache.backward(make, labels, self.scaler.scale)
        else:
            view1, view2 = (make(which, slice(0, len(images))) for which in (0, 1))
            with self.autocast():
                loss, head_loss, accuracy = self.module(view1, view2, labels)
            self.scaler.scale(loss + head_loss).backward()
        self.guard.step(loss)
        return rate, loss.detach(), accuracy, self.guard.counts[0].clone()

    def views_of(self, images) -> Callable[[int, slice], torch.Tensor]:
        """``make(which, rows)``: these rows of view 0 or 1 of ``images``, this rank's, in the
        encoder's layout. What they depend on is drawn here, for the batch of all ranks; pictures of
        a folder, (B, 2, C, S, S), are cut already."""
        batch, config, cut = self.config.batch_size, self.config, images.dim() == 5
        size, generator = images.shape[-2:], self.view_generator
        drawn = self.make_views.sample(batch, *size, generator, boxes=not cut)
        first = self.sampler.share(batch).start
        layout = torch.channels_last if config.channels_last else torch.contiguous_format

        def make(which: int, rows: slice) -> torch.Tensor:
            view = (self.make_views.first, self.make_views.second)[which]
            part = images[rows, which] if cut else images[rows]
            made = view.rows(part, drawn[which], first + rows.start)
            return made.contiguous(memory_format=layout)

        return make

    def autocast(self):
        """Where the encoder and the loss run: as ``amp`` says."""
        dtype = torch.float16 if self.config.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.config.amp != "none")

    def _skipped_in_a_row(self, now: bool) -> int:
        """Steps skipped in a row until now; TrainingDiverged at ``max_skipped``.

        Reads the counter where ``now`` is true or every ``max_skipped`` steps, because a read waits
        for the device; otherwise returns 0. The same steps on every rank.
        """
        if not (now or self.guard.on_host or self.step % self.config.max_skipped == 0):
            return 0
        in_a_row = int(self.guard.counts[1])
        if in_a_row >= self.config.max_skipped:
            raise self._diverged(f"in {in_a_row} steps in a row ")
        return in_a_row

    # ------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        # A finite gradient may still have sent the weights off.
        self.now = f"while saving after step {self.step}"
        values = [v for v in self.model.state_dict().values() if v.is_floating_point()]
        if not torch.stack([v.isfinite().all() for v in values]).all():
            raise self._diverged()
        random_states = self.ranks.gather(checkpoint.rng_state(self.view_generator))
        if self.config.skip_unreadable:
            for failed in self.ranks.gather(self._unreadable()):
                self._unreadable().update(failed or {})
        self.ranks.first(lambda: checkpoint.save(self.path, self._state(*random_states)))

    def _unreadable(self) -> dict[str, str]:
        """Files that were left out until now, and why; on rank 0, after a save, those of all."""
        return getattr(self.dataset, "failed", {})

    def _state(self, random_state: dict, *of_other_ranks: dict) -> dict:
        return {
            "config": self.config.to_dict(),
            "data": self.identity,
            "channels": self.channels,
            "classes": self.classes,
            "step": self.step,
            **{name: getattr(self, name).state_dict() for name in STATEFUL},
            "skipped": self.guard.counts.cpu(),
            "unreadable": dict(self._unreadable()),
            "logger": self.logger.id,
            "rng": random_state,
            "rng_of_other_ranks": list(of_other_ranks),
            "log_bytes": self.log.sync(),
        }

    def _diverged(self, how: str = "") -> TrainingDiverged:
        return TrainingDiverged(
            f"loss: expected finite numbers, got nan or inf {how}by step {self.step}; "
            + self._last_good()
        )

    def _stopped(self, signals: Signals, saved: bool) -> TrainingStopped:
        kept = f"saved, continue with --resume: {self.path}" if saved else self._last_good()
        caught = signals.caught or "a signal to another rank"
        return TrainingStopped(f"stopped by {caught} after step {self.step}; {kept}")

    def _last_good(self) -> str:
        there = self.path.exists()
        return f"the last good checkpoint is {self.path}" if there else "there is no checkpoint yet"

    def _check_folder(self, state: dict | None, resume: bool, overwrite: bool) -> None:
        checkpoint.writable("checkpoint_dir", self.folder)
        if checkpoint.exists(self.path) and not (resume or overwrite):
            raise ValueError(
                f"name: expected a folder without a checkpoint, got {self.folder}; "
                "give --resume to continue it, --overwrite to start anew, or another --name"
            )
        if resume and state is None:
            warnings.warn(f"resume: no checkpoint in {self.folder}, starting anew", stacklevel=3)

    def _restore(self, state: dict) -> None:
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        if self.step > self.total_steps:
            behind = -(-self.step // len(self.sampler))
            raise ValueError(
                f"epochs: expected at least the {behind} that the run has behind it, got "
                f"{self.config.epochs}"
            )
        self.guard.counts.copy_(state.get("skipped", torch.zeros(2)))
        self._unreadable().update(state.get("unreadable", {}))
        self.logger.id = state.get("logger")
        random_states = dict(enumerate([state["rng"], *state.get("rng_of_other_ranks", [])]))
        rank = self.ranks.rank
        checkpoint.set_rng_state(random_states.get(rank, state["rng"]), self.view_generator)
        if rank not in random_states:  # more ranks than there were; views are drawn alike by all
            torch.manual_seed(self.config.seed + rank + self.step * self.ranks.size)
        self.log.kept = state["log_bytes"]

    # ------------------------------------------------------------------------ what is shown

    def _begin(self) -> None:
        """Rank 0's files before the first step: config.json, and no checkpoint of an older run."""
        if self.ranks.rank > 0:
            return
        checkpoint.write_json(self.folder / "config.json", self.config.to_dict(), indent=2)
        if self.log.kept is None:  # only here, with all of the settings checked, are old ones lost
            for path in (self.path, checkpoint.previous(self.path)):
                path.unlink(missing_ok=True)

    def _header(self) -> dict:
        header = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            **machine(gpu=self.device.type == "cuda"),
            "device": str(self.device),
            "ranks": self.ranks.size,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.total_steps,
        }
        if isinstance(self.dataset, data.FolderSet):
            header["files"] = {"taken": len(self.dataset), "left out": self.dataset.left_out}
        return header

    def _show(self, progress: Progress, record: dict) -> None:
        rate = record["images_per_second"]
        text = f"loss {record['loss']:.4f}"
        text += f"  accuracy {100 * record['accuracy']:.1f} %" if self.classes else ""
        text += f"  {rate:.0f} images/s" if rate else ""
        line = f"step {record['step']:>6}/{progress.total}  {text}  [{last_backend()}]"
        progress.to(record["step"], text, line)

    def _banner(self) -> str:
        config = self.config
        dim = "" if self.model.objective.dim is None else f", dim {self.model.objective.dim}"
        return (
            f"{config.mode}{dim} on {config.data}: {config.encoder} (R {self.model.width}), "
            f"batch {config.batch_size}, {config.epochs} epochs of {len(self.sampler)} steps, "
            f"{config.optimizer} {config.learning_rate:g}, {self.device}, amp {config.amp}"
            + (f", {self.ranks.size} ranks" if self.ranks.size > 1 else "")
            + (f", by chunks of {config.chunk_size}" if self.cache else "")
            + (f"\n{self.dataset.said()}" if isinstance(self.dataset, data.FolderSet) else "")
        )
