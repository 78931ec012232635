"""The five stages as Triton kernels (kernels/): tile products on the tensor cores of a GPU.

The adapter owns the tensors and the order of launches; ``directclr_fast.kernels`` knows neither
problems nor autograd. A plain call (one column group, negatives "cross") takes 4 launches forward
and, where the weights fit in one super-block, 5 backward; the other options go through the driver
in ``stages`` over the same kernels.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys

import torch
from torch import Tensor

from ..problem import Problem
from .stages import Pair, Saved

NAME = "triton"

# One super-block of weights: 8192 x 8192 in half precision.
DEFAULT_WORKSPACE_BYTES = 128 * 2**20


def interpreted() -> bool:
    """Whether Triton interprets the kernels on the CPU (TRITON_INTERPRET=1), as the tests do."""
    loaded = sys.modules.get("directclr_fast.kernels.common")
    if loaded is not None:  # kernels keep what they were defined as
        return loaded.INTERPRETED.value
    return os.environ.get("TRITON_INTERPRET") == "1"


def only_by_name(problem: Problem) -> bool:
    """Interpreted kernels are for checking; no automatic choice takes them."""
    return problem.device_type == "cpu"


def why_not(problem: Problem) -> list[str]:
    """Reasons this backend cannot run ``problem``; empty when it can."""
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed"]
    reasons = []
    if problem.device_type == "cpu" and not interpreted():
        reasons.append("it runs on GPUs, got cpu")
    elif problem.device_type not in ("cuda", "cpu"):
        reasons.append(f"it runs on CUDA and ROCm devices, got {problem.device_type}")
    if problem.dtype == torch.float64:
        reasons.append("it computes in fp32 and less, got float64")
    if problem.negatives == "same":
        reasons.append("negatives 'same' is in the reference backend only")
    if problem.device_type == "cuda" and torch.cuda.is_available() and not torch.version.hip:
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            reasons.append(f"it needs compute capability 8.0, got {capability[0]}.{capability[1]}")
        if problem.precision == "fp8" and capability < (8, 9):
            reasons.append(
                f"precision 'fp8' needs compute capability 8.9, got {capability[0]}.{capability[1]}"
            )
    if problem.precision == "fp8" and torch.version.hip:
        reasons.append("precision 'fp8' is there for CUDA devices only")
    return reasons


def details() -> dict[str, str]:
    """What doctor shows: the version, and the tile row chosen for this machine's GPU."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from ..kernels import configs

    found = {"triton": importlib.import_module("triton").__version__}
    if torch.cuda.is_available():
        found["tiles of"] = configs.architecture(torch.device("cuda", 0))[0]
    return found


def precision(problem: Problem) -> str:
    """That of the products: "auto" rounds operands where eager PyTorch would, and to fp16.

    fp32 rows outside autocast, with torch's fp32 products left exact, stay fp32-grade ("highest").
    """
    if problem.precision != "auto":
        return problem.precision
    exact = problem.dtype == torch.float32 and not problem.mixed
    if exact and torch.get_float32_matmul_precision() == "highest":
        return "highest"
    return "fp16"


