r"""Stage 3: the weights of the gradient, one super-block at a time, ready for the tensor cores.

    P_ij = STORE (w_i exp(a s_ij - row_lse_i) + v_j exp(a s_ij - col_lse_j)),   0 at the positives

w_i and v_j are upstream gradients relative to the largest; with both directions each exponential is
a probability, so |P| <= 2 STORE = 2^14 however large N is, and fp16 keeps entries normal down to
probabilities of 2^-27. The positives' own term is not in P: its p - 1 cancels, and rounded operands
would lose it; ``finish`` adds it in fp32.

"highest" stores rows [hi | lo], lo the remainder times LO_SCALE, and its weights are relative to
the largest sum of one row's or column's probabilities, so that little is lost of small ones.

BOUNDED folds both directions into one exponential, exp2(a' s) (f_i + g_j) with f_i = STORE w_i /
exp(row_lse_i); otherwise each direction has its own, relative to its log-sum.

Tile walk: ``group`` rows of BLOCK_M x BLOCK_N tiles at a time share their column tiles in L2. A
program owns one tile. FLATTEN: there are as many programs as the device holds at once, and each
takes one tile after another, the operands of the next loaded under the epilogue of the last.
Written: the super-block, padded with zeros to whole tiles, so the products need no mask along it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import (
    LOG2E,
    Layout,
    cdiv,
    expm1,
    launch,
    load_scale,
    may_be_equal,
    similarities,
    tile_source,
)
from .configs import Tile, architecture
from .layout import LO_SCALE, STORE, Factors

BLOCK = 128
REST = tl.constexpr(LO_SCALE)


@triton.jit(do_not_specialize=["m", "n", "offset"])
def _factors_kernel(
    upstream, largest, row_lse, col_lse, nll_row, nll_col, row_factor, col_factor, row_shift,
    col_shift, diagonal, m, n, offset, store, unit,
    PER_ROW: tl.constexpr, RELATIVE: tl.constexpr, SYMMETRIC: tl.constexpr, BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offs_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_r = offs_c - offset
    mask_c = offs_c < n
    mask_r = (offs_r >= 0) & (offs_r < m)
    weight = tl.where(mask_r, 1.0, 0.0).to(tl.float64) * store
    if PER_ROW:
        weight *= tl.load(upstream + offs_r, mask=mask_r, other=0.0).to(tl.float64)
    if RELATIVE:
        top = tl.load(largest).to(tl.float64)
        weight *= tl.where(top == 0.0, 0.0, 1.0 / tl.where(top == 0.0, 1.0, top))
    diag = weight * expm1(-tl.load(nll_row + offs_r, mask=mask_r, other=0.0))
    lse = tl.load(row_lse + offs_r, mask=mask_r, other=0.0)
    if BOUNDED:
        tl.store(row_factor + offs_r, (weight * tl.exp(-lse)).to(tl.float32), mask=mask_r)
    else:
        _store_shifted(row_factor, row_shift, offs_r, mask_r, weight, lse)
    if SYMMETRIC:
        diag += weight * expm1(-tl.load(nll_col + offs_r, mask=mask_r, other=0.0))
        lse = tl.load(col_lse + offs_c, mask=mask_c, other=0.0)
        if BOUNDED:
            factor = tl.where(mask_r, weight * tl.exp(-lse), 0.0)
            tl.store(col_factor + offs_c, factor.to(tl.float32), mask=mask_c)
        else:
            _store_shifted(col_factor, col_shift, offs_c, mask_c, weight, lse)
    tl.store(diagonal + offs_r, (diag * unit).to(tl.float32), mask=mask_r)


@triton.jit
def _store_shifted(factor, shift, offs, mask, weight, lse):
    """weight exp(x - lse) as factor 2^(log2(e) x - shift); the factor has the shift's rounding."""
    exact = lse * LOG2E
    rounded = exact.to(tl.float32)
    weight = tl.where(weight == 0.0, 0.0, weight * tl.exp2(rounded.to(tl.float64) - exact))
    tl.store(factor + offs, weight.to(tl.float32), mask=mask)
    tl.store(shift + offs, rounded, mask=mask)


@triton.jit
def _grouped(pid, blocks_m, blocks_n, GROUP: tl.constexpr):
    """(row, column) of tile ``pid``: GROUP rows of tiles are walked column by column."""
    in_group = GROUP * blocks_n
    first = pid // in_group * GROUP
    size = tl.minimum(blocks_m - first, GROUP)
    return first + pid % in_group % size, pid % in_group // size


