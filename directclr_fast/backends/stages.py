"""The order of the five stages, written once for every backend that offers them separately.

A backend hands in an object with the methods of :class:`Stages`; this module walks column groups
and pairs of views, forms the per-row terms between the heavy stages (all O(N) work), and returns
what the op layer saves. The mathematics is in ``directclr_fast.reference`` and docs/design.md.

The sums leave the positive out and hand its logit a s_ip(i) on. With rest_i = log of the sum over
the other candidates,

.. code-block:: text

    nll_i   = softplus(rest_i - a s_ip(i))          = -log p_i, without cancellation for p_i near 1
    lse_i   = a s_ip(i) + nll_i
    G_ip(i) = w_i (p_i - 1) + ... = w_i expm1(-nll_i) + ...

so a converged model's gradient, made of the small numbers 1 - p_i, keeps its relative accuracy.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..problem import Problem
from ..reference import reduce, row_weights


class Saved(NamedTuple):
    """What the backward pass needs. M rows, N candidates, d columns, G groups; no N x N tensor.

    z1 (G, M, d), z2 (G, N, d) unit rows in the compute dtype (a backend may pad d);
    rnorm1 (G, M), rnorm2 (G, N) reciprocal norms; positives (G, M) cosines s_ip(i), unscaled;
    row_lse (G, M), col_lse (G, N); nll_row, nll_col (G, M); kept: E tiles, if the workspace
    allowed. positives, lse and nll are in the problem's statistics dtype. The column statistics
    are empty, (G, 0), for one direction.
    """

    z1: Tensor
    z2: Tensor
    rnorm1: Tensor
    rnorm2: Tensor
    positives: Tensor
    row_lse: Tensor
    col_lse: Tensor
    nll_row: Tensor
    nll_col: Tensor
    kept: Tensor


class Tops(NamedTuple):
    """Largest logits so far, from which top-1 is told; in a unit of the backend's own.

    ``row`` (M,) and ``col`` (N,) run over the other candidates, -inf where there was none; ``own``
    (M,) are the positives' with the rounding of their neighbours in the tile. In the compute
    dtype; ``col`` is None for one direction, ``own`` where no positive is met.
    """

    row: Tensor
    col: Tensor | None
    own: Tensor | None

    @staticmethod
    def none_yet(problem: Problem, like: Tensor, columns: int) -> Tops:
        """Before the first tile, on the device of ``like``."""

        def lowest(size: int) -> Tensor:
            return like.new_full((size,), -torch.inf, dtype=problem.compute_dtype)

        col = lowest(columns) if problem.symmetric else None
        return Tops(lowest(problem.rows), col, lowest(problem.rows))

    def top1(self, where: slice, nll_row: Tensor, nll_col: Tensor) -> Tensor:
        """(directions, M) bool: no other candidate's logit is larger, and none is NaN.

        ``where`` in ``col`` are the positives' columns. Leading dimensions are carried along.
        """
        found = [(self.own >= self.row) & ~nll_row.isnan()]
        if self.col is not None:
            found.append((self.own >= self.col[..., where]) & ~nll_col.isnan())
        return torch.stack(found, -2)


class Pair(NamedTuple):
    """Weights of one tile product's gradient: G_ij = w_i p_ij + v_j q_ij, its positives given.

    The upstream gradient, the reduction's factor and a = 1/temperature are in w and v.

    p_ij = exp(a s_ij - row_lse_i) and q_ij = exp(a s_ij - col_lse_j); ``diagonal`` (M,) replaces
    G at the positives. ``v`` and ``col_lse`` are None for one direction.
    """

    w: Tensor
    row_lse: Tensor
    v: Tensor | None
    col_lse: Tensor | None
    diagonal: Tensor


class Stages(Protocol):
    """The stages of one column group. ``scale`` is 1/temperature, a float or a 0-dim tensor."""

    def packed(self, problem: Problem, z: Tensor | None = None) -> tuple[int, torch.dtype]:
        """Row length (d, or d padded) and dtype of rows to be made, or of those that ``z`` is."""

    def kept_shape(self, problem: Problem) -> tuple[int, ...]:
        """Shape of the E tiles kept for the backward pass in one group; (0,) keeps nothing."""

    def kept_buffer(self, problem: Problem, like: Tensor) -> Tensor:
        """Memory of that shape, on the device of ``like``."""

    def normalize(self, problem: Problem, r: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Unit rows z and reciprocal norms of the columns taken from ``r`` (rows, width)."""

    def sums(
        self,
        problem: Problem,
        z1: Tensor,
        z2: Tensor,
        scale,
        kept: Tensor,
        logits: Tensor | None = None,
        tops: Tops | None = None,
    ):
        """log sum of exp(a s) over all but the positives: (M,) by rows and (N,) by columns.

        ``logits`` (M,), in the statistics dtype, receives the positives' a s_ip(i) where these are
        among the candidates: with the rounding of their neighbours in the tile, or from an exact
        product where the tile's operands are rounded. None: nobody asks. ``tops`` is raised to the
        largest logits met here, and its ``own`` written where ``logits`` would be.
        """

    def self_sums(self, problem: Problem, z: Tensor, scale, top: Tensor | None = None) -> Tensor:
        """log sum_j exp(a z_i . z_j) over j != i: (rows,). ``top`` (rows,): as ``tops``."""

    def products(
        self, problem: Problem, z1: Tensor, z2: Tensor, scale, pair: Pair, kept: Tensor, need
    ) -> tuple[Tensor | None, Tensor | None]:
        """``weights`` and ``products``: dz1 = G z2, dz2 = G^T z1; None where not needed."""

    def add_self_products(
        self, problem: Problem, z: Tensor, scale, w: Tensor, lse: Tensor, dz: Tensor
    ) -> None:
        """dz += (H + H^T) z with H_ij = w_i exp(a z_i . z_j - lse_i), i != j."""

    def gradient_buffer(self, problem: Problem, rows: int, device: torch.device) -> Tensor:
        """(rows, width) in the input dtype, as ``finish`` wants it (zero-filled or not)."""

    def finish(
        self,
        problem: Problem,
        z: Tensor,
        rnorm: Tensor,
        dz: Tensor,
        dr: Tensor | None,
        index: Tensor | None,
    ) -> Tensor | float:
        """Through the normalisation into the columns of ``dr`` (None: only the sum is wanted).

        Returns sum_i z_i . dz_i, 0-dim or a float. May overwrite ``dz``.
        """


