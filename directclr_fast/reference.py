r"""The specification: the loss and its gradients in plain PyTorch, any dtype up to fp64.

With x_v = r_v[:, columns], z = x / max(|x|, eps), a = 1/temperature and s_ij = z1_i . z2_j,

.. code-block:: text

    row_i = log sum_j exp(a s_ij)          over the candidates of anchor i of view 1
    col_j = log sum_i exp(a s_ij)          over the candidates of anchor j of view 2
    l_i   = (row_i + col_p(i)) / 2 - a s_ip(i)     symmetric;     row_i - a s_ip(i)   one direction

where p(i) = row_offset + i is the positive of anchor i. Which candidates there are is
``negatives``: "cross", the other view's rows (Jing et al., released trainer; CLIP); "both", the
other rows of both views as well (NT-Xent, SimCLR); "same" is the paper's Eq. 2, without
normalisation and temperature: logits -|z_i - z'_i|^2 / 2 for the positive and -|z_i - z_j|^2 / 2
for the other rows j != i of the anchor's own view.

Labels (N,), row i of view 1 having that of its positive: with ``same_label`` "positive" all
candidates of an anchor's label are its positives, and their mean stands for a s_ip(i) in l_i
(Khosla et al., arXiv 2004.11362, L_out); with "ignore" those but p(i) are no candidates.

Without labels the gradients for "cross" are (upstream g_i per row; w_i = g_i / 2 symmetric, else
g_i, and v_j the same for columns, zero where column j is nobody's positive or the loss has one
direction):

.. code-block:: text

    G_ij = w_i exp(a s_ij - row_i) + v_j exp(a s_ij - col_j) - [j = p(i)] (w_i + v_j)
    dz1  = a G z2           dz2 = a G^T z1          dloss/da = sum_ij G_ij s_ij
    dx   = (dz - z (z . dz)) / |x|                  (dz / eps where |x| < eps, as F.normalize)

"both" adds, with S11 = z1 z1^T, H1_ij = w_i exp(a s11_ij - row_i) for i != j, the terms
dz1 += a (H1 + H1^T) z1 and sum_ij H1_ij s11_ij, and the same for view 2 with v and col.

This module materialises S. It is what every backend is tested against, and what runs the options
no fast backend has. :func:`loss` is made of differentiable operations (any order of derivative);
tests/test_loss_formula.py holds the closed form above to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem


def take_columns(r: Tensor, problem: Problem, columns: Tensor | None) -> Tensor:
    """The sub-vectors (G, rows, d) of ``r`` (rows, width) in the compute dtype."""
    x = r[None, :, : problem.dim] if columns is None else r[:, columns].movedim(0, 1)
    return x.to(problem.compute_dtype)


def _unit_rows(x: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1, eps=eps)


def _scale(problem: Problem, temperature: Tensor | None, like: Tensor) -> Tensor | float:
    if temperature is None:
        return 1.0 / problem.temperature
    return 1.0 / temperature.to(device=like.device, dtype=like.dtype)


def _negative_infinity_diagonal(s: Tensor) -> Tensor:
    eye = torch.eye(s.shape[-2], s.shape[-1], dtype=torch.bool, device=s.device)
    return s.masked_fill(eye, float("-inf"))


def _cosine_logits(
    problem: Problem, x1: Tensor, x2: Tensor, a: Tensor | float, labels: Tensor | None
):
    """Logits of both directions: (G, M, candidates of view 1), (G, N, candidates of view 2); the
    positives' (G, M), and of either direction the mean over an anchor's positives."""
    z1, z2 = _unit_rows(x1, problem.eps), _unit_rows(x2, problem.eps)
    s = a * (z1 @ z2.mT)
    logits1, logits2 = s, s.mT
    # Not torch.diagonal: Inductor of PyTorch 2.11 compiles its gradient beside logsumexp's wrongly.
    row = torch.arange(s.shape[-2], device=s.device)[:, None] + problem.row_offset
    other = row != torch.arange(s.shape[-1], device=s.device)
    positives = s.masked_fill(other, 0.0).sum(-1)
    if problem.negatives == "both":
        logits1 = torch.cat([s, _negative_infinity_diagonal(a * (z1 @ z1.mT))], -1)
        logits2 = torch.cat([s.mT, _negative_infinity_diagonal(a * (z2 @ z2.mT))], -1)
    if labels is None:
        return logits1, logits2, positives, positives, positives
    labels = distinct(labels)
    own = slice(problem.row_offset, problem.row_offset + problem.rows)
    same = labels[own, None] == labels
    logits1, mean1 = _by_label(problem, logits1, same, ~other)
    logits2, mean2 = _by_label(problem, logits2, same.mT, ~other.mT)
    if problem.ignores:
        return logits1, logits2, positives, positives, positives
    return logits1, logits2, positives, mean1, mean2[:, own]


def distinct(labels: Tensor) -> Tensor:
    """The same labels, of which the negative ones equal no other."""
    return torch.where(labels < 0, -1 - torch.arange(len(labels), device=labels.device), labels)


def _by_label(problem: Problem, logits: Tensor, same: Tensor, positive: Tensor):
    """The logits (G, anchors, candidates) without what is ignored, and each anchor's mean over the
    candidates of its label (``same``), which is none of its own row."""
    if problem.negatives == "both":
        same = torch.cat([same, same], -1)
        positive = torch.cat([positive, torch.zeros_like(positive)], -1)
    same = same & (logits != float("-inf"))
    if problem.ignores:
        logits = logits.masked_fill(same & ~positive, float("-inf"))
    return logits, logits.masked_fill(~same, 0.0).sum(-1) / same.sum(-1).clamp_min(1)


def _distance_logits(x1: Tensor, x2: Tensor):
    """Logits of the paper's Eq. 2 for anchors of view 1 and of view 2."""
    positives = -0.5 * (x1 - x2).square().sum(-1)

    def of_view(x: Tensor) -> Tensor:
        # -|x_i - x_j|^2 / 2 expanded, so that memory is N x N and not N x N x d. The positives
        # keep the explicit difference: near pairs are where the expansion would cancel.
        half = 0.5 * x.square().sum(-1)
        others = x @ x.mT - half[..., :, None] - half[..., None, :]
        return torch.cat([_negative_infinity_diagonal(others), positives[..., None]], -1)

    return of_view(x1), of_view(x2), positives


