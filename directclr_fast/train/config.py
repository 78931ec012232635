"""What a training run is: every setting, its default for each data set, and its checks."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# The released ImageNet recipe, and what stands in for it on small sets.
_RELEASED = {
    "encoder": "resnet50", "image_size": 224, "views": "imagenet", "optimizer": "lars",
    "batch_size": 4096, "learning_rate": 4.8, "weight_decay": 1e-6, "epochs": 100,
    "warmup_epochs": 10,
}  # fmt: skip
_SMALL = {
    **_RELEASED, "encoder": "resnet18", "image_size": 32, "views": "small", "optimizer": "sgd",
    "batch_size": 512, "learning_rate": 0.5, "weight_decay": 1e-4, "epochs": 200,
}  # fmt: skip
_ON_A_CPU = {
    **_SMALL, "encoder": "small", "optimizer": "adamw", "batch_size": 256, "learning_rate": 2e-3,
    "epochs": 20, "warmup_epochs": 2, "amp": "bf16 where faster",
}  # fmt: skip
RECIPES = {
    "digits": {**_ON_A_CPU, "image_size": 8, "views": "affine", "epochs": 60, "warmup_epochs": 3},
    "patches": _ON_A_CPU,
    "cifar10": _SMALL,
    "cifar100": _SMALL,
    "stl10": {**_SMALL, "image_size": 64},
    "svhn": _SMALL,
    "fashion-mnist": {**_ON_A_CPU, "image_size": 28},
    "mnist": {**_ON_A_CPU, "image_size": 28, "views": "affine"},  # a flip has a meaning
    "kmnist": {**_ON_A_CPU, "image_size": 28, "views": "affine"},
    "folder": _RELEASED,
    "fake": {**_SMALL, "encoder": "small", "batch_size": 128, "epochs": 2, "warmup_epochs": 0},
}
MODES = (
    "baseline", "directclr", "single", "simclr", "group", "diagonal", "orthogonal", "lowrank",
    "random",
)  # fmt: skip
ENCODERS = ("resnet18", "resnet50", "small", "small-deep", "small-cut")
PRESETS = ("imagenet", "small", "affine")  # of views
OPTIMIZERS = ("lars", "sgd", "adamw")
RULES = ("frozen-stats", "two-pass", "chunk")  # of BatchNorm in chunks
SETS = tuple("folder:PATH" if kind == "folder" else kind for kind in RECIPES)


def resolve_device(name: str | None) -> str:
    """``name``; for None and "auto" CUDA where there is one. ValueError where it cannot be used."""
    import torch

    if name in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one of this machine, got {name!r} ({reason})") from None
    return name


def _bf16_where_faster(device: str) -> str:
    """The amp of a CPU with AMD's bf16 dot products or Intel's matrix unit, "none" elsewhere: by
    the instruction set, so that a run is the same on every machine of a kind."""
    from ..backends.cpu import _cpu

    fast = _cpu is not None and (_cpu.has_bf16() or "amx" in _cpu.available_isas())
    return "bf16" if device == "cpu" and fast else "none"


def setting(
    default=None,
    help: str | None = None,
    *,
    low: float | None = None,
    positive: bool = False,
    choices: tuple[str, ...] | None = None,
    resumed: str = "same",
) -> Any:
    """A field of TrainConfig, which is a flag of ``train``, too. It is None where it was not given.

    ``default``: taken then, if the recipe of the data has none. ``help``: of the flag; without one
    the ``choices``, which are the values there are. ``low``: the least value; ``positive``: more
    than 0; floats are finite. ``resumed``: what a run that goes on may do. "same": it is the
    checkpoint's, and no other; "noted": a change is said; "free": it may change; "call": as "free",
    and where it is not given the default's rather than the checkpoint's.
    """
    if help is None and choices is not None:
        help = ", ".join(choices) + (f" (default {default})" if default is not None else "")
    how = {"default": default, "help": help, "low": low, "positive": positive, "choices": choices}
    return dataclasses.field(default=None, metadata={**how, "resumed": resumed})


def check_setting(
    name: str, value, *, low=None, positive=False, choices: Iterable | None = None
) -> None:
    """ValueError where ``value`` is none of ``choices``, not ``positive``, or below ``low``: name,
    expected, got. Numbers are finite."""
    if choices is not None and value not in choices:
        expected, value = f"one of {', '.join(choices)}", repr(value)
    elif positive and not 0.0 < value < math.inf:
        expected = "a positive finite number"
    elif low is None or low <= value < math.inf:
        return
    else:
        expected = "a finite number >= 0" if isinstance(low, float) else f"at least {low}"
    raise ValueError(f"{name}: expected {expected}, got {value}")


def _check_field(field: dataclasses.Field, value: Any) -> None:
    if value is None and field.metadata["default"] is None:
        return
    how = {key: field.metadata[key] for key in ("low", "positive", "choices")}
    check_setting(field.name, value, **how)


noted, free, of_call = (partial(setting, resumed=rule) for rule in ("noted", "free", "call"))


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. None: not given. :meth:`resolve` then takes the value of the data set's
    recipe (RECIPES) or of the field, :meth:`continuing` that of the run that goes on."""

    # What the set holds is compared, wherever it lies now.
    data: str = free("digits", f"{', '.join(SETS)} (default digits)")
    data_root: str | None = free(help="folder of the sets that are fetched (default: data)")
    download: bool = of_call(False, "fetch a missing set")
    encoder: str | None = setting(choices=ENCODERS)
    image_size: int | None = setting(help="side of the crops, pixels", low=2)
    views: str | None = setting(choices=PRESETS)
    mode: str = setting("directclr", choices=MODES)
    dim: int | None = setting(
        help="columns of r the loss reads (default 360 of 2048, in proportion)", low=1
    )
    temperature: float = setting(0.1, "default 0.1", positive=True)
    negatives: str = setting("cross", choices=("cross", "both", "same"))
    loss: str = free("fast", choices=("fast", "reference"))
    optimizer: str | None = setting(choices=OPTIMIZERS)
    batch_size: int | None = setting(low=2)
    learning_rate: float | None = noted(help="peak, not scaled by the batch size", low=0.0)
    weight_decay: float | None = setting(low=0.0)
    epochs: int | None = noted(low=1)
    warmup_epochs: int | None = noted(low=0)
    steps: int | None = noted(help="of the whole schedule (default: those of --epochs)", low=1)
    amp: str = setting(
        "none",
        "none, bf16, fp16 (default none; of digits, patches and the sets of 28 pixels bf16 on CPUs "
        "where it is faster)",
        choices=("none", "bf16", "fp16"),
    )
    chunk_size: int | None = noted(
        help="images encoded at a time: a batch beyond memory; exact", low=1
    )
    cache_bn: str | None = noted(
        help="what BatchNorm normalises such a chunk by: 'chunk', its own statistics; 'two-pass', "
        "the whole batch's from an extra pass, without their gradient; 'frozen-stats', the running "
        "ones, which then stay",
        choices=RULES,
    )
    max_skipped: int = free(10, "stop after this many steps in a row with nan (default 10)", low=1)
    compile: bool = free(False, "torch.compile the encoder")
    channels_last: bool = setting(True)
    device: str = of_call("auto", "cpu, cuda, ... (default: cuda where there is one)")
    workers: int = free(0, "processes that decode a folder's images", low=0)
    skip_unreadable: bool = free(
        False, "leave out pictures that cannot be read, and name them at the end"
    )
    seed: int = setting(0, low=0)
    max_steps: int | None = of_call(
        help="stop early, this time; the schedule stays that of --epochs", low=1
    )
    save_every: int | None = free(help="steps between checkpoints (default: an epoch)", low=1)
    log_every: int = free(1, "steps between log lines (default 1)", low=1)
    logger: str = free(
        "none",
        "none, tensorboard, wandb: beside log.jsonl (default none)",
        choices=("none", "tensorboard", "wandb"),
    )
    timeout: float = free(
        300.0,
        "seconds that a rank waits for the others, what rank 0 does alone included (default 300)",
        positive=True,
    )
    checkpoint_dir: str = of_call("runs", "folder of the runs (default runs)")
    name: str = of_call("directclr", "folder of this run (default directclr)")

    def given(self, name: str) -> Any:
        """A setting, or the field's default where it was not given."""
        value = getattr(self, name)
        return self.__dataclass_fields__[name].metadata["default"] if value is None else value

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return Path(self.given("checkpoint_dir")) / self.given("name")

    def images(self, train: bool, download: bool = False):
        """The part of the set to train on, or the one held out (:func:`.data.load`)."""
        from . import data

        names = ("image_size", "seed", "skip_unreadable")
        how = {name: getattr(self, name) for name in names}
        return data.load(self.data, root=self.data_root, download=download, train=train, **how)

    def resolve(self) -> TrainConfig:
        """The same settings with every default filled in and checked.

        Raises ValueError: setting, expected, got.
        """
        spec = self.given("data")
        kind = spec.partition(":")[0]
        if kind not in RECIPES and os.path.isdir(spec):  # the released trainer takes a bare path
            spec, kind = f"folder:{spec}", "folder"
        if kind not in RECIPES:
            check_setting("data", spec, choices=SETS)
        defaults = {f.name: f.metadata["default"] for f in dataclasses.fields(self)} | RECIPES[kind]
        filled = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        if self.epochs is not None and "warmup_epochs" in filled:
            # A run shorter than the recipe's must not end before it is warm.
            filled["warmup_epochs"] = min(filled["warmup_epochs"], self.epochs // 2)
        filled |= {"data": spec, "device": resolve_device(self.device)}
        if filled.get("amp") == _ON_A_CPU["amp"]:
            filled["amp"] = _bf16_where_faster(filled["device"])
        config = dataclasses.replace(self, **filled)
        config._check()
        return config

    def continuing(self, saved: dict[str, Any]) -> TrainConfig:
        """These settings for the run that had ``saved`` (of :meth:`to_dict`): what is not given
        here is as it was there, but for what belongs to one call.

        ValueError for what may not change; a warning for what may, but changes what is trained.
        """
        values = {}
        for field in dataclasses.fields(self):
            name, rule = field.name, field.metadata["resumed"]
            before, now = saved.get(name, field.metadata["default"]), getattr(self, name)
            if now is None:
                values[name] = None if rule == "call" else before
            elif now != before and rule == "same":
                raise ValueError(
                    f"{name}: expected {_said(before)}, as the run in {self.folder} began, got "
                    f"{now!r}; leave it out to go on, or give another --name to start anew"
                )
            elif now != before and rule == "noted":
                warnings.warn(
                    f"{name}: {_said(before)} in the checkpoint being resumed, now {now!r}",
                    stacklevel=2,
                )
        return dataclasses.replace(self, **values)

    def _check(self) -> None:
        for field in dataclasses.fields(self):
            _check_field(field, getattr(self, field.name))
        if self.cache_bn is not None and self.chunk_size is None:
            raise ValueError(f"cache_bn: expected chunk_size with it, got {self.cache_bn!r} alone")
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs: expected at most {self.epochs} (epochs), got {self.warmup_epochs}"
            )
        if self.seed >= 2**63 - 1:  # seed + 1 is that of the views
            raise ValueError(f"seed: expected less than 2**63 - 1, got {self.seed}")
        if "/" in self.name or "\\" in self.name or self.name in ("", ".", ".."):
            raise ValueError(f"name: expected the name of one folder, got {self.name!r}")
        if self.amp == "fp16" and not self.device.startswith("cuda"):
            raise ValueError(f"amp: expected 'none' or 'bf16' on {self.device}, got 'fp16'")

    def checked(self, name: str) -> Any:
        """The value of one setting, checked by itself."""
        value = self.given(name)
        _check_field(self.__dataclass_fields__[name], value)
        return value

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, as config.json and the checkpoint hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The settings of :meth:`to_dict`; ValueError for a name this version does not know."""
        defaults = {field.name: field.metadata["default"] for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - defaults.keys()):
            raise ValueError(f"config: expected settings of this version, got {unknown[0]!r}")
        return cls(**{**defaults, **values})


def _said(value: Any) -> str:
    return "none" if value is None else repr(value)
