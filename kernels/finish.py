r"""Stage 5: the positives' term, the normalisation's backward, the cast, the full-width gradient.

    dz_i = f (acc_i + diagonal_i z'_p(i))        dx_i = (dz_i - z_i (z_i . dz_i)) / |x_i|

acc is the product as accumulated, f the factor it still lacks (upstream gradient, 1/temperature,
the mean's 1/M, the weights' stored scale), z' the other view's row: the positives' term is added
here in fp32 because a converged gradient is the small difference of two near views. Rows shorter
than eps were divided by a constant and have no projection. The columns that were not taken are
zero. sum_i z_i . dz_i is the temperature's gradient times a.

Tile walk: a program owns ROWS rows of one view and passes twice over their columns (dot, then
write; the second from cache).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import Layout, cdiv, launch, load_scale, load_unit_rows, shortest
from .layout import Side

ROWS, COLUMNS = 4, 128


@triton.jit
def _gradient(
    z, other, acc, diag, offs_r, offs_o, row_mask, other_mask, offs_c, factor, stride_z, stride_acc,
    PITCH: tl.constexpr, SPLIT: tl.constexpr, POSITIVES: tl.constexpr,
):  # fmt: skip
    """(unit rows, dz), each (R, C) in fp32."""
    mask_c = (offs_c < PITCH)[None, :]
    mask = row_mask[:, None] & mask_c
    unit = load_unit_rows(z, offs_r, offs_c, mask, stride_z, PITCH, SPLIT)
    where = acc + offs_r[:, None].to(tl.int64) * stride_acc + offs_c[None, :]
    dz = tl.load(where, mask=mask, other=0.0)
    if POSITIVES:
        mask = other_mask[:, None] & mask_c
        dz += diag[:, None] * load_unit_rows(other, offs_o, offs_c, mask, stride_z, PITCH, SPLIT)
    return unit, dz * factor


@triton.jit
def _finish_rows(
    z, other, rnorm, acc, diagonal, dr, dots, index, n, to_other, to_diagonal, n_diagonal, factor,
    largest_rnorm, d, width, stride_z, stride_acc, stride_dr, stride_dc,
    PITCH: tl.constexpr, SPLIT: tl.constexpr, POSITIVES: tl.constexpr, WRITE: tl.constexpr,
    DOTS: tl.constexpr, GATHERED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = offs_r < n
    offs_d = offs_r + to_diagonal
    other_mask = row_mask & (offs_d >= 0) & (offs_d < n_diagonal)
    diag = tl.zeros((ROWS,), tl.float32)
    if POSITIVES:
        diag = tl.load(diagonal + offs_d, mask=other_mask, other=0.0)
    offs_o = offs_r + to_other
    dot = tl.zeros((ROWS,), tl.float32)
    for c in range(0, PITCH, COLUMNS):
        offs_c = c + tl.arange(0, COLUMNS)
        unit, dz = _gradient(
            z, other, acc, diag, offs_r, offs_o, row_mask, other_mask, offs_c, factor,
            stride_z, stride_acc, PITCH, SPLIT, POSITIVES,
        )  # fmt: skip
        dot += tl.sum(unit * dz, 1)
    if DOTS:
        tl.store(dots + offs_r, dot, mask=row_mask)
    if WRITE:
        inverse = tl.load(rnorm + offs_r, mask=row_mask, other=0.0)
        dot = tl.where(inverse >= largest_rnorm, 0.0, dot)
        row = dr + offs_r[:, None].to(tl.int64) * stride_dr
        for c in range(0, d, COLUMNS):
            offs_c = c + tl.arange(0, COLUMNS)
            unit, dz = _gradient(
                z, other, acc, diag, offs_r, offs_o, row_mask, other_mask, offs_c, factor,
                stride_z, stride_acc, PITCH, SPLIT, POSITIVES,
            )  # fmt: skip
            dx = (dz - unit * dot[:, None]) * inverse[:, None]
            mask_c = offs_c < d
            column = offs_c
            if GATHERED:
                column = tl.load(index + offs_c, mask=mask_c, other=0)
                mask_c &= (column >= 0) & (column < width)  # as `normalize` read them
            where = row + column[None, :].to(tl.int64) * stride_dc
            mask = row_mask[:, None] & mask_c[None, :]
            if ADD:
                dx += tl.load(where, mask=mask, other=0.0).to(tl.float32)
            tl.store(where, dx.to(dr.dtype.element_ty), mask=mask)
        if not GATHERED:
            for c in range(d, width, COLUMNS):
                offs_c = c + tl.arange(0, COLUMNS)
                mask = row_mask[:, None] & (offs_c < width)[None, :]
                zero = tl.zeros((ROWS, COLUMNS), dr.dtype.element_ty)
                tl.store(row + offs_c[None, :].to(tl.int64) * stride_dc, zero, mask=mask)


@triton.jit(do_not_specialize=[
    "n_a", "n_b", "a_to_b", "b_to_a", "a_to_diagonal", "b_to_diagonal", "n_diagonal", "d",
])  # fmt: skip
def _finish_kernel(
    z_a, z_b, rnorm_a, rnorm_b, acc_a, acc_b, dr_a, dr_b, dots_a, dots_b, diagonal, index, upstream,
    scale, static_factor, n_a, n_b, a_to_b, b_to_a, a_to_diagonal, b_to_diagonal, n_diagonal,
    largest_rnorm, d, width, stride_z, stride_acc, stride_dr_a, stride_dr_b, stride_dc_a,
    stride_dc_b,
    PITCH: tl.constexpr, SPLIT: tl.constexpr, FACTORED: tl.constexpr, SCALE_TENSOR: tl.constexpr,
    WRITE_A: tl.constexpr, WRITE_B: tl.constexpr, DOTS: tl.constexpr, GATHERED: tl.constexpr,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    factor = static_factor
    if FACTORED:
        factor *= tl.load(upstream).to(tl.float32) * load_scale(scale, SCALE_TENSOR)
    if tl.program_id(1) == 0:
        _finish_rows(
            z_a, z_b, rnorm_a, acc_a, diagonal, dr_a, dots_a, index, n_a, a_to_b, a_to_diagonal,
            n_diagonal, factor, largest_rnorm, d, width, stride_z, stride_acc, stride_dr_a,
            stride_dc_a, PITCH, SPLIT, FACTORED, WRITE_A, DOTS, GATHERED, ADD, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        _finish_rows(
            z_b, z_a, rnorm_b, acc_b, diagonal, dr_b, dots_b, index, n_b, b_to_a, b_to_diagonal,
            n_diagonal, factor, largest_rnorm, d, width, stride_z, stride_acc, stride_dr_b,
            stride_dc_b, PITCH, SPLIT, FACTORED, WRITE_B, DOTS, GATHERED, ADD, ROWS, COLUMNS,
        )  # fmt: skip


def finish(
    layout: Layout, views: list[tuple[Side, int]], other: Tensor, diagonal: Tensor | None,
    offset: int, *, upstream: Tensor | None, scale, factor: float, index: Tensor | None, width: int,
    eps: float, add: bool,
) -> None:  # fmt: skip
    """One launch for one or two ``views``, each with its number (1 or 2). ``other``: z of the view
    that is not ``views[0]``.

    With ``diagonal`` (M,) the positives' terms are added and everything is multiplied by
    factor * upstream * scale; without it acc is the gradient already.
    """
    sides = [views[0], views[-1]]  # one view alone stands for both
    both, factored = [view for view, _ in sides], diagonal is not None
    first = both[0]
    some = next((v.dr for v in both if v.dr is not None), first.acc)
    drs = [some if v.dr is None else v.dr for v in both]
    # From a row of a view: to the other view's row, to the diagonal's entry.
    steps = [(offset, 0) if number == 1 else (-offset, -offset) for _, number in sides]
    to_other, to_diagonal = zip(*steps)
    # 4 spill with dots on sm_120 (Triton 3.6), of bf16 parts on sm_90 (3.7).
    warps = 8 if factored or first.dots is not None else 4
    launch(
        _finish_kernel, (cdiv(max(len(v.z) for v in both), ROWS), len(views)),
        layout.elements(first.z), layout.elements(other), *(v.rnorm for v in both),
        *(v.acc for v in both), *drs, *(v.rnorm if v.dots is None else v.dots for v in both),
        diagonal if factored else first.rnorm, first.z if index is None else index,
        upstream if factored else first.rnorm, scale, factor,
        *(len(v.z) for v in both), *to_other, *to_diagonal, len(diagonal) if factored else 0,
        1.0 / shortest(eps), layout.dim, width, layout.stride, layout.pitch,
        *(dr.stride(0) for dr in drs), *(dr.stride(1) for dr in drs),
        PITCH=layout.pitch, SPLIT=layout.split, FACTORED=factored,
        SCALE_TENSOR=isinstance(scale, Tensor), WRITE_A=first.dr is not None,
        WRITE_B=both[1].dr is not None, DOTS=first.dots is not None, GATHERED=index is not None,
        ADD=add, ROWS=ROWS, COLUMNS=COLUMNS, warps=warps, stages=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n", "n_other", "to_other", "to_diagonal", "n_diagonal"])
def _add_positives_kernel(
    dz, other, diagonal, factor, n, n_other, to_other, to_diagonal, n_diagonal, stride_z, stride_dz,
    PITCH: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_d = offs_r + to_diagonal
    row_mask = offs_r < n
    offs_o = offs_r + to_other
    # A block of candidates may hold nobody's positive (the ring of world.py).
    other_mask = row_mask & (offs_d >= 0) & (offs_d < n_diagonal)
    other_mask &= (offs_o >= 0) & (offs_o < n_other)
    diag = tl.load(diagonal + offs_d, mask=other_mask, other=0.0)[:, None]
    f = tl.load(factor).to(tl.float32)
    for c in range(0, PITCH, COLUMNS):
        offs_c = c + tl.arange(0, COLUMNS)
        mask_c = (offs_c < PITCH)[None, :]
        mask = other_mask[:, None] & mask_c
        unit = load_unit_rows(other, offs_o, offs_c, mask, stride_z, PITCH, SPLIT)
        where = dz + offs_r[:, None].to(tl.int64) * stride_dz + offs_c[None, :]
        mask = row_mask[:, None] & mask_c
        tl.store(where, tl.load(where, mask=mask, other=0.0) * f + diag * unit, mask=mask)


def add_positives(
    layout: Layout, dz: Tensor, other: Tensor, diagonal: Tensor, factor: Tensor, step: int, shift
) -> None:
    """dz_i = factor dz_i + diagonal_{i + shift} z'_{i + step}, where that entry exists; fp32."""
    launch(
        _add_positives_kernel, (cdiv(len(dz), ROWS),),
        dz, layout.elements(other), diagonal, factor, len(dz), len(other), step, shift,
        len(diagonal), layout.stride, layout.pitch,
        PITCH=layout.pitch, SPLIT=layout.split, ROWS=ROWS, COLUMNS=COLUMNS, warps=4, stages=1,
    )  # fmt: skip
