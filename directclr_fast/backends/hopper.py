"""The kernels of csrc/cuda as ``packed.Packed`` wants them: tensors in, launches out.

Every function queues its work on the current stream of its tensors' device and waits for nothing.
Its namesake in ``kernels/`` says what the arguments are.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..address import addresses, start
from ..kernels.configs import Tile
from ..kernels.layout import STORE, Factors, Layout, Side
from ..kernels.library import product as product

try:
    from .. import _cuda

    missing = None
except ImportError as error:
    _cuda = None
    missing = str(error).partition(" (/")[0]

PINGPONG_PITCH = 256  # by design, not yet by measurement: short products leave exponentials bare

F32, F64 = torch.float32, torch.float64
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


def _stream(tensor: Tensor):
    where = tensor.device
    handle = torch.cuda.current_stream(where).cuda_stream
    return _cuda.Stream(handle=handle, device=where.index, multiprocessors=multiprocessors(where))


def _scale(scale) -> tuple[Tensor | None, float]:
    """1/temperature as a tensor or a number, of which one counts."""
    return (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)


def _exponent(layout: Layout, scale, like: Tensor):
    held, value = _scale(scale)
    at = addresses(like.device, scale=(held, F32, 1))
    return _cuda.Exponent(**at, value=value, operands=layout.cosine)


def _operands(layout: Layout, a: Tensor, b: Tensor):
    # What layout.operand(z) is: the first halves of a row, or the bytes behind both.
    fp8, (m, n), dtype = layout.precision == "fp8", (a.shape[0], b.shape[0]), layout.dtype
    at = addresses(a.device, a=(a, dtype, m * layout.row), b=(b, dtype, n * layout.row))
    behind = 4 * layout.pitch if fp8 else 0
    return _cuda.Operands(
        type=_OPERANDS[layout.precision], pingpong=pingpong(layout), a=at["a"] + behind,
        b=at["b"] + behind, rows=m, cols=n, k=layout.pitch, pitch=layout.stride * (2 if fp8 else 1),
    )  # fmt: skip


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


def normalize(
    layout: Layout, views: list[tuple[Tensor, Tensor, Tensor]], positives: Tensor | None,
    index: Tensor | None, offset: int, eps: float,
) -> None:  # fmt: skip
    """One launch for one or two ``views``."""
    (r1, z1, rnorm1), (r2, z2, rnorm2) = views[0], views[-1]
    m, n = r1.shape[0], r2.shape[0]
    arguments = _cuda.NormalizeArguments(
        r1=_input(r1), r2=_input(r2), offset=offset, eps=eps, both=len(views) > 1,
        **addresses(
            r1.device, index=(index, torch.int64, layout.dim), positives=(positives, F64, m),
            z1=(z1, layout.dtype, m * layout.row), z2=(z2, layout.dtype, n * layout.row),
            rnorm1=(rnorm1, F32, m), rnorm2=(rnorm2, F32, n),
        ),
    )  # fmt: skip
    _cuda.normalize(_layout(layout), arguments, _stream(r1))


def positives(layout: Layout, z1: Tensor, z2: Tensor, offset: int, cosines: Tensor) -> None:
    """One launch."""
    m, n, dtype = z1.shape[0], z2.shape[0], layout.dtype
    at = addresses(
        z1.device, z1=(z1, dtype, m * layout.row), z2=(z2, dtype, n * layout.row),
        positives=(cosines, F64, m),
    )  # fmt: skip
    arguments = _cuda.PositivesArguments(**at, n=m, offset=offset)
    _cuda.positives(_layout(layout), arguments, _stream(z1))


# ------------------------------------------------------------------------------- sums


def lines(tile: Tile, strip: slice, columns: int, programs: int, upper: bool):
    """(lines by row, their length, lines by column, first column) of one launch's partials: a line
    of rows for each tile of columns, and the reverse; for ``upper`` from the strip's first row on.
    """
    first, rows = strip.start if upper else 0, strip.stop - strip.start
    return -(-(columns - first) // tile.columns), rows, -(-rows // tile.rows), first


def _buffers(parts) -> dict[str, tuple]:
    """``packed.Partials``, or None, as ``addresses`` takes them."""
    parts = (None,) * len(_PARTIALS) if parts is None else parts
    return {n: (x, F32, 0 if x is None else x.numel()) for n, x in zip(_PARTIALS, parts)}


def sums(
    layout: Layout, z1: Tensor, z2: Tensor, strip: slice, scale, offset: int, tile: Tile,
    programs: int, parts, own: Tensor | None, *, bounded: bool, upper: bool, tops: bool, ids: None,
) -> None:  # fmt: skip
    """One launch: ``parts`` of the anchors in ``strip`` (z1) against all candidates (z2), or, for
    ``upper``, against those from the strip's first row on. ``tops`` without ``bounded`` only;
    ``own`` (M,) gets the positives' logits, in base 2, there and for "highest". No ``ids`` here."""
    own = None if own is None else own[strip]
    if upper:  # tiles below the diagonal are left out
        for name, buffer in parts._asdict().items():
            if buffer is not None:
                buffer.fill_(-torch.inf if name.endswith("peak") else 0.0)
    arguments = _cuda.SumsArguments(
        **addresses(z1.device, **_buffers(parts), own=(own, F32, strip.stop - strip.start)),
        exponent=_exponent(layout, scale, z1), step=0 if upper else strip.start + offset,
        upper=upper, columns=parts.col_sum is not None, bounded=bounded,
    )  # fmt: skip
    z2 = z2[strip.start :] if upper else z2
    _cuda.sums(_operands(layout, z1[strip], z2), arguments, _stream(z1))