def loss(
    problem: Problem,
    r1: Tensor,
    r2: Tensor,
    columns: Tensor | None = None,
    temperature: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Loss and statistics by the formula above, differentiable in r1, r2 and temperature.

    Returns ``(loss, row_lse, col_lse, positives, top1)``: the reduced loss (scalar, or (M,) for
    reduction "none"), row_lse (G, M), col_lse (G, N) and the positive logits a s_ip(i) (G, M), in
    fp64 for fp64 inputs and fp32 otherwise. col_lse is empty when ``symmetric`` is False. top1
    (G, directions, M) bool is there where the problem asks for it: no logit is larger, or NaN.
    """
    x1, x2 = take_columns(r1, problem, columns), take_columns(r2, problem, columns)
    if problem.negatives == "same":
        logits1, logits2, positives = _distance_logits(x1, x2)
        mean1 = mean2 = positives
    else:
        a = _scale(problem, temperature, x1)
        logits1, logits2, positives, mean1, mean2 = _cosine_logits(problem, x1, x2, a, labels)
    row_lse = torch.logsumexp(logits1, -1)
    per_row = row_lse - mean1
    col_lse = row_lse.new_empty((problem.groups, 0))
    directions = [logits1]
    if problem.symmetric:
        own = slice(problem.row_offset, problem.row_offset + problem.rows)
        col_lse = torch.logsumexp(logits2, -1)
        per_row = 0.5 * (per_row + (col_lse[:, own] - mean2))
        directions.append(logits2[:, own])
    top1 = None
    if problem.return_stats:
        top1 = torch.stack([positives >= logits.amax(-1) for logits in directions], 1)
    return reduce(problem, per_row.sum(0)), row_lse, col_lse, positives, top1


def reduce(problem: Problem, per_row: Tensor) -> Tensor:
    """(M,) per-row losses to the reduction asked for."""
    if problem.reduction == "mean":
        return per_row.mean()
    return per_row.sum() if problem.reduction == "sum" else per_row


def row_weights(problem: Problem, dloss: Tensor) -> Tensor:
    """The upstream gradient as one weight per row: (M,), the reduction's factor included."""
    weights = dloss.expand(problem.rows)
    return weights / problem.rows if problem.reduction == "mean" else weights
