"""The five stages in C++ (csrc/cpu): packed micro-kernels with the exponential in their epilogue.

The adapter owns the tensors and passes addresses; csrc knows nothing of torch. Memory beyond z, dz
and the gradients is a scratch of a few MiB a thread, plus the tiles of S the workspace keeps.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from ..address import CPU, addresses, start
from ..problem import Problem
from ..products import rounding
from .base import Backend, Saved, Tops, Weights

try:
    from .. import _cpu

    _missing = None
except ImportError as error:
    _cpu = None
    _missing = str(error).partition(" (/")[0]

_asked = os.environ.get("DIRECTCLR_FAST_ISA")
if _cpu is not None and _asked and _asked not in _cpu.available_isas():
    raise ValueError(
        f"DIRECTCLR_FAST_ISA: expected one of {', '.join(_cpu.available_isas())}, got {_asked!r}"
    )

# The octaves of exp(a s) are counted in fp32, and -2^24 of them stands for "left out"
# (csrc/cpu/exp2.h).
MAX_SCALE = 2.0**21

_LN2 = math.log(2.0)
_F32, _F64 = torch.float32, torch.float64
_CODES = {} if _cpu is None else {
    torch.float32: _cpu.FLOAT32, torch.float16: _cpu.FLOAT16, torch.bfloat16: _cpu.BFLOAT16,
}  # fmt: skip
OPERANDS = {} if _cpu is None else {
    "highest": _cpu.FP32, "bf16": _cpu.BF16, "tf32": _cpu.INT8X3,
}  # fmt: skip


def _strided(r: Tensor, dim: int, index: Tensor | None) -> tuple[int, int, int, int, int]:
    """``dim`` columns of a matrix, the first or those ``index`` names, as the kernels take it."""
    at, width = start("r", r), r.shape[1]
    columns = 0 if index is None else addresses(index=(index, torch.int64, dim))["index"]
    if r.dtype not in _CODES:
        raise ValueError(f"r: expected float16, bfloat16 or float32, got {r.dtype}")
    if index is None and dim > width:
        raise ValueError(f"r: expected at least {dim} columns, got {width}")
    # Read once more by those who write there: a caller may have changed them since the check.
    if index is not None and not _cpu.within(columns, dim, width):
        raise ValueError(f"columns: expected indices from 0 to {width - 1}")
    return at, _CODES[r.dtype], r.stride(0), r.stride(1), columns


class Cpu(Backend):
    name = "cpu"
    # Keeping S saves one of three tile products in the backward pass: 16 MiB hold all of it up to
    # N = 2048, where that is 20 % of the step; at N = 4096 16 and 48 MiB measured within 5 %.
    default_workspace = 16 * 2**20

    def why_not(self, problem: Problem) -> list[str]:
        if _cpu is None:
            return [
                f"the compiled extension is not installed ({_missing}); a C++17 compiler builds it"
            ]
        reasons = problem.reference_only()
        if problem.device_type != "cpu":
            reasons.append(f"it reads CPU tensors, got {problem.device_type}")
        if problem.dtype == torch.float64:
            reasons.append("it computes in fp32, got float64")
        asked = problem.precision
        if (asked == "bf16" and not _cpu.has_bf16()) or (asked == "tf32" and not _cpu.has_tiles()):
            reasons.append(
                f"precision {asked!r}: here it computes with {_cpu.isa()}, which has no such "
                "products faster than fp32"
            )
        elif asked not in ("auto", *OPERANDS):
            reasons.append(f"precision {asked!r}: it computes in fp32, bf16 or, on AMX, tf32")
        if problem.temperature is not None and 1.0 / problem.temperature > MAX_SCALE:
            reasons.append(f"it takes a temperature from 2^-21 on, got {problem.temperature}")
        return reasons

    def precision(self, problem: Problem) -> str:
        """ "auto" rounds operands where eager PyTorch would, to as many bits or more, and only
        where the matrix unit makes that faster."""
        if problem.precision != "auto" or _cpu is None or not _cpu.has_tiles():
            return super().precision(problem)
        if problem.dtype == torch.bfloat16 or problem.autocast:
            return "bf16"
        return "tf32" if problem.dtype == torch.float16 else rounding("cpu") or "highest"

    def details(self) -> dict[str, str]:
        if _cpu is None:
            return {}
        return {
            "instruction set": _cpu.isa(),
            "this processor can run": ", ".join(_cpu.available_isas()),
            "matrix unit": _cpu.matrix_unit(),
            "last products": _cpu.arithmetic(),
        }

    def packed(self, problem: Problem, z: Tensor | None = None) -> tuple[int, torch.dtype]:
        return _cpu.pitch(problem.dim), torch.float32

    def kept_shape(self, problem: Problem) -> tuple[int, ...]:
        # As many whole row panels of S as fit; a panel is padded by less than 64 either way. The
        # shape is the same for every instruction set, since compiled graphs are cached with it.
        workspace = self.workspace(problem)
        if not problem.differentiable or not workspace:
            return (0,)
        whole = (problem.rows + 63) * (problem.candidates + 63)
        least = min if type(whole) is int else torch.sym_min  # which a traced size needs
        return (least(whole, workspace // (4 * problem.groups)),)

    def kept_buffer(self, problem: Problem, like: Tensor) -> Tensor:
        return _new(self.kept_shape(problem), _F32)

    def normalize(self, problem, r, index):
        rows, pitch = r.shape[0], _cpu.pitch(problem.dim)
        z, rnorm = _new((rows, pitch), _F32), _new((rows,), _F32)
        _cpu.normalize(
            _strided(r, problem.dim, index), rows, problem.dim, problem.eps,
            *addresses(z=(z, _F32, rows * pitch), rnorm=(rnorm, _F32, rows)).values(),
            torch.get_num_threads(),
        )  # fmt: skip
        return z, rnorm

    def sums(self, problem, z1, z2, scale, kept, logits=None, tops=None, ids=None):
        _check_scale(scale)
        row, column = _new((2, problem.rows), _F64, torch.zeros), None
        if problem.symmetric:
            column = _new((2, problem.candidates), _F64, torch.zeros)
        self._sums(problem, z1, z2, scale, kept, row, column, logits, False, tops, ids)
        return _log(row), None if column is None else _log(column)

    def self_sums(self, problem, z, scale, top=None, ids=None):
        total = _new((2, z.shape[0]), _F64, torch.zeros)
        tops = None if top is None else Tops(top, top, None)
        self._sums(problem, z, z, scale, None, total, total, None, True, tops, ids)
        return _log(total)

    def _sums(self, problem, z1, z2, scale, kept, row, column, logits, upper, tops, ids) -> None:
        m, n = z1.shape[0], z2.shape[0]
        tops = tops or Tops(None, None, None)
        row_sum, column_sum, *others = addresses(
            row=(row, _F64, 2 * m), column=(column, _F64, 2 * n), logits=(logits, _F64, m),
            top_row=(tops.row, _F32, m), top_col=(tops.col, _F32, n), own=(tops.own, _F32, m),
        ).values()  # fmt: skip
        _cpu.sums(
            *self._similarity(problem, z1, z2, scale, upper, ids, kept),
            row_sum, row_sum + 8 * m, column_sum, column_sum and column_sum + 8 * n, *others,
            torch.get_num_threads(),
        )  # fmt: skip

    def _similarity(self, problem, z1, z2, scale, upper, ids, kept) -> tuple:
        """What `sums` and `products` take first: two sets of rows, and how they are multiplied."""
        m, n, pitch = z1.shape[0], z2.shape[0], _cpu.pitch(problem.dim)
        rows, columns = ids or (None, None)
        size = 0 if kept is None else kept.numel()
        z1_at, z2_at, *others = addresses(
            z1=(z1, _F32, m * pitch), z2=(z2, _F32, n * pitch), ids1=(rows, torch.int32, m),
            ids2=(columns, torch.int32, n), kept=(kept, _F32, size),
        ).values()  # fmt: skip
        return (
            z1_at, z2_at, m, n, problem.dim, 0 if upper else problem.row_offset, scale, upper,
            OPERANDS[self.precision(problem)], *others, 4 * size,
        )  # fmt: skip

    def products(self, problem, z1, z2, scale, pair, kept, need, ids=None):
        dz1 = torch.zeros_like(z1) if need[0] else None
        dz2 = torch.zeros_like(z2) if need[1] else None
        if dz1 is None and dz2 is None:
            return dz1, dz2
        self._products(problem, z1, z2, scale, pair, kept, dz1, dz2, False, ids)
        return dz1, dz2

    def add_self_products(self, problem, z, scale, w, lse, dz, ids=None):
        pair = Weights(w, lse, w, lse, None)
        self._products(problem, z, z, scale, pair, None, dz, dz, True, ids)

    def _products(self, problem, z1, z2, scale, pair, kept, dz1, dz2, upper, ids) -> None:
        m, n, pitch = z1.shape[0], z2.shape[0], z1.shape[1]
        _cpu.products(
            *self._similarity(problem, z1, z2, scale, upper, ids, kept),
            *addresses(
                w=(pair.w, _F64, m), v=(pair.v, _F64, n), row_lse=(pair.row_lse, _F64, m),
                col_lse=(pair.col_lse, _F64, n), diagonal=(pair.diagonal, _F64, m),
                dz1=(dz1, _F32, m * pitch), dz2=(dz2, _F32, n * pitch),
            ).values(),
            torch.get_num_threads(),
        )  # fmt: skip

    def gradient_buffer(self, problem: Problem, rows: int, device: torch.device) -> Tensor:
        # One group: `finish` writes every column itself. Several groups add up.
        make = torch.empty if problem.groups == 1 else torch.zeros
        return make((rows, problem.width), dtype=problem.dtype, device=CPU)

    def finish(self, problem, z, rnorm, dz, dr, index):
        into, target = None, None
        if dr is not None:
            into = dr if problem.groups == 1 else dr.new_empty(dr.shape[0], problem.dim)
            columns = index if problem.groups == 1 else None
            target = *_strided(into, problem.dim, columns), into.shape[1], True
        rows, pitch = len(dz if dr is None else dr), _cpu.pitch(problem.dim)
        total = _cpu.finish(
            *addresses(
                z=(z, _F32, rows * pitch), dz=(dz, _F32, rows * pitch), rnorm=(rnorm, _F32, rows)
            ).values(),
            rows, problem.dim, problem.eps, target,
            torch.get_num_threads(),
        )  # fmt: skip
        if into is not dr:
            dr.index_add_(1, index, into)
        return total

    def fuses(self, problem: Problem) -> bool:
        """One native call a direction: at small batches the driver's operations are the time."""
        return problem.groups == 1 and not problem.return_stats

    def forward(self, problem: Problem, r1, r2, columns, scale) -> tuple:
        """The driver's, in ``_cpu.forward``."""
        _check_scale(scale)
        m, n, dim, symmetric = problem.rows, problem.candidates, problem.dim, problem.symmetric
        index = None if columns is None else columns[0]
        x1, x2 = _strided(r1, dim, index), _strided(r2, dim, index)
        empty, pitch = torch.empty, _cpu.pitch(dim)
        f32, f64 = {"dtype": _F32, "device": CPU}, {"dtype": _F64, "device": CPU}
        whole = n if symmetric else 0
        saved = Saved(
            empty((m, pitch), **f32), empty((n, pitch), **f32), empty(m, **f32), empty(n, **f32),
            empty(m, **f64), empty(whole, **f64), empty(m, **f64), empty(min(m, whole), **f64),
            empty(self.kept_shape(problem), **f32),
        )  # fmt: skip
        loss = empty((m,) if problem.reduction == "none" else (), **f32)
        step = _step(problem, saved, scale)
        _cpu.forward(step, x1, x2, loss.data_ptr(), torch.get_num_threads())
        return loss, [saved], None

    def backward(self, problem: Problem, dloss, states, columns, scale, need) -> tuple:
        """The driver's, in ``_cpu.backward``."""
        dloss = dloss.to(_F32)
        each = problem.reduction == "none"
        index = None if columns is None else columns[0]
        grads, targets = [None, None], [None, None]
        for side, rows in enumerate((problem.rows, problem.candidates)):
            if need[side]:
                grads[side] = grad = self.gradient_buffer(problem, rows, CPU)
                targets[side] = *_strided(grad, problem.dim, index), problem.width, True
        dtemperature = _cpu.backward(
            _step(problem, states[0], scale),
            start("upstream", dloss), dloss.stride(0) if each else 0, *targets, need[2],
            torch.get_num_threads(),
        )  # fmt: skip
        return *grads, dtemperature if need[2] else None


