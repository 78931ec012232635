"""The kernels of csrc/cuda as ``packed.Packed`` wants them: tensors in, launches out.

Every function queues its work on the current stream of its tensors' device and waits for nothing.
Arguments are those of its namesake in ``kernels/``, where they are told.
"""

from __future__ import annotations

import contextlib
from functools import cache, partial

import torch
from torch import Tensor

from ..address import address, start
from ..kernels.configs import Tile
from ..kernels.layout import Layout
from ..kernels.library import product as product
from ..kernels.records import STORE, Factors, View

try:
    from .. import _cuda

    missing = None
except ImportError as error:
    _cuda = None
    missing = str(error).partition(" (/")[0]

PINGPONG_PITCH = 256  # by design, not yet by measurement: short products leave exponentials bare

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_OPERANDS = {"fp16": 0, "bf16": 1, "fp8": 2, "highest": 3}
_PARTIALS = ("row_sum", "row_peak", "col_sum", "col_peak")


def pingpong(layout: Layout) -> bool:
    """Which schedule the tile products take: a tile for each warpgroup, or one for both."""
    return layout.precision in ("fp16", "bf16") and layout.pitch <= PINGPONG_PITCH


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


def _stream(tensor: Tensor):
    where = tensor.device
    handle = torch.cuda.current_stream(where).cuda_stream
    return _cuda.Stream(handle=handle, device=where.index, multiprocessors=multiprocessors(where))


class _On:
    """Addresses of a launch's arguments on the device of ``like``, 0 for None."""

    def __init__(self, like: Tensor) -> None:
        self.device = like.device
        # Of (tensor or None, size=): some 40 of them a step, so no functions of our own.
        self.f32 = partial(address, dtype=torch.float32, device=like.device)
        self.f64 = partial(address, dtype=torch.float64, device=like.device)

    def index(self, layout: Layout, columns: Tensor | None) -> int:
        return address(columns, torch.int64, layout.dim, self.device)

    def rows(self, layout: Layout, z: Tensor) -> int:
        return address(z, layout.dtype, z.shape[0] * layout.row, self.device)

    def scale(self, scale) -> tuple[int, float]:
        """(address, value) of 1/temperature, of which one counts."""
        return (self.f32(scale, size=1), 0.0) if isinstance(scale, Tensor) else (0, scale)

    def operands(self, layout: Layout, a: Tensor, b: Tensor):
        # What layout.operand(z) is: the first halves of a row, or the bytes behind both.
        fp8, a_at, b_at = layout.precision == "fp8", self.rows(layout, a), self.rows(layout, b)
        at = 4 * layout.pitch if fp8 else 0
        return _cuda.Operands(
            type=_OPERANDS[layout.precision], pingpong=pingpong(layout), a=a_at + at, b=b_at + at,
            rows=a.shape[0], cols=b.shape[0], k=layout.pitch,
            pitch=layout.stride * (2 if fp8 else 1),
        )  # fmt: skip

    def exponent(self, layout: Layout, scale):
        at, value = self.scale(scale)
        return _cuda.Exponent(scale=at, value=value, operands=layout.cosine)


def _layout(layout: Layout):
    return _cuda.Layout(
        bf16=layout.dtype == torch.bfloat16, fp8=layout.precision == "fp8", d=layout.dim,
        pitch=layout.pitch, row=layout.stride, fp8_scale=layout.fp8_scale,
    )  # fmt: skip


def _input(r: Tensor):
    (rows, width), (row_stride, col_stride) = r.shape, r.stride()
    return _cuda.Input(
        data=start("r", r, r.device), dtype=_DTYPES[r.dtype], rows=rows, width=width,
        row_stride=row_stride, col_stride=col_stride,
    )  # fmt: skip


# ------------------------------------------------------------------------------- normalize