@triton.jit(
    do_not_specialize=["first_m", "first_n", "last_m", "last_n", "offset", "blocks_m", "blocks_n"]
)
def _weights_kernel(
    z1, z2, row_factor, col_factor, row_shift, col_shift, out, row_ids, col_ids, scale, first_m,
    first_n, last_m, last_n, stride_z, stride_out, offset, blocks_m, blocks_n, operand_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, BOUNDED: tl.constexpr, IDS: tl.constexpr,
    SCALE_TENSOR: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    a2 = load_scale(scale, SCALE_TENSOR) * LOG2E * operand_scale
    HALVES: tl.constexpr = 2 if FLATTEN else 1
    WIDTH: tl.constexpr = BLOCK_N // HALVES
    tiles, programs = blocks_m * blocks_n, tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
        tile_m, tile_n = _grouped(tile, blocks_m, blocks_n, GROUP)
        start_m = first_m + tile_m * BLOCK_M
        start_n = first_n + tile_n * BLOCK_N
        acc = similarities(
            z1, z2, start_m, start_n, last_m, last_n, stride_z,
            BLOCK_M, BLOCK_N, D, BLOCK_K, TMA, PRECISION,
        )  # fmt: skip
        parts = (acc,)
        if HALVES == 2:
            parts = acc.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split()
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last_m
        # A flattened tile is finished by halves: as a whole it wants more registers than there are.
        for half in tl.static_range(HALVES):
            from_n = start_n + half * WIDTH
            offs_n = from_n + tl.arange(0, WIDTH)
            mask_n = offs_n < last_n
            # Outside the super-block the factors are zero, and with them the padding.
            by_row = tl.load(row_factor + offs_m, mask=mask_m, other=0.0)[:, None]
            if SYMMETRIC:
                by_col = tl.load(col_factor + offs_n, mask=mask_n, other=0.0)[None, :]
            if BOUNDED:
                g = tl.exp2(parts[half] * a2)
                if SYMMETRIC:
                    g *= by_row + by_col
                else:
                    g *= by_row
            else:
                x = parts[half] * a2
                shift = tl.load(row_shift + offs_m, mask=mask_m, other=float("inf"))[:, None]
                g = tl.exp2(x - shift) * by_row
                if SYMMETRIC:
                    shift = tl.load(col_shift + offs_n, mask=mask_n, other=float("inf"))[None, :]
                    g += tl.exp2(x - shift) * by_col
            meets = (from_n < start_m + offset + BLOCK_M) & (from_n + WIDTH > start_m + offset)
            masked = meets | (start_m + BLOCK_M > last_m) | (from_n + WIDTH > last_n)
            if IDS:
                id_m = tl.load(row_ids + offs_m, mask=mask_m, other=-1)
                id_n = tl.load(col_ids + offs_n, mask=mask_n, other=-1)
                masked = masked | may_be_equal(id_m, id_n)
            if masked:
                end, positive = tl.where(mask_m, last_n, 0)[:, None], (offs_m + offset)[:, None]
                keep = (offs_n[None, :] < end) & (offs_n[None, :] != positive)
                if IDS:
                    keep = keep & (id_m[:, None] != id_n[None, :])
                g = tl.where(keep, g, 0.0)
            offs_o = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None] * stride_out
            where = out + offs_o + (tile_n * BLOCK_N + half * WIDTH + tl.arange(0, WIDTH))[None, :]
            hi = g.to(out.dtype.element_ty)
            tl.store(where, hi)
            if PRECISION == "highest":
                lo = (g - hi.to(tl.float32)) * REST
                tl.store(where + stride_out // 2, lo.to(out.dtype.element_ty))


def factors(
    layout: Layout, problem, saved, upstream: Tensor, divisor: Tensor | None, bounded: bool
) -> Factors:
    """One launch. ``upstream`` counts for reduction "none" only, else weights are 1; ``divisor``,
    0-dim, is what they are divided by, None for 1."""
    m, n, device = problem.rows, problem.candidates, upstream.device
    record = Factors.empty(m, n, problem.symmetric, bounded, device)
    launch(
        _factors_kernel, (cdiv(n, BLOCK),),
        upstream, upstream if divisor is None else divisor, saved.row_lse,
        saved.col_lse if problem.symmetric else saved.row_lse, saved.nll_row,
        saved.nll_col if problem.symmetric else saved.nll_row, record.row, record.col,
        record.row_shift, record.col_shift, record.diagonal, m, n, problem.row_offset, STORE,
        layout.unit,
        PER_ROW=problem.reduction == "none", RELATIVE=divisor is not None,
        SYMMETRIC=problem.symmetric, BOUNDED=bounded, BLOCK=BLOCK, warps=4, stages=1,
    )  # fmt: skip
    return record


def weights(
    layout: Layout, z1: Tensor, z2: Tensor, factors: Factors, scale, offset: int, rows: slice,
    columns: slice, out: Tensor, tile: Tile, mirror: bool = False,
) -> Tensor:  # fmt: skip
    """One launch: the super-block ``rows`` x ``columns`` of P into ``out``'s memory, padded.
    ``mirror`` says that it is symmetric, of which no use is made here."""
    down = cdiv(rows.stop - rows.start, tile.rows)
    across = cdiv(columns.stop - columns.start, tile.columns)
    programs, height, width = down * across, down * tile.rows, across * tile.columns
    block = layout.elements(out)[: height * width * layout.parts].view(height, -1)
    a, b = layout.operand(z1), layout.operand(z2)
    if tile.flatten:  # eight warps of 255 registers fill a multiprocessor
        programs = min(programs, architecture(z1.device)[1] * max(1, 8 // tile.warps))
    launch(
        _weights_kernel, (programs,),
        tile_source(a, tile.rows, tile.inner, tile.tma),
        tile_source(b, tile.columns, tile.inner, tile.tma), factors.row, factors.col,
        factors.row_shift, factors.col_shift, block, *(factors.ids or (factors.row, factors.row)),
        scale, rows.start, columns.start, rows.stop, columns.stop, a.stride(0), block.shape[1],
        offset, down, across, layout.cosine,
        D=layout.pitch, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner,
        GROUP=tile.group, SYMMETRIC=factors.symmetric, BOUNDED=factors.bounded,
        IDS=factors.ids is not None, SCALE_TENSOR=isinstance(scale, Tensor), TMA=tile.tma,
        FLATTEN=tile.flatten, PRECISION=layout.products, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return block
