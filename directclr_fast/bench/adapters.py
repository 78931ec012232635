"""Losses of other libraries beside their stand-ins: value, gradients, time, memory.

Both are made by the same words and called with the same tensors. A library that is not installed
is left out and named. Times are interleaved; a peak is that of one step in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..testing import make_views, relative_error
from . import memory, study, timing

OURS = "directclr_fast.adapters."
FLAGS = {
    "--rows": {"type": int, "nargs": "+", "default": [512, 2048, 8192]},
    "--dim": {"type": int, "default": 512},
    "--rounds": {"type": int, "default": 7},
}


def _clip(module, dim: int) -> Callable[..., Tensor]:
    loss = module.ClipLoss()
    # It expects unit rows.
    return lambda a, b: loss(nn.functional.normalize(a), nn.functional.normalize(b), 14.3)


def _ranking(module, dim: int) -> Callable[..., Tensor]:
    loss = module.MultipleNegativesRankingLoss(nn.Identity(), scale=20.0)
    columns = loss.compute_loss_from_embeddings
    # Each row's neighbour, moved a little, is a hard negative.
    return lambda a, b: columns([a, b, b.roll(1, 0) + 0.1], None)


def _cached(module, dim: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(dim, dim, generator=generator) / dim**0.5
    weights = {dtype: weight.to(dtype) for dtype in (torch.float32, torch.float64)}

    class Encoder(nn.Module):
        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            rows = features["input"]
            return {"sentence_embedding": torch.tanh(rows @ weights[rows.dtype])}

    # The original takes the first module of its model for the one that reads tokens.
    model = nn.Sequential(Encoder())
    loss = module.CachedMultipleNegativesRankingLoss(model, mini_batch_size=256)
    return lambda a, b: loss([{"input": a}, {"input": b}], None)


# The stand-in's class; the module of the original; the stand-in's module; how both are called.
PAIRS = {
    "NTXentLoss": ("lightly.loss", "lightly", lambda module, _: module.NTXentLoss(0.1)),
    "DirectCLRLoss": (
        "lightly.loss", "lightly", lambda module, dim: module.DirectCLRLoss(dim * 3 // 4, 0.1),
    ),
    "ClipLoss": ("open_clip.loss", "open_clip", _clip),
    "SelfSupervisedLoss": (
        "pytorch_metric_learning.losses", "pytorch_metric_learning",
        lambda module, _: module.SelfSupervisedLoss(module.NTXentLoss(0.1)),
    ),
    "MultipleNegativesRankingLoss": (
        "sentence_transformers.losses", "sentence_transformers", _ranking,
    ),
    "CachedMultipleNegativesRankingLoss": (
        "sentence_transformers.losses", "sentence_transformers", _cached,
    ),
}  # fmt: skip


def _step(
    module: str, name: str, rows: int, dim: int, dtype: torch.dtype = torch.float32
) -> Callable[[], list[Tensor]]:
    """A function that returns the loss and both gradients."""
    loss = PAIRS[name][2](importlib.import_module(module), dim)
    views = [view.to(dtype).requires_grad_() for view in make_views(rows, dim)]

    def step() -> list[Tensor]:
        for view in views:
            view.grad = None
        value = loss(*views)
        value.backward()  # the cached loss runs its encoder again in a hook of this
        return [value.detach(), *(view.grad for view in views)]

    return step


def _peak(module: str, name: str, rows: int, dim: int) -> dict:
    with memory.limited():
        _step(module, name, memory.WARM_ROWS, dim)()
        return {"peak_mib": memory.peak(_step(module, name, rows, dim)) / memory.MIB}


def measure(arguments: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """Every pair at every N."""
    for name, (original, ours, _) in PAIRS.items():
        try:
            present = hasattr(importlib.import_module(original), name)
        except ImportError:
            present = False
        if not present:
            yield {"name": name, "absent": original}, f"{name}: no {original} here has it"
            continue
        for rows in arguments.rows:
            sides = {"original": original, "ours": OURS + ours}
            yield _pair(name, sides, rows, arguments)


def _pair(
    name: str, sides: dict[str, str], rows: int, arguments: argparse.Namespace
) -> tuple[dict, str]:
    asked = {side: (module, name, rows, arguments.dim) for side, module in sides.items()}
    case = {"name": name, "rows": rows, "dim": arguments.dim}
    case |= {side: memory.isolated(_peak, *which) for side, which in asked.items()}
    steps = {side: _step(*which) for side, which in asked.items() if "failed" not in case[side]}
    # The tests hold both sides' fp64 to each other.
    truth = _step(*asked["ours"], torch.float64)()
    for side, step in steps.items():
        errors = list(map(relative_error, step(), truth))
        case[side] |= {"value_error": errors[0], "gradient_error": max(errors[1:])}
    with memory.limited():
        for side, times in timing.interleaved(steps, arguments.rounds).items():
            case[side] |= times
    return case, f"{name} N {rows}: " + ", ".join(_text(side, case[side]) for side in asked)


def _text(side: str, record: dict) -> str:
    if "failed" in record:
        return f"{side} failed ({record['failed'][:60]})"
    return f"{side} {record['median'] * 1e3:.1f} ms {record['peak_mib']:.0f} MiB"


study.as_script(__name__)