def _unit_rows(layout: Layout, r: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.empty((r.shape[0], layout.row), dtype=layout.dtype, device=r.device)
    return z, torch.empty(r.shape[0], dtype=torch.float32, device=r.device)


def normalize(layout: Layout, r: Tensor, index: Tensor | None, eps: float):
    """z (rows, layout.row) and reciprocal norms (rows,) of one view."""
    (z, rnorm), on, rows = _unit_rows(layout, r), _On(r), _input(r)
    arguments = _cuda.NormalizeArguments(
        r1=rows, r2=rows, index=on.index(layout, index), z1=on.rows(layout, z), z2=0,
        rnorm1=on.f32(rnorm, size=r.shape[0]), rnorm2=0, positives=0, offset=0, eps=eps, both=False,
    )  # fmt: skip
    _cuda.normalize(_layout(layout), arguments, _stream(r))
    return z, rnorm


def normalize_views(
    layout: Layout, r1: Tensor, r2: Tensor, index: Tensor | None, offset: int, eps: float
):
    """(z1, z2, rnorm1, rnorm2, positives) in one launch; positives fp64 (rows of r1,)."""
    (z1, rnorm1), (z2, rnorm2) = _unit_rows(layout, r1), _unit_rows(layout, r2)
    cosines, on = torch.empty(r1.shape[0], dtype=torch.float64, device=r1.device), _On(r1)
    arguments = _cuda.NormalizeArguments(
        r1=_input(r1), r2=_input(r2), index=on.index(layout, index), z1=on.rows(layout, z1),
        z2=on.rows(layout, z2), rnorm1=on.f32(rnorm1, size=r1.shape[0]),
        rnorm2=on.f32(rnorm2, size=r2.shape[0]),
        positives=on.f64(cosines, size=r1.shape[0]), offset=offset, eps=eps, both=True,
    )  # fmt: skip
    _cuda.normalize(_layout(layout), arguments, _stream(r1))
    return z1, z2, rnorm1, rnorm2, cosines


def positives(layout: Layout, z1: Tensor, z2: Tensor, offset: int) -> Tensor:
    """s_ip(i) in fp64, (rows of z1,), from packed rows; p(i) = i + offset lies in z2."""
    cosines, on = torch.empty(z1.shape[0], dtype=torch.float64, device=z1.device), _On(z1)
    arguments = _cuda.PositivesArguments(
        z1=on.rows(layout, z1), z2=on.rows(layout, z2), positives=on.f64(cosines, size=z1.shape[0]),
        n=z1.shape[0], offset=offset,
    )  # fmt: skip
    _cuda.positives(_layout(layout), arguments, _stream(z1))
    return cosines


# ------------------------------------------------------------------------------- sums


def lines(tile: Tile, strip: slice, columns: int, programs: int, upper: bool):
    """(lines by row, their length, lines by column, first column) of one launch's partials: a line
    of rows for each tile of columns, and the reverse; for ``upper`` from the strip's first row on.
    """
    first, rows = strip.start if upper else 0, strip.stop - strip.start
    return -(-(columns - first) // tile.columns), rows, -(-rows // tile.rows), first


def _parts(on: _On, parts) -> dict[str, int]:
    """Addresses of ``packed.Partials`` as the binding names them."""
    return {
        name: 0 if buffer is None else on.f32(buffer, size=buffer.numel())
        for name, buffer in parts._asdict().items()
    }


def sums(
    layout: Layout, z1: Tensor, z2: Tensor, strip: slice, scale, offset: int, tile: Tile,
    programs: int, parts, own: Tensor | None, *, bounded: bool, upper: bool, tops: bool, ids: None,
) -> None:  # fmt: skip
    """One launch: ``parts`` of the anchors in ``strip`` (z1) against all candidates (z2), or, for
    ``upper``, against those from the strip's first row on. ``tops`` without ``bounded`` only;
    ``own`` (M,) gets the positives' logits, in base 2, there and for "highest". No ``ids`` here."""
    on, own = _On(z1), None if own is None else own[strip]
    if upper:  # tiles below the diagonal are left out
        for name, buffer in parts._asdict().items():
            if buffer is not None:
                buffer.fill_(-torch.inf if name.endswith("peak") else 0.0)
    arguments = _cuda.SumsArguments(
        **_parts(on, parts), own=on.f32(own, size=strip.stop - strip.start),
        exponent=on.exponent(layout, scale), step=0 if upper else strip.start + offset, upper=upper,
        columns=parts.col_sum is not None, bounded=bounded,
    )  # fmt: skip
    z2 = z2[strip.start :] if upper else z2
    _cuda.sums(on.operands(layout, z1[strip], z2), arguments, _stream(z1))


def fold(sums: Tensor, peaks: Tensor | None, into: Tensor, first: bool, bounded: bool) -> None:
    """``into`` (n,) fp64 log-sums: set (``first``) or increased by the lines of ``sums``."""
    (lines, n), on = sums.shape, _On(sums)
    arguments = _cuda.FoldArguments(
        sums=on.f32(sums, size=lines * n), peaks=on.f32(peaks, size=lines * n),
        into=on.f64(into, size=n), n=n, lines=lines, stride=n, first=first,
    )  # fmt: skip
    _cuda.fold(arguments, _stream(sums))


def combine_blocks(n: int) -> int:
    """Losses that ``combine`` writes where they are to be summed."""
    return _cuda.combine_blocks(n)


def combine(problem, positives: Tensor, scale, parts, rest, out, *, bounded: bool) -> None:
    """One launch: ``out`` from ``parts`` or from ``rest``."""
    m, n, on = problem.rows, problem.candidates, _On(positives)
    per_row = problem.reduction == "none"
    partials = dict.fromkeys((*_PARTIALS, "row_lines", "col_lines"), 0)
    if parts is not None:
        col_lines = 0 if parts.col_sum is None else parts.col_sum.shape[0]
        partials = _parts(on, parts) | {"row_lines": parts.row_sum.shape[0], "col_lines": col_lines}
    columns, own = (n, m) if problem.symmetric else (0, 0)
    scale_at, scale_value = on.scale(scale)
    logits = positives.dtype == torch.float32
    arguments = _cuda.CombineArguments(
        **partials, rest_row=on.f64(rest[0], size=m), rest_col=on.f64(rest[1], size=n),
        positives=0 if logits else on.f64(positives, size=m),
        own=on.f32(positives, size=m) if logits else 0, scale=scale_at, scale_value=scale_value,
        row_lse=on.f64(out.row_lse, size=m), col_lse=on.f64(out.col_lse, size=columns),
        nll_row=on.f64(out.nll_row, size=m), nll_col=on.f64(out.nll_col, size=own),
        loss_by_row=on.f32(out.losses, size=m) if per_row else 0,
        loss_by_block=0 if per_row else on.f64(out.losses, size=out.losses.shape[0]), m=m, n=n,
        offset=problem.row_offset, symmetric=problem.symmetric,
    )  # fmt: skip
    _cuda.combine(arguments, _stream(positives))


def total(losses: Tensor, loss: Tensor, factor: float) -> None:
    """One launch: ``loss`` (0-dim) = sum of ``losses`` / factor, in a fixed order."""
    on, n = _On(losses), losses.shape[0]
    arguments = _cuda.TotalArguments(
        parts=on.f64(losses, size=n), loss=on.f32(loss, size=1), n=n, factor=factor
    )
    _cuda.total(arguments, _stream(losses))


# ------------------------------------------------------------------------------- weights, products


def factors(
    layout: Layout, problem, saved, upstream: Tensor, divisor: Tensor | None, bounded: bool
) -> Factors:
    """One launch."""
    record = Factors(problem.rows, problem.candidates, problem.symmetric, bounded, upstream.device)
    m, n, on = problem.rows, problem.candidates, _On(upstream)
    columns, own = (n, m) if problem.symmetric else (0, 0)
    col = n if problem.symmetric else m  # where there is none, the row's stands for it
    col_shift = m if bounded else col
    arguments = _cuda.FactorsArguments(
        upstream=on.f32(upstream, size=m) if problem.reduction == "none" else 0,
        largest=on.f32(divisor, size=1),
        row_lse=on.f64(saved.row_lse, size=m), col_lse=on.f64(saved.col_lse, size=columns),
        nll_row=on.f64(saved.nll_row, size=m), nll_col=on.f64(saved.nll_col, size=own),
        row=on.f32(record.row, size=m), col=on.f32(record.col, size=col),
        row_shift=on.f32(record.row_shift, size=m),
        col_shift=on.f32(record.col_shift, size=col_shift),
        diagonal=on.f32(record.diagonal, size=m), m=m, n=n, offset=problem.row_offset, store=STORE,
        symmetric=problem.symmetric, bounded=bounded,
    )  # fmt: skip
    _cuda.factors(arguments, _stream(upstream))
    return record


def weights(
    layout: Layout, z1: Tensor, z2: Tensor, factors: Factors, scale, offset: int, rows: slice,
    columns: slice, out: Tensor, tile: Tile, mirror: bool = False,
) -> Tensor:  # fmt: skip
    """One launch: the super-block ``rows`` x ``columns`` of P into ``out``'s memory; its columns
    are padded with zeros to whole tiles. ``mirror``: it is symmetric, and tiles of 256 below its
    diagonal are copies of those above."""
    height = rows.stop - rows.start
    pitch = -(-(columns.stop - columns.start) // tile.columns) * tile.columns * layout.parts
    block = layout.elements(out)[: height * pitch].view(height, pitch)
    col, col_shift = factors.row, factors.row_shift
    if factors.symmetric:
        col, col_shift = factors.col[columns], factors.col_shift[columns]
    on = _On(z1)
    addresses = _cuda.WeightFactors(
        row=on.f32(factors.row[rows], size=height), col=on.f32(col, size=col.shape[0]),
        row_shift=on.f32(factors.row_shift[rows], size=height),
        col_shift=on.f32(col_shift, size=(col_shift if factors.bounded else col).shape[0]),
        symmetric=factors.symmetric,
    )  # fmt: skip
    arguments = _cuda.WeightsArguments(
        out=address(block, layout.element, height * pitch, z1.device), pitch=pitch,
        factors=addresses, exponent=on.exponent(layout, scale),
        step=rows.start + offset - columns.start, bounded=factors.bounded, mirror=mirror,
    )  # fmt: skip
    _cuda.weights(on.operands(layout, z1[rows], z2[columns]), arguments, _stream(z1))
    return block


# ------------------------------------------------------------------------------- finish


def finish(
    layout: Layout, views: list[tuple[View, int]], other: Tensor, diagonal: Tensor | None,
    offset: int, *, upstream: Tensor | None, scale, factor: float, index: Tensor | None, width: int,
    eps: float, add: bool,
) -> None:  # fmt: skip
    """One launch for one or two ``views``."""
    sides, on = [], _On(views[0][0].z)
    for (view, number), partner in zip(views, (other, views[0][0].z), strict=False):
        to_other, to_diagonal = (offset, 0) if number == 1 else (-offset, -offset)
        row_stride, col_stride = (0, 0) if view.dr is None else view.dr.stride()
        n, dr = view.z.shape[0], view.dr
        side = _cuda.FinishSide(
            z=on.rows(layout, view.z), other=on.rows(layout, partner),
            rnorm=on.f32(view.rnorm, size=n),
            acc=on.f32(view.acc, size=n * layout.pitch),
            dr=0 if dr is None else start("dr", dr, on.device), dr_row_stride=row_stride,
            dr_col_stride=col_stride, dots=on.f32(view.dots, size=n), rows=n, to_other=to_other,
            to_diagonal=to_diagonal,
        )  # fmt: skip
        sides.append(side)
    outputs = [view.dr for view, _ in views if view.dr is not None]
    dtype = _DTYPES[outputs[0].dtype if outputs else torch.float32]
    diagonals = 0 if diagonal is None else diagonal.shape[0]
    scale_at, scale_value = on.scale(scale)
    arguments = _cuda.FinishArguments(
        dtype=dtype, index=on.index(layout, index), diagonal=on.f32(diagonal, size=diagonals),
        diagonals=diagonals, d=layout.dim, width=width, largest_rnorm=1.0 / eps, add=add,
        factor=factor, upstream=on.f32(upstream, size=1), scale=scale_at, scale_value=scale_value,
    )  # fmt: skip
    first, second = sides if len(sides) > 1 else (sides[0], None)
    _cuda.finish(_layout(layout), first, second, arguments, _stream(views[0][0].z))


def add_positives(
    layout: Layout, dz: Tensor, other: Tensor, diagonal: Tensor, factor: Tensor, step: int, shift
) -> None:
    """One launch."""
    on = _On(dz)
    arguments = _cuda.AddPositivesArguments(
        dz=on.f32(dz, size=dz.shape[0] * layout.pitch), other=on.rows(layout, other),
        diagonal=on.f32(diagonal, size=diagonal.shape[0]), factor=on.f32(factor, size=1),
        n=dz.shape[0], others=other.shape[0], diagonals=diagonal.shape[0], to_other=step,
        to_diagonal=shift,
    )  # fmt: skip
    _cuda.add_positives(_layout(layout), arguments, _stream(dz))
