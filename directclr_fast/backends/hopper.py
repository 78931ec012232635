"""The kernels of csrc/cuda as ``packed.PackedStages`` wants them: tensors in, launches out.

Every function queues its work on the current stream of its tensors' device and waits for nothing.
"""

from __future__ import annotations

import contextlib
from functools import cache

import torch
from torch import Tensor

from ..address import address, start
from ..kernels.configs import Tile
from ..kernels.layout import Layout
from ..kernels.records import STORE, Factors, View

try:
    from .. import _cuda

    missing = None
except ImportError as error:
    _cuda = None
    missing = str(error).partition(" (/")[0]

PARTIAL_BYTES = 64 * 2**20
PINGPONG_PITCH = 256  # by design, not yet by measurement: short products leave exponentials bare

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_OPERANDS = {"fp16": 0, "bf16": 1, "fp8": 2}


def pingpong(layout: Layout) -> bool:
    """Which schedule the tile products take: a tile for each warpgroup, or one for both."""
    return layout.precision != "fp8" and layout.pitch <= PINGPONG_PITCH


def tile(layout: Layout) -> Tile:
    """The tile of ``sums`` and ``weights``."""
    height = 64 if pingpong(layout) else 128
    return Tile(height, 256, 128 if layout.precision == "fp8" else 64, 12, 4, tma=True)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def device(tensor: Tensor):
    """A context in which torch's own operations go to the device of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _stream(tensor: Tensor) -> tuple[int, int, int]:
    where = tensor.device
    handle = torch.cuda.current_stream(where).cuda_stream
    return handle, where.index, multiprocessors(where)


class _On:
    """Addresses of a launch's arguments on the device of ``like``, 0 for None."""

    def __init__(self, like: Tensor) -> None:
        self.device = like.device

    def f32(self, tensor: Tensor | None, size: int) -> int:
        return address(tensor, torch.float32, size, self.device)

    def f64(self, tensor: Tensor | None, size: int) -> int:
        return address(tensor, torch.float64, size, self.device)

    def index(self, layout: Layout, columns: Tensor | None) -> int:
        return address(columns, torch.int64, layout.dim, self.device)

    def rows(self, layout: Layout, z: Tensor) -> int:
        return address(z, layout.dtype, len(z) * layout.row, self.device)

    def scale(self, scale) -> tuple[int, float]:
        """(address, value) of 1/temperature, of which one counts."""
        return (self.f32(scale, 1), 0.0) if isinstance(scale, Tensor) else (0, scale)

    def operands(self, layout: Layout, a: Tensor, b: Tensor) -> tuple:
        starts = []
        for z in (a, b):
            self.rows(layout, z)  # a row's operand is a part of it
            starts.append(start("z", layout.operand(z), self.device))
        stride = layout.operand(a).stride(0)
        return _OPERANDS[layout.precision], *starts, len(a), len(b), layout.pitch, stride

    def exponent(self, layout: Layout, scale) -> tuple:
        return *self.scale(scale), layout.fp8_scale**-2 if layout.precision == "fp8" else 1.0


def _layout(layout: Layout) -> tuple:
    fp8 = layout.precision == "fp8"
    half = layout.dtype == torch.bfloat16
    return half, fp8, layout.dim, layout.pitch, layout.row, layout.fp8_scale


def _view(r: Tensor) -> tuple:
    return start("r", r, r.device), _DTYPES[r.dtype], *r.shape, *r.stride()


# ------------------------------------------------------------------------------- normalize


