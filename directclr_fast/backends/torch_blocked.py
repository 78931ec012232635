"""The five stages in blocked PyTorch: any device, O(N d) memory plus a bounded workspace.

Always there, and the slow path that says so: the products go through the device's library GEMM
and every pass over a block is a separate operation. Blocks of S (BLOCK_M, BLOCK_N) live in one
reused buffer; the backward pass computes each block again (8c operations, docs/design.md
section 3), or reads it back where all of E fits in the workspace (6c).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from .base import Backend, Ids, Weights

# Two buffers of BLOCK_M x BLOCK_N fp32, 2 MiB each: the GEMM runs at its full rate and a block
# stays in cache between the passes over it. From 256 x 512 to 2048 x 2048 the step at N = 4096,
# d = 360 stayed within 6 % (2-core AVX-512 machine), so the small end is taken for memory's sake.
BLOCK_M = 512
BLOCK_N = 1024


def block_shape(problem: Problem) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_N) for this call: two buffers of it fit the workspace."""
    workspace, itemsize = BACKEND.workspace(problem), problem.compute_dtype.itemsize
    rows, columns = min(BLOCK_M, problem.rows), min(BLOCK_N, problem.candidates)
    if problem.negatives == "both":
        rows = min(BLOCK_M, problem.candidates)
    while 2 * rows * columns * itemsize > workspace and rows * columns > 64 * 64:
        rows, columns = (rows, (columns + 1) // 2) if columns > rows else ((rows + 1) // 2, columns)
    return rows, columns


class Torch(Backend):
    name = "torch"
    default_workspace = 64 * 2**20

    def why_not(self, problem: Problem) -> list[str]:
        reasons = problem.reference_only()
        if problem.precision not in ("auto", "highest"):
            reasons.append(
                f"precision {problem.precision!r}: it computes in fp32 (fp64 for fp64 inputs)"
            )
        return reasons

    def packed(self, problem: Problem, z: Tensor | None = None) -> tuple[int, torch.dtype]:
        return problem.dim, problem.compute_dtype

    def kept_shape(self, problem: Problem) -> tuple[int, ...]:
        size = problem.rows * problem.candidates * problem.compute_dtype.itemsize
        fits = size * problem.groups <= self.workspace(problem)
        if problem.differentiable and problem.temperature is not None and fits:
            if problem.bounded(1.0 / problem.temperature):
                return (problem.rows, problem.candidates)
        return (0,)

    def normalize(self, problem, r, index):
        x = r[:, : problem.dim] if index is None else r.index_select(1, index)
        # fp64 squares: rows of 1e19 do not overflow, rows of 1e-30 do not vanish.
        norm = torch.linalg.vector_norm(x, dim=1, dtype=problem.statistics_dtype)
        norm = norm.clamp_min_(problem.eps).to(problem.compute_dtype)
        z = torch.empty(x.shape, dtype=problem.compute_dtype, device=r.device)
        # Division, not a product with 1/norm: a row of one column is then exactly +-1.
        return torch.div(x, norm[:, None], out=z), norm.reciprocal_()

    def sums(self, problem, z1, z2, scale, kept, logits=None, tops=None, ids=None):
        bounded = problem.bounded(scale)
        row = _Accumulator(problem, z1, bounded)
        col = _Accumulator(problem, z2, bounded) if problem.symmetric else None
        blocks = _blocks(problem, z1, z2, scale, problem.row_offset, ids, kept, logits)
        for rows, columns, s in blocks:
            if tops is not None:
                _raise(tops.row, rows, s, 1)
                _raise(tops.col, columns, s, 0)
            if bounded:
                s.exp_()
            row.add(rows, s, 1)
            if col is not None:
                col.add(columns, s, 0)
        if tops is not None and tops.own is not None:
            tops.own.copy_(logits)
        return row.log_sum(), None if col is None else col.log_sum()

    def self_sums(self, problem, z, scale, top=None, ids=None):
        bounded = problem.bounded(scale)
        row = _Accumulator(problem, z, bounded)
        for rows, columns, s in _blocks(problem, z, z, scale, 0, ids, triangle=True):
            _raise(top, rows, s, 1)
            if columns.start >= rows.stop:
                _raise(top, columns, s, 0)
            if bounded:
                s.exp_()
            row.add(rows, s, 1)
            if columns.start >= rows.stop:
                row.add(columns, s, 0)
        return row.log_sum()

    def products(self, problem, z1, z2, scale, pair, kept, need, ids=None):
        dz1 = torch.zeros_like(z1) if need[0] else None
        dz2 = torch.zeros_like(z2) if need[1] else None
        if dz1 is None and dz2 is None:
            return dz1, dz2
        weigh = _Weigher(problem, scale, pair)
        own = problem.row_offset
        blocks = (
            _kept_blocks(problem, kept)
            if kept.numel()
            else _blocks(problem, z1, z2, scale, problem.row_offset, ids)
        )
        for rows, columns, s in blocks:
            g = weigh(rows, columns, s, exponentiated=bool(kept.numel()))
            start, stop, diagonal = _diagonal(g, rows, columns, own)
            diagonal.copy_(pair.diagonal[start:stop])
            if dz1 is not None:
                dz1[rows].addmm_(g, z2[columns])
            if dz2 is not None:
                dz2[columns].addmm_(g.T, z1[rows])
        return dz1, dz2

    def add_self_products(self, problem, z, scale, w, lse, dz, ids=None):
        # H + H^T is symmetric, so the blocks above the diagonal serve both of their halves.
        weigh = _Weigher(problem, scale, Weights(w, lse, w, lse, w))
        for rows, columns, s in _blocks(problem, z, z, scale, 0, ids, triangle=True):
            g = weigh(rows, columns, s)
            dz[rows].addmm_(g, z[columns])
            if columns.start >= rows.stop:
                dz[columns].addmm_(g.T, z[rows])

    def gradient_buffer(self, problem: Problem, rows: int, device: torch.device) -> Tensor:
        shape = (rows, problem.width)
        if problem.gathered or problem.dim < problem.width:
            return torch.zeros(shape, dtype=problem.dtype, device=device)
        return torch.empty(shape, dtype=problem.dtype, device=device)

    def finish(self, problem, z, rnorm, dz, dr, index):
        dot = torch.linalg.vecdot(z, dz)
        total = dot.sum(dtype=problem.statistics_dtype)
        if dr is not None:
            # A row shorter than eps was divided by a constant: nothing to project out.
            dot.masked_fill_(rnorm >= 1.0 / problem.eps, 0.0)
            dx = dz.addcmul_(z, dot[:, None], value=-1.0).mul_(rnorm[:, None])
            if index is None:
                dr[:, : problem.dim].copy_(dx)
            else:
                dr.index_add_(1, index, dx.to(dr.dtype))
        return total


def _raise(top: Tensor | None, where: slice, s: Tensor, dim: int) -> None:
    """``top[where]`` to the maxima of a block of logits where these are more."""
    if top is not None:
        torch.maximum(top[where], s.amax(dim), out=top[where])


class _Accumulator:
    """Sums of exp by row of z, over blocks that come as exp(s) or, not ``bounded``, as s."""

    def __init__(self, problem: Problem, z: Tensor, bounded: bool) -> None:
        self.bounded = bounded
        empty = 0.0 if bounded else float("-inf")
        self.total = torch.full_like(z[:, 0], empty, dtype=problem.statistics_dtype)

    def add(self, where: slice, s: Tensor, dim: int) -> None:
        if self.bounded:
            self.total[where] += s.sum(dim)
        else:
            # As torch.logsumexp, but the maximum joins in fp64: in fp32 a log-sum of 1000 is off by
            # 3e-5, and with it every probability.
            top = s.amax(dim, keepdim=True).clamp_min_(torch.finfo(s.dtype).min)
            part = torch.exp(s - top).sum(dim).to(self.total.dtype).log_() + top.squeeze(dim)
            self.total[where] = torch.logaddexp(self.total[where], part)

    def log_sum(self) -> Tensor:
        return self.total.log_() if self.bounded else self.total


class _Weigher:
    """Turns a block of a S into G_ij = w_i exp(a s_ij - row_lse_i) + v_j exp(a s_ij - col_lse_j).

    The result may share the block's memory.
    """

    def __init__(self, problem: Problem, scale, pair: Weights) -> None:
        dtype = problem.compute_dtype
        self.bounded = problem.bounded(scale)
        if self.bounded:
            self.of_row = (pair.w * torch.exp(-pair.row_lse)).to(dtype)
            if pair.v is not None:
                self.of_col = (pair.v * torch.exp(-pair.col_lse)).to(dtype)
        else:
            w, row_lse = _rounded(pair.w, pair.row_lse, dtype)
            pair = pair._replace(w=w, row_lse=row_lse)
            if pair.v is not None:
                v, col_lse = _rounded(pair.v, pair.col_lse, dtype)
                pair = pair._replace(v=v, col_lse=col_lse)
        self.pair = pair
        rows, columns = block_shape(problem)
        self.buffer = None
        if pair.v is not None:
            self.buffer = pair.w.new_empty(rows * columns, dtype=dtype)

    def __call__(self, rows: slice, columns: slice, s: Tensor, exponentiated: bool = False):
        pair = self.pair
        other = None if self.buffer is None else self.buffer[: s.numel()].view(s.shape)
        if self.bounded:
            if exponentiated:
                # s is a view of the kept E, which a second backward pass may need again.
                if other is None:
                    return s * self.of_row[rows, None]
                torch.add(self.of_row[rows, None], self.of_col[columns], out=other)
                return other.mul_(s)
            s.exp_()
            if other is None:
                return s.mul_(self.of_row[rows, None])
            torch.add(self.of_row[rows, None], self.of_col[columns], out=other)
            return s.mul_(other)
        if other is not None:
            torch.sub(s, pair.col_lse[columns], out=other)
            other.exp_().mul_(pair.v[columns])
        s.sub_(pair.row_lse[rows, None]).exp_().mul_(pair.w[rows, None])
        return s if other is None else s.add_(other)


def _rounded(weight: Tensor, lse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same weight exp(x - lse) with lse in ``dtype``: its rounding goes into the weight."""
    reference = lse.to(dtype)
    return (weight * torch.exp(reference - lse)).to(dtype), reference


def _slices(size: int, block: int):
    # About equal: a library takes another way for a block of one column, and rounds otherwise.
    block = -(-size // -(-size // block))
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


def _blocks(
    problem: Problem,
    z1: Tensor,
    z2: Tensor,
    scale,
    offset: int,
    ids: Ids | None,
    kept: Tensor | None = None,
    logits: Tensor | None = None,
    triangle: bool = False,
):
    """Yields (rows, columns, a S) in a fixed order, -inf where column = row + offset or ids equal.

    What stood at the former is written to ``logits`` (rows of z1,) if given.

    The block is a view of one reused buffer, or of ``kept`` where that is given and not empty.
    ``triangle`` (z1 is z2) leaves out the blocks below the diagonal.
    """
    block_m, block_n = block_shape(problem)
    if triangle:
        block_m = block_n = min(block_m, block_n)
    buffer = None
    if kept is None or not kept.numel():
        buffer = z1.new_empty(min(block_m, z1.shape[0]) * min(block_n, z2.shape[0]))
    for rows in _slices(z1.shape[0], block_m):
        for columns in _slices(z2.shape[0], block_n):
            if triangle and columns.start < rows.start:
                continue
            size = (rows.stop - rows.start, columns.stop - columns.start)
            s = kept[rows, columns] if buffer is None else buffer[: size[0] * size[1]].view(size)
            # a joins afterwards: a z1 would be rounded, so s_ij and s_ji would differ.
            torch.mm(z1[rows], z2[columns].T, out=s).mul_(scale)
            start, stop, diagonal = _diagonal(s, rows, columns, offset)
            if logits is not None:
                logits[start:stop] = diagonal
            diagonal.fill_(float("-inf"))
            if ids is not None:
                s.masked_fill_(ids[0][rows, None] == ids[1][columns], float("-inf"))
            yield rows, columns, s


def _kept_blocks(problem: Problem, kept: Tensor):
    block_m, block_n = block_shape(problem)
    for rows in _slices(kept.shape[0], block_m):
        for columns in _slices(kept.shape[1], block_n):
            yield rows, columns, kept[rows, columns]


def _diagonal(block: Tensor, rows: slice, columns: slice, offset: int):
    """(first row, last row + 1, view) of the entries of a block where column = row + offset."""
    start = max(rows.start, columns.start - offset)
    stop = max(start, min(rows.stop, columns.stop - offset))
    if start == stop:
        return start, stop, block[:0, 0]
    inside = block[start - rows.start : stop - rows.start, start + offset - columns.start :]
    return start, stop, inside.diagonal()[: stop - start]


BACKEND = Torch()