def fold(sums: Tensor, peaks: Tensor | None, into: Tensor, first: bool, bounded: bool) -> None:
    """``into`` (n,) fp64 log-sums: set (``first``) or increased by the lines of ``sums``."""
    (lines, n), size = sums.shape, sums.numel()
    at = addresses(
        sums.device, sums=(sums, F32, size), peaks=(peaks, F32, size), into=(into, F64, n)
    )
    arguments = _cuda.FoldArguments(**at, n=n, lines=lines, stride=n, first=first)
    _cuda.fold(arguments, _stream(sums))


def combine_blocks(n: int) -> int:
    """Losses that ``combine`` writes where they are to be summed."""
    return _cuda.combine_blocks(n)


def combine(problem, positives: Tensor, scale, parts, rest, out, *, bounded: bool) -> None:
    """One launch: ``out`` from ``parts`` or from ``rest``."""
    m, n, blocks = problem.rows, problem.candidates, out.losses.shape[0]
    columns, own = (n, m) if problem.symmetric else (0, 0)
    row_lines = col_lines = 0
    if parts is not None:
        row_lines = parts.row_sum.shape[0]
        col_lines = 0 if parts.col_sum is None else parts.col_sum.shape[0]
    by_row, by_block = (out.losses, None) if problem.reduction == "none" else (None, out.losses)
    cosines, logits = (positives, None) if positives.dtype == F64 else (None, positives)
    held, value = _scale(scale)
    arguments = _cuda.CombineArguments(
        **addresses(
            positives.device, **_buffers(parts), rest_row=(rest[0], F64, m),
            rest_col=(rest[1], F64, n), positives=(cosines, F64, m), own=(logits, F32, m),
            scale=(held, F32, 1), row_lse=(out.row_lse, F64, m), nll_row=(out.nll_row, F64, m),
            col_lse=(out.col_lse, F64, columns), nll_col=(out.nll_col, F64, own),
            loss_by_row=(by_row, F32, m), loss_by_block=(by_block, F64, blocks),
        ),
        row_lines=row_lines, col_lines=col_lines, scale_value=value, m=m, n=n,
        offset=problem.row_offset, symmetric=problem.symmetric,
    )  # fmt: skip
    _cuda.combine(arguments, _stream(positives))


def total(losses: Tensor, loss: Tensor, factor: float) -> None:
    """One launch: ``loss`` (0-dim) = sum of ``losses`` / factor, in a fixed order."""
    n = losses.shape[0]
    at = addresses(losses.device, parts=(losses, F64, n), loss=(loss, F32, 1))
    _cuda.total(_cuda.TotalArguments(**at, n=n, factor=factor), _stream(losses))


# ------------------------------------------------------------------------------- weights, products