def _step(problem: Problem, saved: Saved, scale: float) -> tuple:
    """What both directions take. ``saved`` are whole: made here, or compared with what was."""
    z1, z2, rnorm1, rnorm2, row_lse, col_lse, nll_row, nll_col, kept = saved
    return (
        (problem.rows, z1.data_ptr(), rnorm1.data_ptr()),
        (problem.candidates, z2.data_ptr(), rnorm2.data_ptr()),
        problem.dim, problem.eps, scale, problem.negatives == "both", problem.symmetric,
        OPERANDS[BACKEND.precision(problem)], problem.reduction == "mean",
        problem.reduction == "none", kept.data_ptr(), 4 * kept.numel(), row_lse.data_ptr(),
        col_lse.data_ptr(), nll_row.data_ptr(), nll_col.data_ptr(),
    )  # fmt: skip


def _check_scale(scale: float) -> None:
    if scale > MAX_SCALE:  # of a tensor, which why_not has not seen
        raise ValueError(
            f"temperature: the cpu backend takes one from 2^-21 on, got {1.0 / scale}; "
            "backend='torch' takes any"
        )


def _new(shape: tuple[int, ...], dtype: torch.dtype, make=torch.empty) -> Tensor:
    return make(shape, dtype=dtype, device=CPU)


def _log(accumulated: Tensor) -> Tensor:
    """log of (sum, exponent) pairs: sum 2^exponent."""
    return (accumulated[0].log2_() + accumulated[1]) * _LN2


BACKEND = Cpu()
