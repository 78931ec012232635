"""Optimisers and the learning-rate schedule of the paper's recipe.

LARS is the variant of the DirectCLR release.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from .config import OPTIMIZERS, check_setting


class LARS(torch.optim.Optimizer):
    r"""Layer-wise adaptive SGD. For a parameter w of two or more dimensions with gradient g and
    momentum buffer u:

    .. code-block:: text

        g <- g + weight_decay w
        g <- g trust |w| / |g|        (factor 1 where |w| = 0 or |g| = 0)
        u <- momentum u + g
        w <- w - lr u

    and for the others u <- momentum u + g, w <- w - lr u.

    Args:
        params: parameters or groups, as for any torch optimiser.
        lr, momentum, weight_decay: as above.
        trust: the trust coefficient, 0.001 in the release.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("trust", trust)):
            if not value >= 0.0:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum: expected 0 <= momentum < 1, got {momentum}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for params in self._alike(group["params"]).values():
                self._update(params, group)
        return loss

    @staticmethod
    def _alike(params) -> dict[tuple, list[Tensor]]:
        """Parameters by (device, dtype, adapted or not): what foreach can take at once."""
        kinds = defaultdict(list)
        for p in params:
            if p.grad is not None:
                kinds[p.device, p.dtype, p.dim() > 1].append(p)
        return kinds

    def _update(self, params: list[Tensor], group: dict) -> None:
        grads = [p.grad for p in params]
        if params[0].dim() > 1:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            ratios = [
                torch.where((w > 0) & (g > 0), group["trust"] * w / g, 1.0)
                for w, g in zip(torch._foreach_norm(params), torch._foreach_norm(grads))
            ]
            torch._foreach_mul_(grads, ratios)
        buffers = []
        for p in params:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            buffers.append(state["momentum"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])


def build_optimizer(
    name: str, model: nn.Module, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser called ``name`` for every trainable parameter of ``model``.

    "lars" as above; "sgd" (momentum) and "adamw" leave one-dimensional parameters without decay.
    """
    check_setting("optimizer", name, choices=OPTIMIZERS)
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "lars":
        return LARS(params, lr, weight_decay=weight_decay)
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9)
    # Fused on a GPU: there it counts its steps on the device (see guard.py).
    return torch.optim.AdamW(groups, lr, fused=params[0].is_cuda or None)


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Learning rate of step ``step`` of ``total``: linear from 0 to ``peak`` over ``warmup`` steps,
    then half a cosine from ``peak`` to 0.001 ``peak``."""
    if step < warmup:
        return peak * step / warmup
    cosine = 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    return peak * (cosine + 0.001 * (1.0 - cosine))