def _unit_rows(layout: Layout, r: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.empty((len(r), layout.row), dtype=layout.dtype, device=r.device)
    return z, torch.empty(len(r), dtype=torch.float32, device=r.device)


def normalize(layout: Layout, r: Tensor, index: Tensor | None, eps: float):
    """z (rows, layout.row) and reciprocal norms (rows,) of one view."""
    (z, rnorm), on, view = _unit_rows(layout, r), _On(r), _view(r)
    z_at, rnorm_at = on.rows(layout, z), on.f32(rnorm, len(r))
    _cuda.normalize(
        _layout(layout), view, view, on.index(layout, index), z_at, z_at, rnorm_at, rnorm_at, 0,
        0, eps, False, _stream(r),
    )  # fmt: skip
    return z, rnorm


def normalize_views(
    layout: Layout, r1: Tensor, r2: Tensor, index: Tensor | None, offset: int, eps: float
):
    """(z1, z2, rnorm1, rnorm2, positives) in one launch; positives fp64 (rows of r1,)."""
    (z1, rnorm1), (z2, rnorm2) = _unit_rows(layout, r1), _unit_rows(layout, r2)
    found, on = torch.empty(len(r1), dtype=torch.float64, device=r1.device), _On(r1)
    _cuda.normalize(
        _layout(layout), _view(r1), _view(r2), on.index(layout, index), on.rows(layout, z1),
        on.rows(layout, z2), on.f32(rnorm1, len(r1)), on.f32(rnorm2, len(r2)),
        on.f64(found, len(r1)), offset, eps, True, _stream(r1),
    )  # fmt: skip
    return z1, z2, rnorm1, rnorm2, found


def positives(layout: Layout, z1: Tensor, z2: Tensor, offset: int) -> Tensor:
    """s_ip(i) in fp64, (rows of z1,), from packed rows; p(i) = i + offset lies in z2."""
    found, on = torch.empty(len(z1), dtype=torch.float64, device=z1.device), _On(z1)
    _cuda.positives(
        _layout(layout), on.rows(layout, z1), on.rows(layout, z2), on.f64(found, len(z1)), len(z1),
        offset, _stream(z1),
    )  # fmt: skip
    return found


# ------------------------------------------------------------------------------- sums


class Partials:
    """Partial sums of one launch: a line of rows for each tile of columns, and the reverse."""

    def __init__(self, rows: int, columns: int, tile: Tile, moving: bool, peaks: bool, device):
        self.row_lines, self.column_lines = -(-columns // tile.columns), -(-rows // tile.rows)

        def buffer(lines: int, length: int, there: bool) -> Tensor | None:
            shape = (lines, length)
            return torch.empty(shape, dtype=torch.float32, device=device) if there else None

        self.row_sum = buffer(self.row_lines, rows, True)
        self.row_peak = buffer(self.row_lines, rows, peaks)
        self.column_sum = buffer(self.column_lines, columns, moving)
        self.column_peak = buffer(self.column_lines, columns, moving and peaks)


def strips(m: int, n: int, tile: Tile, moving: bool, peaks: bool) -> list[slice]:
    """The anchors in strips whose partials stay within PARTIAL_BYTES, or are of one tile row."""
    a_row = 4 * (-(-n // tile.columns) + (n / tile.rows if moving else 0)) * (2 if peaks else 1)
    rows = max(1, int(PARTIAL_BYTES / a_row) // tile.rows) * tile.rows
    return [slice(start, min(start + rows, m)) for start in range(0, m, rows)]


def partial_sums(
    layout: Layout, z1: Tensor, z2: Tensor, strip: slice, scale, offset: int, tile: Tile,
    programs: int, *, moving: bool, bounded: bool, upper: bool = False, tops=None,
) -> Partials:  # fmt: skip
    """One launch: partials of the anchors in ``strip`` (z1) against all candidates (z2), or, for
    ``upper``, against those from the strip's first row on.

    ``tops`` (``stages.Tops``), without ``bounded`` only, is raised to the largest logits of these.
    """
    rows = strip.stop - strip.start
    z2 = z2[strip.start :] if upper else z2
    parts, on = Partials(rows, len(z2), tile, moving, not bounded, z1.device), _On(z1)
    own = None if tops is None or tops.own is None else tops.own[strip]
    by_row, by_column = parts.row_lines * rows, parts.column_lines * len(z2)
    _cuda.sums(
        on.operands(layout, z1[strip], z2), on.f32(parts.row_sum, by_row),
        on.f32(parts.row_peak, by_row), on.f32(parts.column_sum, by_column),
        on.f32(parts.column_peak, by_column), on.f32(own, rows), on.exponent(layout, scale),
        0 if upper else strip.start + offset, upper, moving, bounded, pingpong(layout), _stream(z1),
    )  # fmt: skip
    if tops is not None:
        column = tops.col[strip.start :] if upper else tops.col
        for top, peaks in ((tops.row[strip], parts.row_peak), (column, parts.column_peak)):
            if top is not None:
                torch.maximum(top, peaks.amax(0), out=top)
    return parts


def log_sums(
    layout: Layout, z1, z2, scale, offset, tile, programs, *, moving, bounded, upper=False,
    tops=None,
):  # fmt: skip
    """(rest_row (M,), rest_col (N,) or None) in fp64, over strips."""
    row = torch.empty(len(z1), dtype=torch.float64, device=z1.device)
    column = torch.empty(len(z2), dtype=torch.float64, device=z1.device) if moving else None
    for strip in strips(len(z1), len(z2), tile, moving, not bounded):
        parts = partial_sums(
            layout, z1, z2, strip, scale, offset, tile, programs,
            moving=moving, bounded=bounded, upper=upper, tops=tops,
        )  # fmt: skip
        _fold(parts.row_sum, parts.row_peak, row[strip], True)
        if moving:
            into = column[strip.start :] if upper else column
            _fold(parts.column_sum, parts.column_peak, into, strip.start == 0)
    return row, column


def _fold(sums: Tensor, peaks: Tensor | None, into: Tensor, first: bool) -> None:
    """``into`` (n,) fp64 log-sums: set (``first``) or increased by lines of partials."""
    (lines, n), on = sums.shape, _On(sums)
    _cuda.fold(
        on.f32(sums, lines * n), on.f32(peaks, lines * n), on.f64(into, n), n, lines, n, first,
        _stream(sums),
    )  # fmt: skip


def combine(problem, positives, scale, *, bounded, parts: Partials | None, rest=(None, None)):
    """Loss (scalar or (M,), fp32), row_lse, col_lse, nll_row, nll_col in one or two launches.

    From the partials of a single launch, or from ``rest``, the log-sums of several.
    """
    m, n = problem.rows, problem.candidates

    def statistic(length: int) -> Tensor:
        return torch.empty(length, dtype=torch.float64, device=positives.device)

    row_lse, nll_row = statistic(m), statistic(m)
    col_lse = statistic(n if problem.symmetric else 0)
    nll_col = statistic(m if problem.symmetric else 0)
    per_row, blocks = problem.reduction == "none", _cuda.combine_blocks(n)
    by_row = positives.new_empty(m, dtype=torch.float32) if per_row else None
    by_block = None if per_row else statistic(blocks)
    on, where = _On(positives), (0,) * 6
    if parts is not None:
        by_line, by_column = parts.row_lines * m, parts.column_lines * n
        where = (
            on.f32(parts.row_sum, by_line), on.f32(parts.row_peak, by_line),
            on.f32(parts.column_sum, by_column), on.f32(parts.column_peak, by_column),
            parts.row_lines, parts.column_lines,
        )  # fmt: skip
    sides = n if problem.symmetric else 0, m if problem.symmetric else 0
    _cuda.combine(
        where, on.f64(rest[0], m), on.f64(rest[1], n), on.f64(positives, m), *on.scale(scale),
        on.f64(row_lse, m), on.f64(col_lse, sides[0]), on.f64(nll_row, m),
        on.f64(nll_col, sides[1]), on.f32(by_row, m), on.f64(by_block, blocks), m, n,
        problem.row_offset, problem.symmetric, _stream(positives),
    )  # fmt: skip
    if per_row:
        return by_row, row_lse, col_lse, nll_row, nll_col
    loss = positives.new_empty((), dtype=torch.float32)
    factor = float(m) if problem.reduction == "mean" else 1.0
    _cuda.total(on.f64(by_block, blocks), on.f32(loss, 1), blocks, factor, _stream(positives))
    return loss, row_lse, col_lse, nll_row, nll_col


# ------------------------------------------------------------------------------- weights, products


def factors(problem, saved, upstream: Tensor, largest: Tensor | None, bounded: bool) -> Factors:
    """One launch. ``largest`` = max |upstream| for reduction "none", else None (weights 1)."""
    found = Factors(problem.rows, problem.candidates, problem.symmetric, bounded, upstream.device)
    m, n, on = problem.rows, problem.candidates, _On(upstream)
    columns, own = (n, m) if problem.symmetric else (0, 0)
    col = n if problem.symmetric else m  # where there is none, the row's stands for it
    col_shift = m if bounded else col
    _cuda.factors(
        on.f32(upstream, 1 if largest is None else m), on.f32(largest, 1), on.f64(saved.row_lse, m),
        on.f64(saved.col_lse, columns), on.f64(saved.nll_row, m), on.f64(saved.nll_col, own),
        on.f32(found.row, m), on.f32(found.col, col), on.f32(found.row_shift, m),
        on.f32(found.col_shift, col_shift), on.f32(found.diagonal, m), m, n, problem.row_offset,
        STORE, problem.symmetric, bounded, _stream(upstream),
    )  # fmt: skip
    return found


def weights(
    layout: Layout, z1: Tensor, z2: Tensor, found: Factors, scale, offset: int, rows: slice,
    columns: slice, out: Tensor, tile: Tile,
) -> Tensor:  # fmt: skip
    """One launch: the super-block ``rows`` x ``columns`` of P into ``out``'s memory; its columns
    are padded with zeros to whole tiles."""
    height = rows.stop - rows.start
    pitch = -(-(columns.stop - columns.start) // tile.columns) * tile.columns
    block = out[: height * pitch].view(height, pitch)
    col, col_shift = found.row, found.row_shift
    if found.symmetric:
        col, col_shift = found.col[columns], found.col_shift[columns]
    on = _On(z1)
    _cuda.weights(
        on.operands(layout, z1[rows], z2[columns]),
        address(block, layout.dtype, height * pitch, z1.device), pitch,
        on.f32(found.row[rows], height), on.f32(col, len(col)),
        on.f32(found.row_shift[rows], height),
        on.f32(col_shift, len(col_shift if found.bounded else col)), found.symmetric,
        on.exponent(layout, scale),
        rows.start + offset - columns.start, found.bounded, pingpong(layout), _stream(z1),
    )  # fmt: skip
    return block


def product(
    layout: Layout, p: Tensor, z: Tensor, dz: Tensor, rows: slice, inner: slice, *,
    transposed: bool, add: bool, tile: Tile,
) -> None:  # fmt: skip
    """dz[rows] = (or +=) op(P) z[inner] by the library: half operands, fp32 result and sums."""
    n, k = rows.stop - rows.start, inner.stop - inner.start
    a = p[:k, :n].T if transposed else p[:n, :k]
    b = layout.half_operand(z)[inner]
    if add:
        torch.ops.aten.addmm.dtype_out(dz[rows], a, b, torch.float32, out=dz[rows])
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=dz[rows])


# ------------------------------------------------------------------------------- finish


def finish(
    layout: Layout, views: list[tuple[View, int]], other: Tensor, diagonal: Tensor | None,
    offset: int, *, upstream: Tensor | None, scale, factor: float, index: Tensor | None, width: int,
    eps: float, add: bool,
) -> None:  # fmt: skip
    """One launch for one or two ``views``, each with its number (1 or 2); ``other`` is the z that
    is not the first one's.

    With ``diagonal`` (M,) the positives' terms are added and everything is multiplied by
    factor * upstream * scale; without it acc is the gradient already.
    """
    sides, on = [], _On(views[0][0].z)
    for (view, number), partner in zip(views, (other, views[0][0].z), strict=False):
        steps = (offset, 0) if number == 1 else (-offset, -offset)
        strides = (0, 0) if view.dr is None else view.dr.stride()
        n, dr = len(view.z), view.dr
        sides.append(
            (on.rows(layout, view.z), on.rows(layout, partner), on.f32(view.rnorm, n),
             on.f32(view.acc, n * layout.pitch), 0 if dr is None else start("dr", dr, on.device),
             *strides, on.f32(view.dots, n), n, *steps)
        )  # fmt: skip
    outputs = [view.dr for view, _ in views if view.dr is not None]
    dtype = _DTYPES[outputs[0].dtype if outputs else torch.float32]
    diagonals = 0 if diagonal is None else len(diagonal)
    # An eps below fp32's reach has no largest reciprocal there.
    largest = min(1.0 / eps, float("inf")) if eps > 0 else float("inf")
    _cuda.finish(
        _layout(layout), dtype, sides[0], sides[1] if len(sides) > 1 else None,
        on.index(layout, index), on.f32(diagonal, diagonals), diagonals, width, largest, add,
        factor, on.f32(upstream, 1), *on.scale(scale), _stream(views[0][0].z),
    )  # fmt: skip


def add_positives(
    layout: Layout, dz: Tensor, other: Tensor, diagonal: Tensor, factor: Tensor, step: int, shift
) -> None:
    """dz_i = factor dz_i + diagonal_{i + shift} z'_{i + step}, where that entry exists; fp32."""
    on = _On(dz)
    _cuda.add_positives(
        _layout(layout), on.f32(dz, len(dz) * layout.pitch), on.rows(layout, other),
        on.f32(diagonal, len(diagonal)), on.f32(factor, 1), len(dz), len(other),
        len(diagonal), step, shift, _stream(dz),
    )  # fmt: skip