def forward(
    stages: Stages, problem: Problem, r1: Tensor, r2: Tensor, columns: Tensor | None, scale
) -> tuple[Tensor, Saved, Tensor | None]:
    """Loss, what its backward pass needs, and top-1 as (G, directions, M) bool or None.

    ``columns`` is (G, d) or None for the slice. Top-1 is there where the problem asks for it.

    Stages with a method ``fuses(problem)`` that says yes run their own ``forward`` and
    ``backward``, of the same arguments and results, in fewer launches.
    """
    if _fused(stages, problem):
        return stages.forward(problem, r1, r2, columns, scale)
    groups, top1 = [], []
    for index in [None] if columns is None else columns:
        z1, rnorm1 = stages.normalize(problem, r1, index)
        z2, rnorm2 = stages.normalize(problem, r2, index)
        kept = stages.kept_buffer(problem, z1)
        logits = z1.new_empty(problem.rows, dtype=problem.statistics_dtype)
        tops = Tops.none_yet(problem, z1, problem.candidates) if problem.return_stats else None
        rest_row, rest_col = stages.sums(problem, z1, z2, scale, kept, logits, tops)
        if problem.negatives == "both":
            top = tops and tops.row
            rest_row = torch.logaddexp(rest_row, stages.self_sums(problem, z1, scale, top))
            if problem.symmetric:
                top = tops and tops.col
                rest_col = torch.logaddexp(rest_col, stages.self_sums(problem, z2, scale, top))
        nll_row, row_lse = _with_positive(rest_row, logits)
        # Two tensors: outputs of the registered op must not share memory.
        nll_col, col_lse = logits.new_empty(0), logits.new_empty(0)
        if problem.symmetric:
            if problem.rows == problem.candidates:  # small batches feel every operation
                nll_col, col_lse = _with_positive(rest_col, logits)
            else:
                own = _own(problem)
                nll_col, own_lse = _with_positive(rest_col[own], logits)
                col_lse = rest_col.clone()
                col_lse[own] = own_lse
        if tops is not None:
            top1.append(tops.top1(_own(problem), nll_row, nll_col))
        cosines = logits / scale
        groups.append(
            Saved(z1, z2, rnorm1, rnorm2, cosines, row_lse, col_lse, nll_row, nll_col, kept)
        )
    if len(groups) == 1:
        saved = Saved(*(value[None] for value in groups[0]))
    else:
        saved = Saved(*(torch.stack(values) for values in zip(*groups, strict=True)))
    per_row = saved.nll_row
    if problem.symmetric:
        per_row = 0.5 * (per_row + saved.nll_col)
    loss = reduce(problem, per_row.sum(0)).to(problem.compute_dtype)
    return loss, saved, torch.stack(top1) if top1 else None


