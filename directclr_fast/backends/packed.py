"""The five stages over unit rows packed for tensor cores (kernels/layout.py), whoever wrote the
kernels.

:class:`Packed` owns the tensors and the order of launches. A call of one pair (one column group,
negatives "cross") takes 4 launches forward and, where the weights fit in one super-block, 5
backward; the other options go through the driver over the same kernels. A subclass
says which tiles its kernels take and hands in the kernels: an object with ``normalize``,
``positives``, ``lines``, ``sums``, ``fold``, ``combine``, ``combine_blocks``, ``total``,
``factors``, ``weights``, ``product``, ``finish`` and ``add_positives``, as the modules of
``kernels/`` define them: a launch each, into what is given.
"""

from __future__ import annotations

import contextlib
import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.layout import STORE, Factors, Layout, Side, layout_of
from ..problem import Problem
from ..products import may_round
from .base import Backend, Saved, Statistics, Tops, Weights

LN2 = math.log(2.0)

# Limit of the partial sums of one launch; the anchors beyond it are further strips.
PARTIAL_BYTES = 64 * 2**20


class Partials(NamedTuple):
    """Partial sums of one launch and the maxima they are relative to, or that statistics ask for;
    fp32. By row (lines, at least the strip's rows), by column (lines, candidates); None where there
    are none."""

    row_sum: Tensor
    row_peak: Tensor | None
    col_sum: Tensor | None
    col_peak: Tensor | None


class Combined(NamedTuple):
    """What ``combine`` fills: losses (M,) fp32 or, to be summed, (blocks,) fp64; the rest in fp64
    as in ``base.Saved``."""

    losses: Tensor
    row_lse: Tensor
    col_lse: Tensor
    nll_row: Tensor
    nll_col: Tensor


def capability(problem: Problem) -> tuple[int, int]:
    """Compute capability of the device that the call's tensors are on."""
    index = problem.device_index
    return _capability(torch.cuda.current_device() if index is None else index)


_capability = cache(torch.cuda.get_device_capability)


