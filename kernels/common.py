"""What every kernel shares: tile loads, accurate small functions, the launcher.

Everything that differs between Triton versions is here.
"""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .layout import UNIT
from .layout import Layout as Layout

PER_UNIT = tl.constexpr(1.0 / UNIT)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def tile_source(x: Tensor, rows: int, columns: int, tma: bool):
    """A 2-d operand as ``load_tile`` takes it: itself, or a descriptor of (rows, columns) tiles."""
    if not tma:
        return x
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, columns])


@triton.jit
def load_tile(
    x, row, column, rows, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """(ROWS, COLUMNS) of x from (row, column); rows from ``rows`` on read as zero."""
    if TMA:
        return x.load([row, column])
    else:
        offs_r = row + tl.arange(0, ROWS)
        offs_c = column + tl.arange(0, COLUMNS)
        where = x + offs_r[:, None].to(tl.int64) * stride + offs_c[None, :]
        return tl.load(where, mask=offs_r[:, None] < rows, other=0.0)


@triton.jit
def tile_dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with fp32 accumulation; PRECISION is read for fp32 operands."""
    how: tl.constexpr = "ieee" if PRECISION == "highest" else PRECISION
    if INTERPRETED and a.dtype == tl.bfloat16:  # the interpreter would multiply the bit patterns
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=how)
    else:
        return tl.dot(a, b, acc, input_precision=how)


@triton.jit
def similarities(
    a, b, row_a, row_b, rows_a, rows_b, stride,
    ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(ROWS_A, ROWS_B) of a b^T. "highest" is of [hi | lo] rows, lo hi' + hi lo' first: tensor
    cores drop what does not fit behind the sum, and then it is small."""
    acc = tl.zeros((ROWS_A, ROWS_B), tl.float32)
    if PRECISION == "highest" and not TMA:
        for k in range(0, 2 * D, BLOCK_K):
            x = load_tile(a, row_a, (k + D) % (2 * D), rows_a, stride, ROWS_A, BLOCK_K, TMA)
            y = load_tile(b, row_b, k, rows_b, stride, ROWS_B, BLOCK_K, TMA)
            acc = tile_dot(x, y.T, acc, PRECISION)
    # Descriptors take all products in one loop, for Triton flattens no nest of two; pointers that
    # are computed so lose their pipeline.
    steps: tl.constexpr = 3 * D if PRECISION == "highest" and TMA else D
    for k in range(0, steps, BLOCK_K):
        of_a, of_b = k, k
        if steps > D:
            of_a, of_b = (k + tl.where(k < 2 * D, D, 0)) % (2 * D), k % (2 * D)
        x = load_tile(a, row_a, of_a, rows_a, stride, ROWS_A, BLOCK_K, TMA)
        y = load_tile(b, row_b, of_b, rows_b, stride, ROWS_B, BLOCK_K, TMA)
        acc = tile_dot(x, y.T, acc, PRECISION)
    return acc


@triton.jit
def load_unit_rows(z, offs_r, offs_c, mask, stride, PITCH: tl.constexpr, SPLIT: tl.constexpr):
    """fp32 unit rows (R, C) of a packed z: hi + lo where it is split."""
    where = z + offs_r[:, None].to(tl.int64) * stride + offs_c[None, :]
    hi = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    if SPLIT:
        hi += tl.load(where + PITCH, mask=mask, other=0.0).to(tl.float32)
        hi *= PER_UNIT
    return hi


@triton.jit
def may_be_equal(a, b):
    """Whether two vectors of ids overlap: ids are where a label stands first, so most do not."""
    return (tl.min(a, 0) <= tl.max(b, 0)) & (tl.max(a, 0) >= tl.min(b, 0))


@triton.jit
def load_scale(scale, FROM_MEMORY: tl.constexpr):
    """1/temperature: a scalar argument, or read from a 0-dim tensor."""
    if FROM_MEMORY:
        return tl.load(scale).to(tl.float32)
    else:
        return scale


@triton.jit
def log1p(x):
    """log(1 + x) for fp64 x >= 0, to relative accuracy for small x (Kahan)."""
    u = 1.0 + x
    safe = tl.where(u == 1.0, 2.0, u)
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, tl.log(safe) * (x / (safe - 1.0))))


@triton.jit
def expm1(x):
    """exp(x) - 1 for fp64 x <= 0, to relative accuracy for small x (Kahan)."""
    u = tl.exp(x)
    um1 = u - 1.0
    plain = (u == 1.0) | (um1 == -1.0)
    safe = tl.where(plain, 0.5, u)
    return tl.where(u == 1.0, x, tl.where(um1 == -1.0, um1, um1 * (x / tl.log(safe))))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) in fp64."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p(tl.exp(-tl.abs(x)))


class Launcher:
    """Launches kernels on the device of their tensors.

    ``recorder``, where set, gets the launch instead (kernel, grid, args, options): the compile gate
    sees every kernel a call would launch without launching any.
    """

    recorder = None

    def __call__(self, kernel, grid: tuple[int, ...], *args, warps: int, stages: int, **constants):
        options = {"num_warps": warps, "num_stages": stages, **constants}
        if not INTERPRETED.value:  # named because Triton's default for it is about to change
            options["enable_fp_fusion"] = True
        if self.recorder is None:
            kernel[grid](*args, **options)
        else:
            self.recorder(kernel, grid, args, options)


launch = Launcher()


def shortest(eps: float) -> float:
    """``eps`` as kernels get it, in fp32: `finish` must take the rows for shorter that `normalize`
    took, so the reciprocal is that of the rounded number."""
    return ctypes.c_float(eps).value or 2.0**-149


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
