"""Inputs, error measures and the one tolerance rule that tests and benchmarks share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .problem import Problem

KINDS = ("unrelated", "views", "converged", "clustered", "ties", "duplicate", "antipodal")


def make_views(
    rows: int,
    width: int,
    *,
    kind: str = "views",
    candidates: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Two views (rows, width) and (candidates, width), drawn in fp64 and rounded to ``dtype``.

    ``kind``: "unrelated" Gaussian rows; "views", two noisy copies of each point; "converged",
    copies so near that the positive takes most of the probability; "clustered" rows around few
    centres; "ties", views with equal rows: of every eight, 0 and 1 in view 1, 2 and 3 in view 2, 4
    to 6 in and across both, 7 with every other 7 in both; "duplicate", every row the same;
    "antipodal", view 2 is minus view 1.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    candidates = rows if candidates is None else candidates
    most = max(rows, candidates)
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = gaussian(most, width)
    if kind == "clustered":
        base = gaussian(8, width)[torch.arange(most) % 8] + 0.3 * base
    if kind == "duplicate":
        base = base[:1].expand(most, width)
    noise = {"unrelated": 0.0, "converged": 0.05, "duplicate": 0.0}.get(kind, 0.7)
    r1 = base[:rows] + noise * gaussian(rows, width)
    r2 = base[:candidates] + noise * gaussian(candidates, width)
    if kind == "unrelated":
        r2 = gaussian(candidates, width)
    if kind == "antipodal":
        r1, r2 = base[:rows], -base[:candidates]
    scale = torch.exp(gaussian(most, 1))  # rows of different lengths
    r1, r2 = r1 * scale[:rows], r2 * scale[:candidates]
    if kind == "ties":
        first = torch.arange(most) // 8 * 8
        first += torch.tensor([0, 0, 2, 2, 4, 4, 4, 7]).repeat(most // 8 + 1)[:most]
        first[7::8] = 7
        r1, r2 = r1[first[:rows]], r2[first[:candidates]]
        # What has its own row beside an equal one lies clearly nearer to the other view's: only
        # exact ties compete at small temperatures, and what rounds a s otherwise does not matter.
        r2[1:rows:8] = r1[1::8] + 0.3 * r2[1:rows:8]
        r1[3::8] = r2[3:rows:8] + 0.3 * r1[3::8]
        for row in (4, 5, 6):
            r2[row:rows:8] = r1[row::8]
    return r1.to(device, dtype), r2.to(device, dtype)


def eager_loss(
    r1: Tensor,
    r2: Tensor,
    dim: int | None = 360,
    temperature: float | Tensor = 0.1,
    *,
    columns: Tensor | None = None,
    labels: Tensor | None = None,
    negatives: str = "cross",
    same_label: str = "positive",
    symmetric: bool = True,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """What people write in plain PyTorch, in the inputs' own dtype: the yardstick for errors.

    ``normalize``, a product, ``cross_entropy`` against the index, both directions; NT-Xent for
    negatives "both"; masks of equal labels. Written apart from ``directclr_fast.reference``.
    """
    if columns is not None and columns.dim() == 2:
        return sum(
            eager_loss(
                r1, r2, None, temperature, columns=group, labels=labels,
                negatives=negatives, same_label=same_label, symmetric=symmetric,
                reduction=reduction, eps=eps,
            )
            for group in columns
        )  # fmt: skip

    def unit(r: Tensor) -> Tensor:
        return F.normalize(r[:, :dim] if columns is None else r[:, columns], dim=1, eps=eps)

    z1, z2 = unit(r1), unit(r2)
    target = torch.arange(len(z1), device=z1.device)

    def losses(logits: Tensor, target: Tensor, repeats: int = 1) -> Tensor:
        if labels is None:
            return F.cross_entropy(logits, target, reduction="none")
        anchors, candidates = labels[target % len(z1), None], labels.repeat(repeats)
        same = (anchors == candidates[: logits.shape[1]]) & (anchors >= 0) & (logits != -torch.inf)
        positive = torch.zeros_like(same).scatter_(1, target[:, None], True)
        if same_label == "ignore":
            logits = logits.masked_fill(same & ~positive, -torch.inf)
            return F.cross_entropy(logits, target, reduction="none")
        same |= positive
        return -torch.where(same, logits.log_softmax(1), 0.0).sum(1) / same.sum(1)

    if negatives == "both":
        n = len(z1)
        z = torch.cat([z1, z2])
        logits = (z @ z.T) / temperature
        logits = logits.masked_fill(
            torch.eye(2 * n, dtype=torch.bool, device=z.device), float("-inf")
        )
        both = losses(logits, torch.cat([target + n, target]), 2)
        per_row = (both[:n] + both[n:]) / 2 if symmetric else both[:n]
    else:
        logits = (z1 @ z2.T) / temperature
        per_row = losses(logits, target)
        if symmetric:
            other = losses(logits.T[: len(z1)], target)
            per_row = (per_row + other) / 2
    if reduction == "none":
        return per_row
    return per_row.mean() if reduction == "mean" else per_row.sum()


def problem(**changes) -> Problem:
    """A small fp32 call on the CPU, with ``changes``."""
    given = {"rows": 64, "candidates": 64, "width": 32, "dim": 16, "dtype": torch.float32}
    return Problem(**(given | {"device_type": "cpu"} | changes))


def backends(device_type: str = "cpu") -> list[str]:
    """Names of the fast backends that run such a call on ``device_type`` here."""
    asked = problem(device_type=device_type)
    loaded = {name: dispatch.load(name) for name in dispatch.PRIORITY if name != "reference"}
    return [n for n, b in loaded.items() if not (b.why_not(asked) or b.why_not_unasked(asked))]


class Result(NamedTuple):
    """Loss and gradients of one call, detached; dtemperature is None for a number."""

    loss: Tensor
    dr1: Tensor
    dr2: Tensor
    dtemperature: Tensor | None


def evaluate(
    function, r1: Tensor, r2: Tensor, *args, temperature=0.1, upstream: Tensor | None = None, **kw
) -> Result:
    """Calls ``function(r1, r2, *args, temperature=..., **kw)`` and takes every gradient.

    ``upstream`` is the gradient given to the loss (ones where None); a tensor temperature gets its
    gradient too.
    """
    r1, r2 = r1.detach().requires_grad_(), r2.detach().requires_grad_()
    inputs = [r1, r2]
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().requires_grad_()
        inputs.append(temperature)
    loss = function(r1, r2, *args, temperature=temperature, **kw)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
    grads = torch.autograd.grad(loss, inputs, upstream)
    return Result(loss.detach(), grads[0], grads[1], grads[2] if len(grads) == 3 else None)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| (Frobenius), in fp64; equal non-finite entries count as equal."""
    value, truth = value.detach().cpu().double(), truth.detach().cpu().double()
    if value.shape != truth.shape:
        raise ValueError(f"value: expected shape {tuple(truth.shape)}, got {tuple(value.shape)}")
    same = (value == truth) | (value.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, value - truth)
    size = torch.where(truth.isfinite(), truth, 0.0).norm()
    return float(difference.norm() / size) if size > 0 else float(difference.norm())


# Below this an error is rounding that no implementation is blamed for: a few units in the last
# place of the statistics, and of a gradient rounded to the input dtype.
FLOOR = {
    torch.float64: 4e-15,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
FACTOR = 2.0


def bound(eager_error: float, dtype: torch.dtype) -> float:
    """The largest error allowed: twice that of eager PyTorch in the same dtype, plus the floor."""
    return FACTOR * eager_error + FLOOR[dtype]
