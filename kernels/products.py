r"""Stage 4: dz1[rows] += P z2[columns] and dz2[columns] += P^T z1[rows] for one super-block.

fp32 accumulators in a fixed order: super-blocks come one after the other on the stream and every
element of dz has one owner in each, so a repeat run gives the same bits and nothing is atomic.

On a CUDA device half-precision operands go to the library's GEMM (fp32 output and accumulation),
which is near the machine's peak at these shapes; everything else, and every device whose library
cannot add into an fp32 matrix, takes the kernel here. Tile walk of the kernel: a program owns
BLOCK_M x BLOCK_D of dz and walks along the super-block in steps of BLOCK_K; for "highest" four
times, over the products of both parts of P with both of z. Where rows repeat, large terms of dz
cancel, and without lo(P) lo(z), 2^-24 of them, what is left errs by more than eager PyTorch.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import library
from .common import Layout, cdiv, launch, load_tile, tile_dot, tile_source
from .configs import Tile
from .layout import LO_SCALE

PER_REST = tl.constexpr(1.0 / LO_SCALE)


@triton.jit
def _walk(
    acc, p, z, row, first_p, first_z, n, k_first, k_last, k_extent, stride_p, stride_z,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + op(P) z: P of ``row`` on, its columns and those of z counted from the first ones."""
    for k in range(0, k_extent, BLOCK_K):
        if TRANSPOSED:
            b_p = load_tile(p, k, first_p + row, k_extent, stride_p, BLOCK_K, BLOCK_M, TMA).T
        else:
            # Rows of P beyond n are padding, finite, and their results are not stored.
            b_p = load_tile(p, row, first_p + k, n, stride_p, BLOCK_M, BLOCK_K, TMA)
        b_z = load_tile(z, k_first + k, first_z, k_last, stride_z, BLOCK_K, BLOCK_D, TMA)
        acc = tile_dot(b_p, b_z, acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["first", "n", "k_first", "k_last", "k_extent"])
def _product_kernel(
    p, z, dz, first, n, k_first, k_last, k_extent, stride_p, stride_z, stride_dz,
    PITCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr, ADD: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks_d: tl.constexpr = tl.cdiv(PITCH, BLOCK_D)
    tile_m = tl.program_id(0) // blocks_d
    tile_d = tl.program_id(0) % blocks_d
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row, column = tile_m * BLOCK_M, tile_d * BLOCK_D
    if PRECISION == "highest":
        for lo in tl.static_range(1, -1, -1):
            acc = _walk(
                acc, p, z, row, stride_p // 2, lo * PITCH + column, n, k_first, k_last, k_extent,
                stride_p, stride_z, BLOCK_M, BLOCK_D, BLOCK_K, TRANSPOSED, TMA, PRECISION,
            )  # fmt: skip
        acc = _walk(
            acc * PER_REST, p, z, row, 0, PITCH + column, n, k_first, k_last, k_extent, stride_p,
            stride_z, BLOCK_M, BLOCK_D, BLOCK_K, TRANSPOSED, TMA, PRECISION,
        )  # fmt: skip
    acc = _walk(
        acc, p, z, row, 0, column, n, k_first, k_last, k_extent, stride_p, stride_z,
        BLOCK_M, BLOCK_D, BLOCK_K, TRANSPOSED, TMA, PRECISION,
    )  # fmt: skip
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    where = dz + (first + offs_m).to(tl.int64)[:, None] * stride_dz + offs_d[None, :]
    mask = (offs_m < n)[:, None] & (offs_d < PITCH)[None, :]
    if ADD:
        acc += tl.load(where, mask=mask, other=0.0)
    tl.store(where, acc, mask=mask)


def product(
    layout: Layout, p: Tensor, z: Tensor, dz: Tensor, rows: slice, inner: slice, *,
    transposed: bool, add: bool, tile: Tile,
) -> None:  # fmt: skip
    """dz[rows] = (or +=) op(P) z[inner]; ``p`` padded as ``weights`` leaves it, dz (., pitch)."""
    if layout.split and _library_adds(p.device, p.dtype):
        library.product(layout, p, z, dz, rows, inner, transposed=transposed, add=add)
        return
    operand, n = layout.half_operand(z), rows.stop - rows.start
    extent = p.shape[0] if transposed else p.shape[1] // layout.parts
    shape = (tile.inner, tile.rows) if transposed else (tile.rows, tile.inner)
    # The tail of z along the product must read as zero: a descriptor ends where the rows end.
    bounded = operand[: inner.stop]
    launch(
        _product_kernel, (cdiv(n, tile.rows) * cdiv(layout.pitch, tile.columns),),
        tile_source(p, *shape, tile.tma), tile_source(bounded, tile.inner, tile.columns, tile.tma),
        dz, rows.start, n, inner.start, inner.stop, extent, p.stride(0), operand.stride(0),
        dz.stride(0),
        PITCH=layout.pitch, BLOCK_M=tile.rows, BLOCK_D=tile.columns, BLOCK_K=tile.inner,
        TRANSPOSED=transposed, ADD=add, TMA=tile.tma, PRECISION=layout.products, warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip


@cache
def _library_adds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch multiplies half-precision matrices into an fp32 one on ``device``.

    Asked once a process, with a product of 16 x 16, and by whether it raises: nothing is read back.
    """
    if device.type != "cuda" or torch.version.hip:
        return False
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    out = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        for add in (False, True):
            library.multiply(out, a, a, add)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True
