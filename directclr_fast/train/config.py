"""What a training run is: every setting, its default for each data set, and its checks."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

import torch

from ..problem import NEGATIVES
from .data import SETS
from .encoders import ENCODERS
from .gradcache import RULES
from .objective import MODES
from .optim import OPTIMIZERS
from .views import PRESETS

LOSSES = ("fast", "reference")
AMP = ("none", "bf16", "fp16")

# The released ImageNet recipe (docs/design.md section 8), and what stands in for it on small sets.
_RELEASED = {
    "encoder": "resnet50",
    "image_size": 224,
    "views": "imagenet",
    "optimizer": "lars",
    "batch_size": 4096,
    "learning_rate": 4.8,
    "weight_decay": 1e-6,
    "epochs": 100,
    "warmup_epochs": 10,
}
_SMALL = {
    **_RELEASED,
    "encoder": "resnet18",
    "image_size": 32,
    "views": "small",
    "optimizer": "sgd",
    "batch_size": 512,
    "learning_rate": 0.5,
    "weight_decay": 1e-4,
    "epochs": 200,
}
RECIPES = {
    "folder": _RELEASED,
    "cifar10": _SMALL,
    "cifar100": _SMALL,
    "stl10": {**_SMALL, "image_size": 64},
    "digits": {
        **_SMALL,
        "encoder": "small",
        "image_size": 8,
        "views": "affine",
        "optimizer": "adamw",
        "batch_size": 256,
        "learning_rate": 2e-3,
        "epochs": 60,
        "warmup_epochs": 3,
    },
    "patches": {
        **_SMALL,
        "encoder": "small",
        "optimizer": "adamw",
        "batch_size": 256,
        "learning_rate": 2e-3,
        "epochs": 20,
        "warmup_epochs": 2,
    },
    "fake": {**_SMALL, "encoder": "small", "batch_size": 128, "epochs": 2, "warmup_epochs": 0},
}


def resolve_device(name: str) -> str:
    """``name``, "auto" being CUDA where there is one. ValueError for one that cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: expected one of this machine, got {name!r} ({reason})") from None
    return name


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. None stands for the default of the data set's recipe (RECIPES)."""

    data: str = "digits"
    data_root: str | None = None  # folder of the torchvision sets
    download: bool = False
    encoder: str | None = None
    image_size: int | None = None  # side of the crops, pixels
    views: str | None = None
    mode: str = "directclr"
    dim: int | None = None  # None: the paper's share, 360 of 2048
    temperature: float = 0.1
    negatives: str = "cross"
    loss: str = "fast"
    optimizer: str | None = None
    batch_size: int | None = None
    learning_rate: float | None = None  # peak; not scaled by the batch size
    weight_decay: float | None = None
    epochs: int | None = None
    warmup_epochs: int | None = None
    amp: str = "none"
    chunk_size: int | None = None  # images encoded at a time; None: the whole batch (gradcache.py)
    cache_bn: str | None = None  # what BatchNorm does then, one of gradcache.RULES
    max_skipped: int = 10  # steps in a row without a finite loss and gradient, after which it stops
    compile: bool = False
    channels_last: bool = True
    device: str = "auto"
    workers: int = 0
    seed: int = 0
    max_steps: int | None = None  # stop after this many steps; the schedule stays that of `epochs`
    save_every: int | None = None  # steps between checkpoints; None: once an epoch
    log_every: int = 1
    checkpoint_dir: str = "runs"
    name: str = "directclr"

    # What may differ between a checkpoint and the run that resumes it.
    FREE = (
        "data_root", "download", "device", "workers", "max_steps", "save_every", "log_every",
        "checkpoint_dir", "name", "compile", "loss", "chunk_size", "cache_bn", "max_skipped",
    )  # fmt: skip

    def resolve(self) -> TrainConfig:
        """The same settings with every default filled in and checked.

        Raises ValueError: setting, expected, got.
        """
        spec = self.data
        kind = spec.partition(":")[0]
        if kind not in RECIPES and os.path.isdir(spec):  # the released trainer takes a bare path
            spec, kind = f"folder:{spec}", "folder"
        if kind not in RECIPES:
            raise ValueError(f"data: expected one of {', '.join(SETS)}, got {spec!r}")
        filled = {k: v for k, v in RECIPES[kind].items() if getattr(self, k) is None}
        if self.epochs is not None and "warmup_epochs" in filled:
            # A run shorter than the recipe's must not end before it is warm.
            filled["warmup_epochs"] = min(filled["warmup_epochs"], self.epochs // 2)
        config = dataclasses.replace(self, data=spec, device=resolve_device(self.device), **filled)
        config._check()
        return config

    def _check(self) -> None:
        choices = {
            "encoder": ENCODERS,
            "views": PRESETS,
            "mode": MODES,
            "negatives": NEGATIVES,
            "optimizer": OPTIMIZERS,
            "loss": LOSSES,
            "amp": AMP,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        if self.cache_bn is not None and self.cache_bn not in RULES:
            allowed = ", ".join(RULES)
            raise ValueError(f"cache_bn: expected one of {allowed}, got {self.cache_bn!r}")
        if self.cache_bn is not None and self.chunk_size is None:
            raise ValueError(f"cache_bn: expected chunk_size with it, got {self.cache_bn!r} alone")
        at_least = {
            "batch_size": 2, "epochs": 1, "warmup_epochs": 0, "image_size": 2, "workers": 0,
            "log_every": 1, "dim": 1, "max_steps": 1, "save_every": 1, "seed": 0,
            "chunk_size": 1, "max_skipped": 1,
        }  # fmt: skip
        for name, low in at_least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name}: expected at least {low}, got {value}")
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs: expected at most {self.epochs} (epochs), got {self.warmup_epochs}"
            )
        if self.seed >= 2**63 - 1:  # seed + 1 is that of the views
            raise ValueError(f"seed: expected less than 2**63 - 1, got {self.seed}")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature: expected a positive finite number, got {self.temperature}"
            )
        if "/" in self.name or "\\" in self.name or self.name in ("", ".", ".."):
            raise ValueError(f"name: expected the name of one folder, got {self.name!r}")
        if self.amp == "fp16" and not self.device.startswith("cuda"):
            raise ValueError(f"amp: expected 'none' or 'bf16' on {self.device}, got 'fp16'")

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, as config.json and the checkpoint hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The settings of :meth:`to_dict`; ValueError for a name this version does not know."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config: expected settings of this version, got {unknown[0]!r}")
        return cls(**values)
