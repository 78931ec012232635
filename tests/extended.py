"""The loss and its gradients in more than fp64: what fp64 results are held against.

The formulas are those of docs/design.md section 2, written once more with NumPy operators alone.
Numbers are ``numpy.longdouble`` where that has more bits than a double (80-bit on x86, 128-bit on
Linux for ARM and RISC-V). Elsewhere they are ``mpmath`` numbers in object arrays, which is a
thousand times slower: :data:`STRIDE` then leaves out most of the generated cases.
"""

from __future__ import annotations

from typing import NamedTuple

import mpmath
import numpy as np
import torch

U64 = torch.finfo(torch.float64).eps / 2  # the largest relative error of one fp64 operation
WIDE = np.finfo(np.longdouble).eps < U64 / 1000
STRIDE = 1 if WIDE else 50


class Arithmetic(NamedTuple):
    """Numbers of one kind and their functions, on NumPy arrays."""

    array: object  # fp64 array -> array of these numbers, exactly
    exp: object
    log: object
    sqrt: object


LONG_DOUBLE = Arithmetic(lambda x: x.astype(np.longdouble), np.exp, np.log, np.sqrt)
MPMATH = Arithmetic(
    np.frompyfunc(mpmath.mpf, 1, 1),
    np.frompyfunc(mpmath.exp, 1, 1),
    np.frompyfunc(mpmath.log, 1, 1),
    np.frompyfunc(mpmath.sqrt, 1, 1),
)


class Truth(NamedTuple):
    """Loss (M,) or 0-dim, gradients of both views and of the temperature."""

    loss: np.ndarray
    dr1: np.ndarray
    dr2: np.ndarray
    dtemperature: np.ndarray


def infonce(
    r1: torch.Tensor,
    r2: torch.Tensor,
    upstream: torch.Tensor,
    *,
    dim: int | None = None,
    columns: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 0.1,
    negatives: str = "cross",
    symmetric: bool = True,
    reduction: str = "mean",
    eps: float = 1e-12,
    arithmetic: Arithmetic = LONG_DOUBLE if WIDE else MPMATH,
) -> Truth:
    """``fast_directclr_loss`` of fp64 views r1 (M, R), r2 (N, R), and its gradients."""
    with mpmath.workprec(100):
        return _infonce(
            arithmetic, r1, r2, upstream, dim, columns, temperature, negatives, symmetric,
            reduction, eps,
        )  # fmt: skip


def _infonce(
    number, r1, r2, upstream, dim, columns, temperature, negatives, symmetric, reduction, eps
) -> Truth:
    x1, x2, up, t, eps = (
        number.array(np.asarray(value, np.float64))
        for value in (r1.numpy(), r2.numpy(), upstream.numpy(), float(temperature), eps)
    )
    rows, width = x1.shape
    if columns is not None:
        groups = columns.reshape(-1, columns.shape[-1]).numpy()
    else:
        groups = [np.arange(width if dim is None else dim)]
    per_row = up if reduction == "none" else np.full(rows, up)
    g = per_row / rows if reduction == "mean" else per_row
    zero = x1[0, 0] * 0
    loss, da = np.full(rows, zero), zero
    dr1, dr2 = np.full(x1.shape, zero), np.full(x2.shape, zero)
    for index in groups:
        terms = _group(number, x1[:, index], x2[:, index], g, 1 / t, negatives, symmetric, eps)
        loss, da = loss + terms[0], da + terms[3]
        dr1[:, index] += terms[1]
        dr2[:, index] += terms[2]
    if reduction != "none":
        loss = loss.sum() / (rows if reduction == "mean" else 1)
    return Truth(loss, dr1, dr2, -da / (t * t))


def _group(number, x1, x2, g, a, negatives, symmetric, eps):
    """(loss by row, dx1, dx2, dloss/da) of one column group; g (M,) weighs the rows."""
    (z1, n1), (z2, n2) = _unit(number, x1, eps), _unit(number, x2, eps)
    m, n = len(z1), len(z2)
    w = g / 2 if symmetric else g
    v = np.full(n, g[0] * 0)
    v[:m] += w if symmetric else 0
    s = z1 @ z2.T
    own = [(z1, w), (z2, v)] if negatives == "both" else []
    selves = [z @ z.T for z, _ in own]
    rows = np.concatenate([s, *selves[:1]], 1)
    columns = np.concatenate([s.T, *selves[1:]], 1)
    hidden = np.zeros(rows.shape, bool), np.zeros(columns.shape, bool)
    if own:
        for mask in hidden:
            mask[np.arange(len(mask)), -len(mask) + np.arange(len(mask))] = True
    (row_lse, p), (col_lse, q) = (
        _softmax(number, a * logits, mask) for logits, mask in zip((rows, columns), hidden)
    )
    diagonal = s[np.arange(m), np.arange(m)]
    loss = row_lse - a * diagonal
    if symmetric:
        loss = (loss + col_lse[:m] - a * diagonal) / 2
    h = w[:, None] * p[:, :n] + (v[:, None] * q[:, :m]).T
    h[np.arange(m), np.arange(m)] -= w + v[:m]
    dz1, dz2, da = a * (h @ z2), a * (h.T @ z1), (h * s).sum()
    for view, (z, weight) in enumerate(own):
        k = weight[:, None] * (p[:, n:] if view == 0 else q[:, m:])
        da = da + (k * selves[view]).sum()
        (dz1, dz2)[view][:] += a * ((k + k.T) @ z)
    return loss, _through(dz1, z1, n1, eps), _through(dz2, z2, n2, eps), da


