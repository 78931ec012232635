r"""Stage 2: the sums of exp(a s_ij) over all but the positives, by row and by column.

    rest_row_i = log sum_{j != p(i)} exp(a s_ij)
    rest_col_j = log sum_{i: p(i) != j} exp(a s_ij)

Tile walk: a program owns BLOCK_F rows of the *fixed* side (anchors) and walks a share of the tiles
of BLOCK_T rows of the *moving* side (candidates). A tile is acc = moving fixed^T, so the moving
rows lie along the axis that one warp holds: their sum is a few shuffles a tile, stored as one
partial per program. The fixed rows' sums stay apart in registers until the walk ends: one element
for every FOLD moving rows, which a thread holds, so that no tile has to shuffle them. Nothing N x N
is stored.

The partials, (fixed blocks, N) and (shares, M), are added by a second kernel in a fixed order, so a
repeat run gives the same bits; strips of fixed blocks keep them within PARTIAL_BYTES.

BOUNDED: exp2(a' s), a' = a log2(e), needs no maximum while a + log 2N <= 60 (problem.py);
otherwise every partial carries the maximum it is relative to, which serves any temperature, also
one that the host does not know. UPPER, for a view with itself: only j > i is computed, and both
sums of it. TOP1, for statistics: the bounded form has the maxima too. OWN, for these and for
fp32-grade products: the positive's logit is written as the tile has it, in base 2, so that a
candidate equal to the positive ties with it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    LN2,
    LOG2E,
    Layout,
    cdiv,
    launch,
    load_scale,
    may_be_equal,
    similarities,
    softplus,
    tile_source,
)
from .configs import Tile

PARTS, BLOCK = 8, 64


@triton.jit(do_not_specialize=[
    "first_fixed", "n_fixed", "n_moving", "offset", "fixed_blocks", "tiles_per_share",
])  # fmt: skip
def _sums_kernel(
    fixed, moving, fixed_sum, fixed_max, moving_sum, moving_max, own, fixed_ids, moving_ids, scale,
    first_fixed, n_fixed, n_moving, stride_z, offset, fixed_blocks, tiles_per_share, operand_scale,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    MOVING: tl.constexpr, BOUNDED: tl.constexpr, UPPER: tl.constexpr, TOP1: tl.constexpr,
    OWN: tl.constexpr, IDS: tl.constexpr, SCALE_TENSOR: tl.constexpr, TMA: tl.constexpr,
    FLATTEN: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % fixed_blocks
    share = tl.program_id(0) // fixed_blocks
    local_f = block * BLOCK_F
    start_f = first_fixed + local_f
    offs_f = start_f + tl.arange(0, BLOCK_F)
    a2 = load_scale(scale, SCALE_TENSOR) * LOG2E * operand_scale

    id_f = offs_f
    if IDS:
        id_f = tl.load(fixed_ids + offs_f, mask=offs_f < n_fixed, other=-1)
    first = share * tiles_per_share
    last = tl.minimum(first + tiles_per_share, tl.cdiv(n_moving, BLOCK_T))
    if UPPER:
        first = tl.maximum(first, start_f // BLOCK_T)
    total = tl.zeros((BLOCK_T // FOLD, BLOCK_F), tl.float32)
    peak = tl.full((BLOCK_F,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_F,), tl.float32)
    # Partials of the moving rows: one line of moving_sum a fixed block.
    moving_sum += block.to(tl.int64) * n_moving
    moving_max += block.to(tl.int64) * n_moving
    for tile in tl.range(first, last, flatten=FLATTEN):
        start_t = tile * BLOCK_T
        acc = similarities(
            moving, fixed, start_t, start_f, n_moving, n_fixed, stride_z,
            BLOCK_T, BLOCK_F, D, BLOCK_K, TMA, PRECISION,
        )  # fmt: skip
        offs_t = start_t + tl.arange(0, BLOCK_T)
        # Only tiles at an edge or on the diagonal pay for a mask.
        ragged = (start_t + BLOCK_T > n_moving) | (start_f + BLOCK_F > n_fixed)
        if UPPER:
            masked = ragged | (start_t < start_f + BLOCK_F)
        else:
            meets = (start_t < start_f + offset + BLOCK_F) & (start_t + BLOCK_T > start_f + offset)
            masked = ragged | meets
        id_t = offs_t
        if IDS:
            id_t = tl.load(moving_ids + offs_t, mask=offs_t < n_moving, other=-1)
            masked = masked | may_be_equal(id_t, id_f)
        if BOUNDED and not TOP1:
            e = tl.exp2(acc * a2)
            if masked:
                if OWN:
                    _store_own(own, acc * a2, start_t, offs_t, offs_f, n_moving, n_fixed, offset)
                keep = _kept(offs_t, offs_f, id_t, id_f, n_moving, n_fixed, offset, UPPER, IDS)
                e = tl.where(keep, e, 0.0)
            total += _folded(e, BLOCK_T, BLOCK_F, FOLD)
            if MOVING:
                tl.store(moving_sum + offs_t, tl.sum(e, 1), mask=offs_t < n_moving)
        else:
            x = acc * a2
            if masked:
                if OWN:
                    _store_own(own, x, start_t, offs_t, offs_f, n_moving, n_fixed, offset)
                keep = _kept(offs_t, offs_f, id_t, id_f, n_moving, n_fixed, offset, UPPER, IDS)
                x = tl.where(keep, x, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(x, 0))
            if BOUNDED:
                e = tl.exp2(x)
                mass += tl.sum(e, 0)
            else:
                base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                mass = mass * tl.exp2(peak - base) + tl.sum(tl.exp2(x - base[None, :]), 0)
            peak = new_peak
            if MOVING:
                high = tl.max(x, 1)
                if BOUNDED:
                    part = tl.sum(e, 1)
                else:
                    base_t = tl.where(high == float("-inf"), 0.0, high)
                    part = tl.sum(tl.exp2(x - base_t[:, None]), 1)
                tl.store(moving_sum + offs_t, part, mask=offs_t < n_moving)
                tl.store(moving_max + offs_t, high, mask=offs_t < n_moving)
    local = local_f + tl.arange(0, BLOCK_F)
    where = share.to(tl.int64) * (fixed_blocks * BLOCK_F) + local
    if BOUNDED and not TOP1:
        tl.store(fixed_sum + where, tl.sum(total, 0))
    else:
        tl.store(fixed_sum + where, mass)
        tl.store(fixed_max + where, peak)


@triton.jit
def _folded(e, T: tl.constexpr, F: tl.constexpr, FOLD: tl.constexpr):
    """(T // FOLD, F): sums of moving rows that one thread has: those 8 apart and, in a tile of 32
    rows a warp, two products high, those T / 2 apart."""
    if FOLD == 4:
        e = tl.sum(e.reshape(2, T // 2, F), 0)
    if FOLD > 1:
        e = tl.sum(e.reshape(T // FOLD // 8, 2, 8, F), 1)
    return e.reshape(T // FOLD, F)


@triton.jit
def _store_own(own, x, start_t, offs_t, offs_f, n_moving, n_fixed, offset):
    """The positives' logits of a tile ``x`` (T, F) that begins at row ``start_t``, if any."""
    at = offs_f + offset
    here = (at >= start_t) & (at < start_t + x.shape[0]) & (at < n_moving) & (offs_f < n_fixed)
    logit = tl.sum(tl.where(offs_t[:, None] == at[None, :], x, 0.0), 0)
    tl.store(own + offs_f, logit, mask=here)


@triton.jit
def _kept(
    offs_t, offs_f, id_t, id_f, n_moving, n_fixed, offset, UPPER: tl.constexpr, IDS: tl.constexpr
):
    """(T, F): inside both sides, not the positive (UPPER: above the diagonal), ids not equal."""
    inside = (offs_t < n_moving)[:, None] & (offs_f < n_fixed)[None, :]
    if IDS:
        inside = inside & (id_t[:, None] != id_f[None, :])
    if UPPER:
        return inside & (offs_t[:, None] > offs_f[None, :])
    else:
        return inside & (offs_t[:, None] != offs_f[None, :] + offset)


@triton.jit
def _log_of_parts(
    sums, peaks, offs, mask, parts, stride,
    BOUNDED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log of the sum of ``parts`` lines of partials at ``offs``: fp64 (BLOCK,)."""
    offs_p = tl.arange(0, PARTS)
    total = tl.zeros((BLOCK,), tl.float64)
    top = tl.zeros((BLOCK,), tl.float32)
    if not BOUNDED:
        top += float("-inf")
        for p in range(0, parts, PARTS):
            where = (p + offs_p).to(tl.int64)[:, None] * stride + offs[None, :]
            keep = (p + offs_p < parts)[:, None] & mask[None, :]
            top = tl.maximum(top, tl.max(tl.load(peaks + where, mask=keep, other=float("-inf")), 0))
        top = tl.where(top == float("-inf"), 0.0, top)
    for p in range(0, parts, PARTS):
        where = (p + offs_p).to(tl.int64)[:, None] * stride + offs[None, :]
        keep = (p + offs_p < parts)[:, None] & mask[None, :]
        part = tl.load(sums + where, mask=keep, other=0.0).to(tl.float64)
        if not BOUNDED:
            peak = tl.load(peaks + where, mask=keep, other=float("-inf"))
            part *= tl.exp2((peak - top[None, :]).to(tl.float64))
        total += tl.sum(part, 0)
    return tl.log(total) + top.to(tl.float64) * LN2


@triton.jit
def _add_logs(a, b):
    """log(exp(a) + exp(b)) in fp64; -inf is an empty sum."""
    high = tl.maximum(a, b)
    base = tl.where(high == float("-inf"), 0.0, high)
    return tl.log(tl.exp(a - base) + tl.exp(b - base)) + base


@triton.jit(do_not_specialize=["n", "parts", "stride"])
def _fold_kernel(
    sums, peaks, into, n, parts, stride,
    FIRST: tl.constexpr, BOUNDED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    found = _log_of_parts(sums, peaks, offs, mask, parts, stride, BOUNDED, PARTS, BLOCK)
    if not FIRST:
        found = _add_logs(found, tl.load(into + offs, mask=mask, other=0.0))
    tl.store(into + offs, found, mask=mask)


@triton.jit(do_not_specialize=["m", "n", "offset", "row_parts", "row_stride", "col_parts"])
def _combine_kernel(
    row_sum, row_max, col_sum, col_max, rest_row, rest_col, positives, row_lse, col_lse, nll_row,
    nll_col, loss, scale, scale_low, m, n, offset, row_parts, row_stride, col_parts,
    FOLDED: tl.constexpr, SYMMETRIC: tl.constexpr, PER_ROW: tl.constexpr, BOUNDED: tl.constexpr,
    SCALE_TENSOR: tl.constexpr, OWN: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_r = offs_c - offset
    mask_c = offs_c < n
    mask_r = (offs_r >= 0) & (offs_r < m)
    if OWN:
        logit = tl.load(positives + offs_r, mask=mask_r, other=0.0).to(tl.float64) * LN2
    else:
        if SCALE_TENSOR:
            a = tl.load(scale).to(tl.float64)
        else:
            a = tl.full((), 0.0, tl.float64) + scale + scale_low
        logit = tl.load(positives + offs_r, mask=mask_r, other=0.0) * a
    if FOLDED:
        rest = tl.load(rest_row + offs_r, mask=mask_r, other=0.0)
    else:
        rest = _log_of_parts(
            row_sum, row_max, offs_r, mask_r, row_parts, row_stride, BOUNDED, PARTS, BLOCK
        )
    nll = softplus(rest - logit)
    tl.store(nll_row + offs_r, nll, mask=mask_r)
    tl.store(row_lse + offs_r, logit + nll, mask=mask_r)
    per_row = nll
    if SYMMETRIC:
        if FOLDED:
            rest = tl.load(rest_col + offs_c, mask=mask_c, other=0.0)
        else:
            rest = _log_of_parts(
                col_sum, col_max, offs_c, mask_c, col_parts, n, BOUNDED, PARTS, BLOCK
            )
        nll = softplus(rest - logit)
        tl.store(nll_col + offs_r, nll, mask=mask_r)
        tl.store(col_lse + offs_c, tl.where(mask_r, logit + nll, rest), mask=mask_c)
        per_row = 0.5 * (per_row + nll)
    if PER_ROW:
        tl.store(loss + offs_r, per_row.to(tl.float32), mask=mask_r)
    else:
        tl.store(loss + tl.program_id(0), tl.sum(tl.where(mask_r, per_row, 0.0)))


@triton.jit(do_not_specialize=["n"])
def _total_kernel(parts, loss, n, factor, BLOCK: tl.constexpr):
    """The blocks' losses to one, in a fixed order."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(parts + offs, mask=offs < n, other=0.0)
    tl.store(loss, (tl.sum(total) / factor).to(tl.float32))


def lines(tile: Tile, strip: slice, columns: int, programs: int, upper: bool):
    """(lines by row, their length, lines by column, first column) of one launch's partials."""
    blocks = cdiv(strip.stop - strip.start, tile.rows)
    shares = cdiv(cdiv(columns, tile.columns), _share(tile, blocks, columns, programs))
    return shares, blocks * tile.rows, blocks, 0


@lru_cache(64)
def _share(tile: Tile, blocks: int, columns: int, programs: int) -> int:
    """Tiles of candidates that one program walks."""
    tiles = cdiv(columns, tile.columns)
    return cdiv(tiles, max(1, min(tiles, cdiv(programs, blocks))))


def sums(
    layout: Layout, z1: Tensor, z2: Tensor, strip: slice, scale, offset: int, tile: Tile,
    programs: int, parts, own: Tensor | None, *, bounded: bool, upper: bool, tops: bool,
    ids: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """One launch: ``parts`` (``packed.Partials``) of the anchors in ``strip`` (z1) against all
    candidates (z2). ``tops``: with maxima in either form; ``own`` (M,) gets the positives' logits
    as the tiles have them, in base 2. ``ids``: int32 of all rows of z1 and of z2; where they are
    equal nothing is added."""
    n, blocks = len(z2), cdiv(strip.stop - strip.start, tile.rows)
    moving = parts.col_sum is not None
    if upper:  # tiles below the diagonal are not visited
        parts.col_sum.zero_()
        if parts.col_peak is not None:
            parts.col_peak.fill_(float("-inf"))
    fixed, walked = layout.operand(z1), layout.operand(z2)
    nothing = parts.row_sum
    launch(
        _sums_kernel, (blocks * len(parts.row_sum),),
        tile_source(fixed, tile.rows, tile.inner, tile.tma),
        tile_source(walked, tile.columns, tile.inner, tile.tma), parts.row_sum,
        nothing if parts.row_peak is None else parts.row_peak, parts.col_sum if moving else nothing,
        parts.col_peak if moving and parts.col_peak is not None else nothing,
        nothing if own is None else own, *(ids or (nothing, nothing)), scale, strip.start, len(z1),
        n, fixed.stride(0), offset, blocks, _share(tile, blocks, n, programs), layout.cosine,
        D=layout.pitch, BLOCK_T=tile.columns, BLOCK_F=tile.rows, BLOCK_K=tile.inner, MOVING=moving,
        BOUNDED=bounded, UPPER=upper, TOP1=tops, OWN=own is not None, IDS=ids is not None,
        SCALE_TENSOR=isinstance(scale, Tensor), TMA=tile.tma, FLATTEN=tile.flatten, FOLD=tile.fold,
        PRECISION=layout.products, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def fold(sums: Tensor, peaks: Tensor | None, into: Tensor, first: bool, bounded: bool) -> None:
    """``into`` (n,) fp64 log-sums: set (``first``) or increased by the lines of ``sums``."""
    launch(
        _fold_kernel, (cdiv(len(into), BLOCK),),
        sums, sums if peaks is None else peaks, into, len(into), *sums.shape,
        FIRST=first, BOUNDED=bounded, PARTS=PARTS, BLOCK=BLOCK, warps=4, stages=2,
    )  # fmt: skip


def combine_blocks(n: int) -> int:
    """Losses that ``combine`` writes where they are to be summed."""
    return cdiv(n, BLOCK)


def combine(problem, positives: Tensor, scale, parts, rest, out, *, bounded: bool) -> None:
    """One launch: ``out`` (``packed.Combined``) from ``parts``, of one strip, or from ``rest``, the
    log-sums of several by row and by column. ``positives`` (M,): cosines, fp64, or what ``sums``
    wrote as ``own``, fp32."""
    m, n, symmetric = problem.rows, problem.candidates, problem.symmetric
    tensor, nothing = isinstance(scale, Tensor), out.losses
    # The positive's logit deserves a in fp64: as the sum of two fp32 arguments.
    high, low = scale, 0.0
    if not tensor:
        high = float(np.float32(scale))
        low = scale - high

    buffers, row_lines, row_stride, col_lines = [nothing] * 4, 0, 0, 0
    if parts is not None:
        buffers = [parts.row_sum if buffer is None else buffer for buffer in parts]
        row_lines, row_stride = parts.row_sum.shape
        col_lines = len(buffers[2])
    launch(
        _combine_kernel, (combine_blocks(n),),
        *buffers, nothing if rest[0] is None else rest[0], nothing if rest[1] is None else rest[1],
        positives, out.row_lse, out.col_lse if symmetric else out.row_lse, out.nll_row,
        out.nll_col if symmetric else out.nll_row, out.losses, high, low, m, n, problem.row_offset,
        row_lines, row_stride, col_lines,
        FOLDED=parts is None, SYMMETRIC=symmetric, PER_ROW=problem.reduction == "none",
        BOUNDED=bounded, SCALE_TENSOR=tensor, OWN=positives.dtype == torch.float32, PARTS=PARTS,
        BLOCK=BLOCK, warps=4, stages=2,
    )  # fmt: skip


def total(losses: Tensor, loss: Tensor, factor: float) -> None:
    """One launch: ``loss`` (0-dim) = sum of ``losses`` / factor, in a fixed order."""
    launch(
        _total_kernel, (1,),
        losses, loss, len(losses), factor,
        BLOCK=1024, warps=4, stages=1,
    )  # fmt: skip