class TritonStages:
    """The stages, as :class:`directclr_fast.backends.stages.Stages` describes them.

    ``arch`` fixes the row of the tile table (the compile gate asks for each); None takes the
    device's.
    """

    def __init__(self, arch: str | None = None) -> None:
        self.arch = arch

    # ---------------------------------------------------------------- what runs where

    def _layout(self, problem: Problem, z: Tensor | None = None):
        """That of packed rows to be made, or of ``z``: the process's setting may have changed."""
        from ..kernels.common import Layout

        ieee = self.arch == "gfx942" if self.arch else bool(torch.version.hip)
        chosen = precision(problem)
        if z is not None and problem.precision == "auto":
            chosen = "highest" if z.dtype == torch.float32 else "fp16"
        return Layout(chosen, problem.dim, ieee)

    def _tile(self, kernel: str, layout, device: torch.device, plain: bool = True):
        from ..kernels import configs

        arch = self.arch or configs.architecture(device)[0]
        itemsize = layout.dtype.itemsize
        if layout.precision == "fp8" and kernel != "products":
            itemsize = 1
        return configs.tile(kernel, arch, itemsize, plain)

    def _programs(self, device: torch.device) -> int:
        """Programs that fill the device a few times over."""
        from ..kernels import configs

        return 4 * (configs.architecture(device)[1] if self.arch is None else 132)

    def _superblock(self, problem: Problem, layout, tile) -> tuple[int, int]:
        """(rows, columns) of a super-block that fits the workspace, in whole tiles."""
        workspace = problem.workspace_bytes
        workspace = DEFAULT_WORKSPACE_BYTES if workspace is None else workspace
        elements = workspace // layout.dtype.itemsize
        both = problem.negatives == "both"
        rows_there = problem.candidates if both else problem.rows

        def whole(size: int, step: int) -> int:
            return max(step, size // step * step)

        def extent(size: int, step: int) -> int:
            return -(-size // step) * step

        side = math.isqrt(elements)
        columns = min(extent(problem.candidates, tile.columns), whole(side, tile.columns))
        rows = min(extent(rows_there, tile.rows), whole(elements // columns, tile.rows))
        if rows * columns < elements:
            fit = whole(elements // rows, tile.columns)
            columns = min(extent(problem.candidates, tile.columns), fit)
        return rows, columns

    # ---------------------------------------------------------------- the fused route

    def fuses(self, problem: Problem) -> bool:
        """Whether ``forward`` and ``backward`` below replace the driver for this call."""
        return problem.negatives == "cross" and problem.groups == 1

    def forward(
        self, problem: Problem, r1: Tensor, r2: Tensor, columns: Tensor | None, scale
    ) -> tuple[Tensor, Saved]:
        """normalize, sums, combine, total: 4 launches while the partial sums fit one strip."""
        from ..kernels import common, normalize, sums

        layout, offset = self._layout(problem), problem.row_offset
        bounded = _bounded(problem, scale)
        tile = self._tile("sums", layout, r1.device, bounded)
        index = None if columns is None else columns[0]
        with common.launch.device(r1):
            z1, z2, rnorm1, rnorm2, cosines = normalize.normalize_views(
                layout, r1, r2, index, offset, problem.eps
            )
            strips = sums.strips(len(z1), len(z2), tile, problem.symmetric, bounded)
            options = {"moving": problem.symmetric, "bounded": bounded}
            programs = self._programs(r1.device)
            parts, rest = None, (None, None)
            if len(strips) == 1:
                parts = sums.partial_sums(
                    layout, z1, z2, strips[0], scale, offset, tile, programs, **options
                )
            else:
                rest = sums.log_sums(layout, z1, z2, scale, offset, tile, programs, **options)
            loss, row_lse, col_lse, nll_row, nll_col = sums.combine(
                problem, cosines, scale, bounded=bounded, parts=parts, rest=rest
            )
        values = (z1, z2, rnorm1, rnorm2, cosines, row_lse, col_lse, nll_row, nll_col)
        return loss, Saved(*(value[None] for value in values), self.kept_buffer(problem, z1)[None])

    def backward(
        self,
        problem: Problem,
        dloss: Tensor,
        saved: Saved,
        columns: Tensor | None,
        scale,
        need: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """factors, weights, two products, finish: 5 launches for one super-block."""
        from ..kernels import common, finish, weights

        need1, need2, need_temperature = need
        layout = self._layout(problem, saved.z1)
        state = Saved(*(value[0] for value in saved))
        index = None if columns is None else columns[0]
        wanted = (need1 or (need_temperature and not need2), need2)
        per_row = problem.reduction == "none"
        with common.launch.device(dloss):
            dloss = dloss.contiguous()
            largest = dloss.abs().amax() if per_row else None
            factors = weights.factors(problem, state, dloss, largest, _bounded(problem, scale))
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
                    views.append((finish.View(z, rnorm, dz, dr, need_temperature), number))
            if views:
                factor = 1.0 / (weights.STORE * (2.0 if problem.symmetric else 1.0))
                if problem.reduction == "mean":
                    factor /= problem.rows
                finish.finish(
                    layout,
                    views,
                    state.z2 if views[0][1] == 1 else state.z1,
                    factors.diagonal,
                    problem.row_offset,
                    upstream=largest if per_row else dloss,
                    scale=scale,
                    factor=factor,
                    index=index,
                    width=problem.width,
                    eps=problem.eps,
                    add=False,
                )
            dtemperature = None
            if need_temperature:
                dtemperature = -views[0][0].dots.sum(dtype=torch.float64) * scale
        return drs[0], drs[1], dtemperature

    def _tile_products(self, problem, layout, z1, z2, scale, factors, offset, wanted):
        """(dz1, dz2) of P as accumulated, (., pitch) fp32; None where not wanted."""
        from ..kernels import products, weights

        dz1, dz2 = (
            torch.empty((len(z), layout.pitch), dtype=torch.float32, device=z.device) if w else None
            for z, w in zip((z1, z2), wanted)
        )
        if not any(wanted):
            return dz1, dz2
        tile = self._tile("weights", layout, z1.device, factors.bounded)
        inner = self._tile("products", layout, z1.device)
        height, width = self._superblock(problem, layout, tile)
        out = torch.empty(height * width, dtype=layout.dtype, device=z1.device)
        for rows in _slices(len(z1), height):
            for columns in _slices(len(z2), width):
                p = weights.weights(
                    layout, z1, z2, factors, scale, offset, rows, columns, out, tile
                )
                if dz1 is not None:
                    products.product(
                        layout, p, z2, dz1, rows, columns,
                        transposed=False, add=columns.start > 0, tile=inner,
                    )  # fmt: skip
                if dz2 is not None:
                    products.product(
                        layout, p, z1, dz2, columns, rows,
                        transposed=True, add=rows.start > 0, tile=inner,
                    )  # fmt: skip
        return dz1, dz2

    # ---------------------------------------------------------------- stage by stage

    def packed(self, problem: Problem) -> tuple[int, torch.dtype]:
        layout = self._layout(problem)
        return layout.row, layout.dtype

    def kept_shape(self, problem: Problem) -> tuple[int, ...]:
        return (0,)

    def kept_buffer(self, problem: Problem, like: Tensor) -> Tensor:
        return like.new_empty(0)

    def normalize(self, problem: Problem, r: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        from ..kernels import common, normalize

        with common.launch.device(r):
            return normalize.normalize(self._layout(problem), r, index, problem.eps)

    def positives(self, problem: Problem, z1: Tensor, z2: Tensor) -> Tensor:
        from ..kernels import common, normalize

        with common.launch.device(z1):
            return normalize.positives(self._layout(problem, z1), z1, z2, problem.row_offset)

    def sums(self, problem: Problem, z1: Tensor, z2: Tensor, scale, kept: Tensor):
        return self._log_sums(problem, z1, z2, scale, problem.row_offset, problem.symmetric)

    def self_sums(self, problem: Problem, z: Tensor, scale) -> Tensor:
        row, column = self._log_sums(problem, z, z, scale, 0, True, upper=True)
        return torch.logaddexp(row, column)

    def _log_sums(self, problem, z1, z2, scale, offset, moving, upper=False):
        from ..kernels import common, sums

        layout, bounded = self._layout(problem, z1), _bounded(problem, scale)
        tile = self._tile("sums", layout, z1.device, bounded and not upper)
        with common.launch.device(z1):
            return sums.log_sums(
                layout, z1, z2, scale, offset, tile, self._programs(z1.device),
                moving=moving, bounded=bounded, upper=upper,
            )  # fmt: skip

    def products(
        self, problem: Problem, z1: Tensor, z2: Tensor, scale, pair: Pair, kept: Tensor, need
    ) -> tuple[Tensor | None, Tensor | None]:
        from ..kernels import common, finish

        layout, offset = self._layout(problem, z1), problem.row_offset
        factors, unit = _factors(pair, _bounded(problem, scale))
        with common.launch.device(z1):
            dz1, dz2 = self._tile_products(problem, layout, z1, z2, scale, factors, offset, need)
            if dz1 is not None:
                finish.add_positives(layout, dz1, z2, factors.diagonal, unit, offset, 0)
            if dz2 is not None:
                finish.add_positives(layout, dz2, z1, factors.diagonal, unit, -offset, -offset)
        return dz1, dz2

    def add_self_products(
        self, problem: Problem, z: Tensor, scale, w: Tensor, lse: Tensor, dz: Tensor
    ) -> None:
        from ..kernels import common, products, weights

        layout = self._layout(problem, z)
        factors, unit = _factors(Pair(w, lse, w, lse, w), _bounded(problem, scale))
        tile = self._tile("weights", layout, z.device, factors.bounded)
        inner = self._tile("products", layout, z.device)
        side = min(self._superblock(problem, layout, tile))
        step = max(tile.rows, tile.columns)
        side = max(step, side // step * step)
        with common.launch.device(z):
            out = torch.empty(side * side, dtype=layout.dtype, device=z.device)
            dz.div_(unit)  # a power of two, so nothing is rounded on the way there and back
            for rows in _slices(len(z), side):
                for columns in _slices(len(z), side):
                    if columns.start < rows.start:
                        continue
                    p = weights.weights(layout, z, z, factors, scale, 0, rows, columns, out, tile)
                    products.product(
                        layout, p, z, dz, rows, columns, transposed=False, add=True, tile=inner
                    )
                    if columns.start > rows.start:
                        products.product(
                            layout, p, z, dz, columns, rows, transposed=True, add=True, tile=inner
                        )
            dz.mul_(unit)

    def gradient_buffer(self, problem: Problem, rows: int, device: torch.device) -> Tensor:
        # `finish` writes every column of a slice itself; gathered groups are added where they go.
        make = torch.zeros if problem.gathered else torch.empty
        return make((rows, problem.width), dtype=problem.dtype, device=device)

    def finish(
        self,
        problem: Problem,
        z: Tensor,
        rnorm: Tensor,
        dz: Tensor,
        dr: Tensor | None,
        index: Tensor | None,
    ) -> Tensor:
        from ..kernels import common, finish

        view = finish.View(z, rnorm, dz, dr, dots=True)
        with common.launch.device(z):
            finish.finish(
                self._layout(problem, z),
                [(view, 1)],
                z,
                None,
                0,
                upstream=None,
                scale=1.0,
                factor=1.0,
                index=index,
                width=problem.width,
                eps=problem.eps,
                add=problem.groups > 1,
            )
        return view.dots.sum(dtype=problem.statistics_dtype)


def _bounded(problem: Problem, scale) -> bool:
    """Whether exp(a s) and its sums fit fp32 without a maximum; the host must know a."""
    return not isinstance(scale, Tensor) and problem.unshifted_is_safe(scale)


def _factors(pair: Pair, bounded: bool):
    """(the kernels' factors of a pair's weights, the factor the product still lacks, 0-dim)."""
    from ..kernels import weights

    both = pair.v is not None
    top = pair.w.abs().amax()
    if both:
        top = torch.maximum(top, pair.v.abs().amax())
    # The next power of two: dividing by it rounds nothing. 1 where every weight is zero.
    unit = torch.ldexp(torch.ones_like(top), torch.frexp(top).exponent)
    unit = torch.where(top.isfinite(), unit, top)
    found = weights.Factors.__new__(weights.Factors)
    found.symmetric, found.bounded = both, bounded
    found.diagonal = pair.diagonal.float()

    def side(weight: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight / unit * weights.STORE
        if not bounded:
            return weight.float(), (lse * math.log2(math.e)).float()
        # Candidates nobody is the positive of have no weight, whatever their log-sum.
        found = torch.where(weight == 0.0, 0.0, weight * torch.exp(-lse)).float()
        return found, found

    found.row, found.row_shift = side(pair.w, pair.row_lse)
    found.col, found.col_shift = found.row, found.row_shift
    if both:
        found.col, found.col_shift = side(pair.v, pair.col_lse)
    return found, (unit / weights.STORE).float()


def _slices(size: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


def stages() -> TritonStages:
    """The stage object the driver in ``stages.py`` runs."""
    return TritonStages()
