r"""Stage 1: unit rows of the columns taken, reciprocal norms, and the positives' cosines.

z_i = x_i / max(|x_i|, eps), s_ip(i) = z1_i . z2_p(i)                 (docs/design.md section 2)

Tile walk: a program owns ROWS rows; with both views given it owns candidates j of view 2 and their
anchors i = j - offset of view 1, so that the positives come from the rows it has read anyway. It
passes twice over the columns in chunks (the second time from cache): squares and products are
summed in fp64, so rows of 1e19 and of 1e-30 are right, then the rows are divided and packed as
``layout.Layout`` says.

Read: the strided slice r[:, :d] or the columns ``index`` names, in place. Written: packed z with
zeros up to PITCH, 1/max(|x|, eps) in fp32, positives in fp64.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import PER_UNIT, Layout, cdiv, launch, load_unit_rows, shortest

ROWS, COLUMNS = 4, 128


@triton.jit
def _load(r, index, offs_r, row_mask, offs_c, d, width, stride_r, stride_c, GATHERED: tl.constexpr):
    """(R, C) in fp64, zero outside. An index beyond the row reads NaN: nobody waits to check it."""
    mask_c = offs_c < d
    mask = row_mask[:, None] & mask_c[None, :]
    if GATHERED:
        offs_c = tl.load(index + offs_c, mask=mask_c, other=0)
    inside = (offs_c >= 0) & (offs_c < width)
    where = r + offs_r[:, None].to(tl.int64) * stride_r + offs_c[None, :].to(tl.int64) * stride_c
    found = tl.load(where, mask=mask & inside[None, :], other=0.0).to(tl.float64)
    if GATHERED:
        found = tl.where(mask & ~inside[None, :], float("nan"), found)
    return found


@triton.jit
def _pack(
    z, offs_r, row_mask, offs_c, value, stride_z, fp8_scale,
    PITCH: tl.constexpr, SPLIT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    mask = row_mask[:, None] & (offs_c < PITCH)[None, :]
    row = z + offs_r[:, None].to(tl.int64) * stride_z
    scaled = value
    if SPLIT:
        scaled = value * (1.0 / PER_UNIT)
    hi = scaled.to(z.dtype.element_ty)
    tl.store(row + offs_c[None, :], hi, mask=mask)
    if SPLIT:
        lo = (scaled - hi.to(tl.float32)).to(z.dtype.element_ty)
        tl.store(row + PITCH + offs_c[None, :], lo, mask=mask)
    if FP8:
        small = (row + 2 * PITCH).to(tl.pointer_type(tl.float8e4nv), bitcast=True)
        tl.store(small + offs_c[None, :], (value * fp8_scale).to(tl.float8e4nv), mask=mask)


@triton.jit(do_not_specialize=["n1", "n2", "d", "offset"])
def _normalize_kernel(
    r1, r2, index, z1, z2, rnorm1, rnorm2, positives, n1, n2, d, width, offset, stride_r1,
    stride_c1, stride_r2, stride_c2, stride_z, eps, fp8_scale,
    PITCH: tl.constexpr, BOTH: tl.constexpr, GATHERED: tl.constexpr, SPLIT: tl.constexpr,
    FP8: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    offs_2 = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_1 = offs_2
    if BOTH:
        offs_1 = offs_2 - offset
    mask_1 = (offs_1 >= 0) & (offs_1 < n1)
    mask_2 = offs_2 < n2
    square_1 = tl.zeros((ROWS,), tl.float64)
    square_2 = tl.zeros((ROWS,), tl.float64)
    product = tl.zeros((ROWS,), tl.float64)
    for c in range(0, d, COLUMNS):
        offs_c = c + tl.arange(0, COLUMNS)
        x1 = _load(r1, index, offs_1, mask_1, offs_c, d, width, stride_r1, stride_c1, GATHERED)
        square_1 += tl.sum(x1 * x1, 1)
        if BOTH:
            x2 = _load(r2, index, offs_2, mask_2, offs_c, d, width, stride_r2, stride_c2, GATHERED)
            square_2 += tl.sum(x2 * x2, 1)
            product += tl.sum(x1 * x2, 1)
    # where, not maximum: a NaN norm stays NaN.
    norm_1 = tl.sqrt(square_1)
    norm_1 = tl.where(norm_1 < eps, eps, norm_1)
    inverse_1 = 1.0 / norm_1
    tl.store(rnorm1 + offs_1, inverse_1.to(tl.float32), mask=mask_1)
    inverse_2 = inverse_1
    if BOTH:
        norm_2 = tl.sqrt(square_2)
        norm_2 = tl.where(norm_2 < eps, eps, norm_2)
        inverse_2 = 1.0 / norm_2
        tl.store(rnorm2 + offs_2, inverse_2.to(tl.float32), mask=mask_2)
        tl.store(positives + offs_1, product * inverse_1 * inverse_2, mask=mask_1)
    for c in range(0, PITCH, COLUMNS):
        offs_c = c + tl.arange(0, COLUMNS)
        x1 = _load(r1, index, offs_1, mask_1, offs_c, d, width, stride_r1, stride_c1, GATHERED)
        value = (x1 * inverse_1[:, None]).to(tl.float32)
        _pack(z1, offs_1, mask_1, offs_c, value, stride_z, fp8_scale, PITCH, SPLIT, FP8)
        if BOTH:
            x2 = _load(r2, index, offs_2, mask_2, offs_c, d, width, stride_r2, stride_c2, GATHERED)
            value = (x2 * inverse_2[:, None]).to(tl.float32)
            _pack(z2, offs_2, mask_2, offs_c, value, stride_z, fp8_scale, PITCH, SPLIT, FP8)


def normalize(
    layout: Layout, views: list[tuple[Tensor, Tensor, Tensor]], positives: Tensor | None,
    index: Tensor | None, offset: int, eps: float,
) -> None:  # fmt: skip
    """One launch: fills z (rows, layout.row) and reciprocal norms (rows,) of one or two ``views``,
    each (r, z, rnorm); of two also ``positives`` (rows of the first,), the cosines in fp64."""
    (r1, z1, rnorm1), (r2, z2, rnorm2) = views[0], views[-1]
    launch(
        _normalize_kernel, (cdiv(len(r2), ROWS),),
        r1, r2, r1 if index is None else index, layout.elements(z1), layout.elements(z2), rnorm1,
        rnorm2, rnorm1 if positives is None else positives, len(r1), len(r2), layout.dim,
        r1.shape[1], offset, *r1.stride(), *r2.stride(), layout.stride, shortest(eps),
        layout.fp8_scale,
        PITCH=layout.pitch, BOTH=len(views) > 1, GATHERED=index is not None, SPLIT=layout.split,
        FP8=layout.precision == "fp8", ROWS=ROWS, COLUMNS=COLUMNS, warps=4, stages=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "offset"])
def _positives_kernel(
    z1, z2, positives, n, offset, stride_z,
    PITCH: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    offs_1 = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask_1 = offs_1 < n
    total = tl.zeros((ROWS,), tl.float64)
    for c in range(0, PITCH, COLUMNS):
        offs_c = c + tl.arange(0, COLUMNS)
        mask = mask_1[:, None] & (offs_c < PITCH)[None, :]
        a = load_unit_rows(z1, offs_1, offs_c, mask, stride_z, PITCH, SPLIT)
        b = load_unit_rows(z2, offs_1 + offset, offs_c, mask, stride_z, PITCH, SPLIT)
        total += tl.sum(a.to(tl.float64) * b.to(tl.float64), 1)
    tl.store(positives + offs_1, total, mask=mask_1)


def positives(layout: Layout, z1: Tensor, z2: Tensor, offset: int, cosines: Tensor) -> None:
    """One launch: ``cosines`` (rows of z1,) become s_ip(i) in fp64, from packed rows; p(i) =
    i + offset lies in z2."""
    launch(
        _positives_kernel, (cdiv(len(z1), ROWS),),
        layout.elements(z1), layout.elements(z2), cosines, len(z1), offset, layout.stride,
        PITCH=layout.pitch, SPLIT=layout.split, ROWS=ROWS, COLUMNS=COLUMNS, warps=4, stages=1,
    )  # fmt: skip