def backward(
    stages: Stages,
    problem: Problem,
    dloss: Tensor,
    saved: Saved,
    columns: Tensor | None,
    scale,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (r1, r2, temperature) where ``need`` says so, else None."""
    if _fused(stages, problem):
        return stages.backward(problem, dloss, saved, columns, scale, need)
    need1, need2, need_temperature = need
    # The factor a of dz = a G z joins the weights, where it costs O(N).
    share = 0.5 * scale if problem.symmetric else scale
    weights = row_weights(problem, dloss.to(saved.row_lse.dtype)) * share
    both = problem.negatives == "both"
    # sum_i z1_i . dz1_i is the temperature's gradient for "cross"; "both" needs either view's.
    want1 = need1 or (need_temperature and (both or not need2))
    want2 = need2 or (need_temperature and both)
    dr1 = stages.gradient_buffer(problem, problem.rows, dloss.device) if need1 else None
    dr2 = stages.gradient_buffer(problem, problem.candidates, dloss.device) if need2 else None
    dots = []
    for group, index in enumerate([None] if columns is None else columns):
        state = Saved(*(value[group] for value in saved))
        dz1, dz2 = _products(stages, problem, state, weights, scale, (want1, want2))
        dots.append(
            [
                None if dz is None else stages.finish(problem, z, rnorm, dz, dr, index)
                for z, rnorm, dz, dr in (
                    (state.z1, state.rnorm1, dz1, dr1),
                    (state.z2, state.rnorm2, dz2, dr2),
                )
            ]
        )
    dtemperature = None
    if need_temperature:
        # A dot is a dloss/da (for "both", the mean of the two is), and da/dtemperature = -a^2.
        total = sum((a + b) / 2 if both else (b if a is None else a) for a, b in dots)
        dtemperature = -total * scale
    return dr1, dr2, dtemperature


def _fused(stages: Stages, problem: Problem) -> bool:
    fuses = getattr(stages, "fuses", None)
    return fuses is not None and fuses(problem)


def _products(stages: Stages, problem: Problem, state: Saved, weights: Tensor, scale, want):
    """dz1, dz2 of one group."""
    diagonal = weights * torch.expm1(-state.nll_row)
    v = col_lse = None
    if problem.symmetric:
        diagonal = diagonal + weights * torch.expm1(-state.nll_col)
        v = weights
        if problem.rows < problem.candidates:
            v = weights.new_zeros(problem.candidates)
            v[_own(problem)] = weights
        col_lse = state.col_lse
    pair = Pair(weights, state.row_lse, v, col_lse, diagonal)
    dz1, dz2 = stages.products(problem, state.z1, state.z2, scale, pair, state.kept, want)
    if problem.negatives == "both":
        if dz1 is not None:
            stages.add_self_products(problem, state.z1, scale, weights, state.row_lse, dz1)
        if dz2 is not None and problem.symmetric:
            stages.add_self_products(problem, state.z2, scale, v, col_lse, dz2)
    return dz1, dz2


def _own(problem: Problem) -> slice:
    """The candidates that are positives of this call's anchors."""
    return slice(problem.row_offset, problem.row_offset + problem.rows)


def _with_positive(rest: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(nll, lse) from the log-sum over the other candidates and the positive logit."""
    nll = torch.logaddexp(rest - logits, torch.zeros_like(logits))
    return nll, logits + nll