def _unit(number, x, eps):
    norm = number.sqrt((x * x).sum(1))
    return x / np.maximum(norm, eps)[:, None], norm


def _softmax(number, logits, hidden):
    """(log-sum-exp, probabilities) by row, without the hidden entries."""
    top = np.where(hidden, logits.min() - 1, logits).max(1)
    e = np.where(hidden, logits[0, 0] * 0, number.exp(logits - top[:, None]))
    total = e.sum(1)
    return top + number.log(total), e / total[:, None]


def _through(dz, z, norm, eps):
    """The gradient before the normalisation: (dz - z (z . dz)) / |x|, dz / eps for short rows."""
    dot = np.where(norm >= eps, (z * dz).sum(1), norm * 0)
    return (dz - z * dot[:, None]) / np.maximum(norm, eps)[:, None]


def distance(value, truth: np.ndarray) -> float:
    """|value - truth| (Frobenius) of fp64 or wider numbers and a part of a :class:`Truth`."""
    value, truth = np.atleast_1d(np.asarray(value)), np.atleast_1d(truth)
    if value.dtype == np.longdouble and truth.dtype == object:
        # mpmath would take a long double through a double.
        truth = np.frompyfunc(lambda x: float(x) + np.longdouble(float(x - float(x))), 1, 1)(truth)
        truth = truth.astype(np.longdouble)
    difference = value - truth
    return float((difference * difference).sum()) ** 0.5


def rounding(
    r1: torch.Tensor,
    r2: torch.Tensor,
    upstream: torch.Tensor,
    *,
    dim: int | None = None,
    columns: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 0.1,
    negatives: str = "cross",
    reduction: str = "mean",
    eps: float = 1e-12,
    unit: float = U64,
    **_,
) -> Truth:
    r"""Bounds of the error that arithmetic of unit roundoff u may leave, in the norms of a Truth.

    Every sum of k products errs by at most k u times the sum of their sizes, in whatever order and
    with or without fused multiply-adds, so the bounds hold for every BLAS:

    .. code-block:: text

        z        e_z = (d/2 + 3) u                  norm, division
        s        e_s = 2 e_z + (d + 1) u            |z_i| = |z_j| = 1
        logit    a (e_s + 2 u) = a e                a = 1/T rounded, then multiplied
        p, q     e_p = 2 a e + (k + 8) u, relative  k candidates; exp, sum, division
        loss_i   2 a e + (k + 8) u (1 + log k)      log-sum-exp minus the positive logit
        G        sum_ij |error| <= 2 W (e_p + 4 u)  W = sum_i |g_i|; |p - 1| counts as p
        dz       a 2 W (e_p + 4 u + e_z + k u + 2 u)
        dx       (|error of dz| + 2 (d + 4) u 2 a W) / min |x|
        dT       a^2 2 W (e_p + 4 u + e_s + (k + 4) u)

    The gradients' lines are twice that for "both", whose terms run over H and its transpose.
    """
    u, a = unit, 1 / float(temperature)
    d = columns.shape[-1] if columns is not None else (r1.shape[1] if dim is None else dim)
    sub = (slice(None),) if columns is None else tuple(columns.reshape(-1, d))
    shortest = min(
        float((r[:, index][:, :d] if columns is None else r[:, index]).norm(dim=1).min())
        for r in (r1, r2)
        for index in sub
    )
    k = len(r2) * (2 if negatives == "both" else 1)
    total = float(upstream.abs().sum()) * len(sub)
    total *= len(r1) if reduction == "sum" else 1
    twice = 2 if negatives == "both" else 1
    e_z = (d / 2 + 3) * u
    e_s = 2 * e_z + (d + 1) * u
    e = e_s + 2 * u
    e_p = 2 * a * e + (k + 8) * u
    dz = a * 2 * twice * total * (e_p + 4 * u + e_z + (k + 2) * u)
    dx = (dz + 2 * (d + 4) * u * 2 * twice * a * total) / max(shortest, eps)
    return Truth(
        # Of the loss itself, which no upstream gradient weighs.
        loss=(2 * a * e + (k + 8) * u * (1 + np.log(k))) * len(sub)
        * {"mean": 1, "sum": len(r1), "none": len(r1) ** 0.5}[reduction],
        dr1=dx,
        dr2=dx,
        dtemperature=a * a * 2 * twice * total * (e_p + 4 * u + e_s + (k + 4) * u),
    )  # fmt: skip