class Packed(Backend):
    """Abstract: ``kernels``, ``_tile`` and ``_programs`` are a subclass's."""

    kernels: object
    default_workspace = 128 * 2**20  # one super-block of weights: 8192 x 8192 in half precision

    def precision(self, problem: Problem) -> str:
        """That of the products: "auto" rounds operands where eager PyTorch would, and to fp16.

        fp32 rows outside autocast, with torch's fp32 products left exact, stay fp32-grade
        ("highest").
        """
        if problem.precision != "auto":
            return problem.precision
        exact = problem.dtype == torch.float32 and not problem.autocast
        return "highest" if exact and not may_round(problem.device_type) else "fp16"

    def _layout(self, problem: Problem, z: Tensor | None = None):
        """That of packed rows to be made, or of ``z``: the process's setting may have changed."""
        chosen = self.precision(problem)
        if z is not None and problem.precision == "auto":
            chosen = "highest" if z.dtype == torch.float32 else "fp16"
        return layout_of(chosen, problem.dim)

    def _tile(self, kernel: str, layout, device: torch.device, crowded: bool = False):
        """Tile of "sums", "tops", "ids", "weights" or "products", of ``kernels.configs``."""
        raise NotImplementedError

    def _programs(self, device: torch.device) -> int:
        """Programs that fill the device a few times over."""
        raise NotImplementedError

    def _whole_rows(self, tile) -> int:
        """What a launch takes as a unit: strips and super-blocks are multiples of it."""
        return tile.rows

    def _superblock(self, problem: Problem, layout, tile) -> tuple[int, int]:
        """(rows, columns) of a super-block that fits the workspace, in whole tiles."""
        elements = self.workspace(problem) // layout.dtype.itemsize
        both = problem.negatives == "both"
        rows_there = problem.candidates if both else problem.rows

        def whole(size: int, step: int) -> int:
            return max(step, size // step * step)

        def extent(size: int, step: int) -> int:
            return -(-size // step) * step

        side = math.isqrt(elements)
        columns = min(extent(problem.candidates, tile.columns), whole(side, tile.columns))
        fit = whole(elements // columns, self._whole_rows(tile))
        rows = min(extent(rows_there, tile.rows), fit)
        if rows * columns < elements:
            fit = whole(elements // rows, tile.columns)
            columns = min(extent(problem.candidates, tile.columns), fit)
        return rows, columns

    # ---------------------------------------------------------------- the fused route

    def fuses(self, problem: Problem) -> bool:
        """Whether ``forward`` and ``backward`` below replace the driver for this call."""
        return problem.negatives == "cross" and problem.groups == 1

    def forward(self, problem, r1, r2, columns, scale):
        """normalize, sums, combine, total: 4 launches while the partial sums fit one strip."""
        layout, offset = self._layout(problem), problem.row_offset
        bounded, exact = self._bounded_sums(problem, scale), layout.precision == "highest"
        kernel = "tops" if problem.return_stats else "sums"
        tile = self._tile(kernel, layout, r1.device, not bounded)
        index = None if columns is None else columns[0]
        with _on_device_of(r1):
            views, cosines = [_unit_rows(layout, r) for r in (r1, r2)], _cosines(r1)
            self.kernels.normalize(layout, views, cosines, index, offset, problem.eps)
            (_, z1, rnorm1), (_, z2, rnorm2) = views
            tops = Tops.none_yet(problem, z1, z2.shape[0]) if problem.return_stats else None
            own = self._own(layout, z1, tops)
            options = {"columns": problem.symmetric, "bounded": bounded, "tops": tops, "own": own}
            strips = self._strips(z1, z2, tile, problem.symmetric, tops is not None or not bounded)
            parts, rest = None, (None, None)
            if len(strips) == 1:
                parts, _ = self._partials(layout, z1, z2, strips[0], scale, offset, tile, **options)
            else:
                rest = self._fold_strips(layout, z1, z2, scale, offset, tile, strips, **options)
            loss, row_lse, col_lse, nll_row, nll_col = self._combine(
                problem, own if exact else cosines, scale, parts, rest, bounded
            )
            statistics = None
            if tops is not None:
                there = slice(offset, offset + problem.rows)
                top1 = tops._replace(col=None if tops.col is None else tops.col[there]).top1(
                    nll_row, nll_col
                )
                logits = own.double() * LN2 if exact else cosines * scale
                of_group = (row_lse, col_lse, logits, top1)
                statistics = Statistics(*(value[None] for value in of_group))
        kept = self.kept_buffer(problem, z1)
        saved = Saved(z1, z2, rnorm1, rnorm2, row_lse, col_lse, nll_row, nll_col, kept)
        return loss, [saved], statistics

    def backward(self, problem, dloss, states, columns, scale, need):
        """factors, weights, two products, finish: 5 launches for one super-block."""
        need1, need2, need_temperature = need
        (state,) = states
        layout = self._layout(problem, state.z1)
        index = None if columns is None else columns[0]
        wanted = (need1 or (need_temperature and not need2), need2)
        per_row = problem.reduction == "none"
        with _on_device_of(dloss):
            dloss = dloss.contiguous()
            divisor = dloss.abs().amax() if per_row else None
            upstream = dloss if divisor is None else divisor
            if layout.precision == "highest":
                divisor = _largest_mass(state, dloss if per_row else None)
                upstream = divisor if per_row else dloss * divisor
            bounded = problem.bounded(scale)
            factors = self.kernels.factors(layout, problem, state, dloss, divisor, bounded)
            dz1, dz2 = self._tile_products(
                problem, layout, state.z1, state.z2, scale, factors, problem.row_offset, wanted
            )
            drs = [
                self.gradient_buffer(problem, rows, dloss.device) if needed else None
                for rows, needed in ((problem.rows, need1), (problem.candidates, need2))
            ]
            views = []
            for number, z, rnorm, dz, dr in (
                (1, state.z1, state.rnorm1, dz1, drs[0]),
                (2, state.z2, state.rnorm2, dz2, drs[1]),
            ):
                if dz is not None:
                    views.append((Side(z, rnorm, dz, dr, need_temperature), number))
            if views:
                factor = 1.0 / (STORE * layout.unit * (2.0 if problem.symmetric else 1.0))
                if problem.reduction == "mean":
                    factor /= problem.rows
                other = state.z2 if views[0][1] == 1 else state.z1
                self.kernels.finish(
                    layout, views, other, factors.diagonal, problem.row_offset, upstream=upstream,
                    scale=scale, factor=factor, index=index, width=problem.width, eps=problem.eps,
                    add=False,
                )  # fmt: skip
            dtemperature = None
            if need_temperature:
                dtemperature = -views[0][0].dots.sum(dtype=torch.float64) * scale
        return drs[0], drs[1], dtemperature

    def _tile_products(self, problem, layout, z1, z2, scale, factors, offset, wanted):
        """(dz1, dz2) of P as accumulated, (., pitch) fp32; None where not wanted."""
        dz1, dz2 = (
            torch.empty((z.shape[0], layout.pitch), dtype=torch.float32, device=z.device)
            if w
            else None
            for z, w in zip((z1, z2), wanted)
        )
        if not any(wanted):
            return dz1, dz2
        tile = self._tile("weights", layout, z1.device, factors.crowded)
        inner = self._tile("products", layout, z1.device)
        height, width = self._superblock(problem, layout, tile)
        out = torch.empty(height * width, dtype=layout.dtype, device=z1.device)
        for rows in _slices(z1.shape[0], height):
            for columns in _slices(z2.shape[0], width):
                p = self.kernels.weights(
                    layout, z1, z2, factors, scale, offset, rows, columns, out, tile
                )
                for dz, z, own, along in ((dz1, z2, rows, columns), (dz2, z1, columns, rows)):
                    if dz is not None:
                        how = {"transposed": dz is dz2, "add": along.start > 0, "tile": inner}
                        self.kernels.product(layout, p, z, dz, own, along, **how)
        return dz1, dz2

    # ---------------------------------------------------------------- the plan of the sums

    def _strips(self, z1: Tensor, z2: Tensor, tile, columns: bool, peaks: bool) -> list[slice]:
        """The anchors in strips whose partials are within PARTIAL_BYTES, or that cannot be less."""
        m, n = z1.shape[0], z2.shape[0]
        programs = self._programs(z1.device)
        row_lines, length, col_lines, _ = self.kernels.lines(tile, slice(0, m), n, programs, False)
        elements = row_lines * length + (col_lines * n if columns else 0)
        held = 4 * elements * (2 if peaks else 1)
        rows = m
        if held > PARTIAL_BYTES:
            step = self._whole_rows(tile)
            rows = max(1, m * PARTIAL_BYTES // held // step) * step
        return _slices(m, rows)

    def _own(self, layout, z1: Tensor, tops: Tops | None) -> Tensor | None:
        """(M,) for the positives' logits as the tiles have them, in base 2: where products are of
        fp32 grade they are the loss's, otherwise top-1's alone; None where nobody asks."""
        if tops is not None:
            return tops.own
        if layout.precision == "highest":
            return z1.new_empty(z1.shape[0], dtype=torch.float32)
        return None

    def _partials(
        self, layout, z1, z2, strip, scale, offset, tile, *,
        columns, bounded, tops, own=None, upper=False, ids=None,
    ) -> tuple[Partials, int]:  # fmt: skip
        """One launch over a strip, and the first column that its column sums are of. ``tops`` is
        raised to the largest logits met, in base 2."""
        n, programs = z2.shape[0], self._programs(z1.device)
        row_lines, length, col_lines, first = self.kernels.lines(tile, strip, n, programs, upper)

        def buffer(there: bool, *shape: int) -> Tensor | None:
            return z1.new_empty(shape, dtype=torch.float32) if there else None

        peaks = tops is not None or not bounded
        by_row, by_col = (row_lines, length), (col_lines, n - first)
        parts = Partials(
            buffer(True, *by_row), buffer(peaks, *by_row),
            buffer(columns, *by_col), buffer(columns and peaks, *by_col),
        )  # fmt: skip
        self.kernels.sums(
            layout, z1, z2, strip, scale, offset, tile, programs, parts, own,
            bounded=bounded, upper=upper, tops=tops is not None, ids=ids,
        )  # fmt: skip
        if tops is not None:
            row = tops.row[strip]
            torch.maximum(row, parts.row_peak.amax(0)[: row.shape[0]], out=row)
            if tops.col is not None:
                col = tops.col[first:]
                torch.maximum(col, parts.col_peak.amax(0), out=col)
        return parts, first

    def _fold_strips(
        self, layout, z1, z2, scale, offset, tile, strips, *, columns, bounded, **how
    ) -> tuple[Tensor, Tensor | None]:
        """(rest_row (M,), rest_col (N,) or None) in fp64, strip after strip."""
        how |= {"columns": columns, "bounded": bounded}
        row = z1.new_empty(z1.shape[0], dtype=torch.float64)
        col = z1.new_empty(z2.shape[0], dtype=torch.float64) if columns else None
        for strip in strips:
            parts, first = self._partials(layout, z1, z2, strip, scale, offset, tile, **how)
            self.kernels.fold(parts.row_sum, parts.row_peak, row[strip], True, bounded)
            if columns:
                start = strip.start == 0
                self.kernels.fold(parts.col_sum, parts.col_peak, col[first:], start, bounded)
        return row, col

    def _combine(self, problem: Problem, positives: Tensor, scale, parts, rest, bounded: bool):
        """Loss, row_lse, col_lse, nll_row, nll_col: one launch, or two where losses are summed.
        ``positives`` (M,): cosines, fp64, or logits in base 2, fp32."""
        m, n, symmetric = problem.rows, problem.candidates, problem.symmetric
        per_row = problem.reduction == "none"

        def statistic(length: int) -> Tensor:
            return positives.new_empty(length, dtype=torch.float64)

        losses = statistic(0 if per_row else self.kernels.combine_blocks(n))
        if per_row:
            losses = positives.new_empty(m, dtype=torch.float32)
        columns, own = (n, m) if symmetric else (0, 0)
        out = Combined(losses, statistic(m), statistic(columns), statistic(m), statistic(own))
        self.kernels.combine(problem, positives, scale, parts, rest, out, bounded=bounded)
        if per_row:
            return out
        loss = positives.new_empty((), dtype=torch.float32)
        self.kernels.total(losses, loss, float(m) if problem.reduction == "mean" else 1.0)
        return out._replace(losses=loss)

    # ---------------------------------------------------------------- stage by stage

    def packed(self, problem: Problem, z: Tensor | None = None) -> tuple[int, torch.dtype]:
        layout = self._layout(problem, z)
        return layout.row, layout.dtype

    def unit_rows(self, problem: Problem, z: Tensor) -> Tensor:
        return self._layout(problem, z).unit_rows(z)

    def normalize(self, problem, r, index):
        with _on_device_of(r):
            view = _unit_rows(layout := self._layout(problem), r)
            self.kernels.normalize(layout, [view], None, index, 0, problem.eps)
        return view[1:]

    def sums(self, problem, z1, z2, scale, kept, logits=None, tops=None, ids=None):
        layout, offset, met = self._layout(problem, z1), problem.row_offset, logits is not None
        met = met and offset < problem.candidates
        exact = met and layout.precision == "highest"
        own = self._own(layout, z1, tops) if exact or tops is not None else None
        if met and not exact:
            with _on_device_of(z1):
                self.kernels.positives(layout, z1, z2, offset, cosines := _cosines(z1))
                torch.mul(cosines, scale, out=logits)
        sums = self._log_sums(problem, z1, z2, scale, offset, problem.symmetric, tops, own, ids)
        if exact:
            torch.mul(own.double(), LN2, out=logits)
        return sums

    def self_sums(self, problem, z, scale, top=None, ids=None):
        tops = None if top is None else Tops(top, top, None)
        row, column = self._log_sums(problem, z, z, scale, 0, True, tops, None, ids, upper=True)
        return torch.logaddexp(row, column)

    def _bounded_sums(self, problem: Problem, scale) -> bool:
        """Which form of the sums is taken: kernels may have maxima in one of them only."""
        return problem.bounded(scale)

    def _log_sums(self, problem, z1, z2, scale, offset, columns, tops, own, ids, upper=False):
        # With ids the form with maxima: the other one spills with them on sm_80.
        layout, bounded = self._layout(problem, z1), self._bounded_sums(problem, scale)
        bounded = bounded and ids is None
        kernel = "tops" if problem.return_stats else "sums" if ids is None else "ids"
        tile = self._tile(kernel, layout, z1.device, upper or not bounded)
        how = {"columns": columns, "bounded": bounded, "tops": tops, "own": own}
        how |= {"upper": upper, "ids": ids}
        with _on_device_of(z1):
            strips = self._strips(z1, z2, tile, columns, tops is not None or not bounded)
            return self._fold_strips(layout, z1, z2, scale, offset, tile, strips, **how)

    def products(self, problem, z1, z2, scale, pair, kept, need, ids=None):
        layout, offset = self._layout(problem, z1), problem.row_offset
        factors, unit = _factors(pair, problem.bounded(scale), layout.unit, ids)
        with _on_device_of(z1):
            dz1, dz2 = self._tile_products(problem, layout, z1, z2, scale, factors, offset, need)
            if dz1 is not None:
                self.kernels.add_positives(layout, dz1, z2, factors.diagonal, unit, offset, 0)
            if dz2 is not None:
                back = -offset, -offset
                self.kernels.add_positives(layout, dz2, z1, factors.diagonal, unit, *back)
        return dz1, dz2

    def add_self_products(self, problem, z, scale, w, lse, dz, ids=None):
        layout = self._layout(problem, z)
        pair = Weights(w, lse, w, lse, w)
        factors, unit = _factors(pair, problem.bounded(scale), layout.unit, ids)
        tile = self._tile("weights", layout, z.device, factors.crowded)
        inner = self._tile("products", layout, z.device)
        side = min(self._superblock(problem, layout, tile))
        step = max(tile.rows, tile.columns)
        side = max(step, side // step * step)
        with _on_device_of(z):
            out = torch.empty(side * side, dtype=layout.dtype, device=z.device)
            dz.div_(unit)  # a power of two, so nothing is rounded on the way there and back
            for rows in _slices(z.shape[0], side):
                for columns in _slices(z.shape[0], side):
                    if columns.start < rows.start:
                        continue
                    p = self.kernels.weights(
                        layout, z, z, factors, scale, 0, rows, columns, out, tile, rows == columns
                    )
                    self.kernels.product(
                        layout, p, z, dz, rows, columns, transposed=False, add=True, tile=inner
                    )
                    if columns.start > rows.start:
                        self.kernels.product(
                            layout, p, z, dz, columns, rows, transposed=True, add=True, tile=inner
                        )
            dz.mul_(unit)

    def gradient_buffer(self, problem: Problem, rows: int, device: torch.device) -> Tensor:
        # `finish` writes every column of a slice itself; gathered groups are added where they go.
        make = torch.zeros if problem.gathered else torch.empty
        return make((rows, problem.width), dtype=problem.dtype, device=device)

    def finish(self, problem, z, rnorm, dz, dr, index):
        side = Side(z, rnorm, dz, dr, dots=True)
        with _on_device_of(z):
            self.kernels.finish(
                self._layout(problem, z), [(side, 1)], z, None, 0, upstream=None, scale=1.0,
                factor=1.0, index=index, width=problem.width, eps=problem.eps,
                add=problem.groups > 1,
            )  # fmt: skip
        return side.dots.sum(dtype=problem.statistics_dtype)


def _on_device_of(tensor: Tensor):
    """A context in which launches, and torch's own, go to the device of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _unit_rows(layout: Layout, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A view as `normalize` takes it: r, and to be filled z (rows, layout.row) and the reciprocal
    norms (rows,)."""
    z = torch.empty((r.shape[0], layout.row), dtype=layout.dtype, device=r.device)
    return r, z, torch.empty(r.shape[0], dtype=torch.float32, device=r.device)


def _cosines(like: Tensor) -> Tensor:
    return torch.empty(like.shape[0], dtype=torch.float64, device=like.device)


def _largest_mass(state: Saved, upstream: Tensor | None) -> Tensor:
    """The largest |w_i| (1 - p_i) of either direction, 0-dim fp32: no weight off the positives is
    more than twice that. Not below 1e-19 of the largest |w_i|, so that its reciprocal is finite."""
    mass = state.nll_row
    if state.nll_col.numel():
        mass = torch.maximum(mass, state.nll_col)
    mass = torch.expm1(-mass).neg_().clamp_(min=1e-19)
    return (mass if upstream is None else mass * upstream.abs()).amax().float()


def _factors(pair: Weights, bounded: bool, of_rows: float, ids=None):
    """(the kernels' factors of a pair's weights, the factor the product still lacks, 0-dim), with
    rows that are ``of_rows`` z."""
    both = pair.v is not None
    top = pair.w.abs().amax()
    if both:
        top = torch.maximum(top, pair.v.abs().amax())
    # A number over its mantissa is a power of two to the bit (torch.ldexp takes pow's word for it):
    # dividing by that rounds nothing. 1 where every weight is zero.
    unit = torch.where(top == 0.0, 1.0, top / torch.frexp(top).mantissa)
    unit = torch.where(top.isfinite(), unit, top)

    def shifted(weight: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight / unit * STORE
        if not bounded:
            exact = lse / LN2
            shift = exact.float()  # its rounding is in the weight
            weight = torch.where(weight == 0.0, 0.0, weight * torch.exp2(shift - exact))
            return weight.float(), shift
        # Candidates nobody is the positive of have no weight, whatever their log-sum.
        factor = torch.where(weight == 0.0, 0.0, weight * torch.exp(-lse)).float()
        return factor, factor

    rows = shifted(pair.w, pair.row_lse)
    columns = shifted(pair.v, pair.col_lse) if both else rows
    factors = Factors(*rows, *columns, pair.diagonal.float(), both, bounded, ids)
    return factors, (unit / (STORE * of_rows)).float()


def _slices(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]