def factors(
    layout: Layout, problem, saved, upstream: Tensor, divisor: Tensor | None, bounded: bool
) -> Factors:
    """One launch."""
    m, n = problem.rows, problem.candidates
    record = Factors.empty(m, n, problem.symmetric, bounded, upstream.device)
    columns, own = (n, m) if problem.symmetric else (0, 0)
    col = n if problem.symmetric else m  # where there is none, the row's stands for it
    arguments = _cuda.FactorsArguments(
        **addresses(
            upstream.device, upstream=(upstream if problem.reduction == "none" else None, F32, m),
            largest=(divisor, F32, 1), row_lse=(saved.row_lse, F64, m),
            col_lse=(saved.col_lse, F64, columns), nll_row=(saved.nll_row, F64, m),
            nll_col=(saved.nll_col, F64, own), row=(record.row, F32, m), col=(record.col, F32, col),
            row_shift=(record.row_shift, F32, m),
            col_shift=(record.col_shift, F32, m if bounded else col),
            diagonal=(record.diagonal, F32, m),
        ),
        m=m, n=n, offset=problem.row_offset, store=STORE, symmetric=problem.symmetric,
        bounded=bounded,
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
    at = addresses(
        z1.device, row=(factors.row[rows], F32, height), col=(col, F32, col.shape[0]),
        row_shift=(factors.row_shift[rows], F32, height),
        col_shift=(col_shift, F32, (col_shift if factors.bounded else col).shape[0]),
        out=(block, layout.element, height * pitch),
    )  # fmt: skip
    arguments = _cuda.WeightsArguments(
        out=at.pop("out"), pitch=pitch,
        factors=_cuda.WeightFactors(**at, symmetric=factors.symmetric),
        exponent=_exponent(layout, scale, z1), step=rows.start + offset - columns.start,
        bounded=factors.bounded, mirror=mirror,
    )  # fmt: skip
    _cuda.weights(_operands(layout, z1[rows], z2[columns]), arguments, _stream(z1))
    return block


# ------------------------------------------------------------------------------- finish


def finish(
    layout: Layout, views: list[tuple[Side, int]], other: Tensor, diagonal: Tensor | None,
    offset: int, *, upstream: Tensor | None, scale, factor: float, index: Tensor | None, width: int,
    eps: float, add: bool,
) -> None:  # fmt: skip
    """One launch for one or two ``views``."""
    sides, device, dtype, row = [], views[0][0].z.device, layout.dtype, layout.row
    for (view, number), partner in zip(views, (other, views[0][0].z), strict=False):
        to_other, to_diagonal = (offset, 0) if number == 1 else (-offset, -offset)
        row_stride, col_stride = (0, 0) if view.dr is None else view.dr.stride()
        n, dr = view.z.shape[0], view.dr
        side = _cuda.FinishSide(
            **addresses(
                device, z=(view.z, dtype, n * row), other=(partner, dtype, partner.shape[0] * row),
                rnorm=(view.rnorm, F32, n), acc=(view.acc, F32, n * layout.pitch),
                dots=(view.dots, F32, n),
            ),
            dr=0 if dr is None else start("dr", dr, device), dr_row_stride=row_stride,
            dr_col_stride=col_stride, rows=n, to_other=to_other, to_diagonal=to_diagonal,
        )  # fmt: skip
        sides.append(side)
    outputs = [view.dr for view, _ in views if view.dr is not None]
    diagonals = 0 if diagonal is None else diagonal.shape[0]
    held, value = _scale(scale)
    arguments = _cuda.FinishArguments(
        **addresses(
            device, index=(index, torch.int64, layout.dim), diagonal=(diagonal, F32, diagonals),
            upstream=(upstream, F32, 1), scale=(held, F32, 1),
        ),
        dtype=_DTYPES[outputs[0].dtype if outputs else F32], diagonals=diagonals, d=layout.dim,
        width=width, largest_rnorm=1.0 / eps, add=add, factor=factor, scale_value=value,
    )  # fmt: skip
    first, second = sides if len(sides) > 1 else (sides[0], None)
    _cuda.finish(_layout(layout), first, second, arguments, _stream(views[0][0].z))


def add_positives(
    layout: Layout, dz: Tensor, other: Tensor, diagonal: Tensor, factor: Tensor, step: int, shift
) -> None:
    """One launch."""
    n, others, diagonals = dz.shape[0], other.shape[0], diagonal.shape[0]
    arguments = _cuda.AddPositivesArguments(
        **addresses(
            dz.device, dz=(dz, F32, n * layout.pitch), factor=(factor, F32, 1),
            other=(other, layout.dtype, others * layout.row), diagonal=(diagonal, F32, diagonals),
        ),
        n=n, others=others, diagonals=diagonals, to_other=step, to_diagonal=shift,
    )  # fmt: skip
    _cuda.add_positives(_layout(layout), arguments, _stream(dz))
