"""How unit rows lie in memory for the tensor cores, and what else the stages hand to each other,
whoever wrote the kernels; needs no Triton.

Unit rows are packed for the tensor cores (:class:`Layout`). With half-precision operands a row is

.. code-block:: text

    [ hi (PITCH) | lo (PITCH) | e4m3 (PITCH bytes, precision "fp8" only) ]

hi = round(UNIT z), lo = round(UNIT z - hi): hi is the operand of the tile products, hi + lo the
fp32-grade row that the positives' terms and the normalisation's backward need. That is the memory
of an fp32 row, and nothing has to be read again from the representation. UNIT takes unit rows to
the top of fp16's range, so that lo is normal down to entries of 2^-17 and needs no scale of its
own. PITCH is d rounded up to 64 with zeros in between, so no tile needs a mask along d: 360 columns
cost 384.

"highest" multiplies both parts of fp16 rows, hi lo' + lo hi' + hi hi'. Its rows are fp32 tensors,
which hold the halves: that tells them from rows of "fp16".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

# The stored weights' power of two: |P| <= 2 STORE, so fp16 keeps entries normal down to 2^-28 of a
# probability.
STORE = 2.0**13
UNIT = 2.0**15
LO_SCALE = 2.0**11  # of the remainders of stored weights, normal then where these are


@dataclass(frozen=True)
class Layout:
    """How the unit rows of one precision lie in memory; ``dim`` columns, ``pitch`` with padding."""

    precision: str  # "fp16", "bf16", "tf32", "highest" or "fp8"
    dim: int

    @cached_property
    def pitch(self) -> int:
        return (self.dim + 63) // 64 * 64

    @cached_property
    def dtype(self) -> torch.dtype:
        return {
            "fp16": torch.float16,
            "fp8": torch.float16,
            "bf16": torch.bfloat16,
        }.get(self.precision, torch.float32)

    @cached_property
    def element(self) -> torch.dtype:
        """What the memory of ``dtype`` holds."""
        return torch.float16 if self.precision == "highest" else self.dtype

    @cached_property
    def split(self) -> bool:
        """Whether a row is hi and lo."""
        return self.element != torch.float32

    @cached_property
    def parts(self) -> int:
        """Parts that the products are of: hi and lo, or hi."""
        return 2 if self.precision == "highest" else 1

    @cached_property
    def row(self) -> int:
        """Elements of ``dtype`` in a row."""
        if self.precision == "fp8":
            return 2 * self.pitch + self.pitch // 2
        return self.pitch if self.dtype == torch.float32 else 2 * self.pitch

    @cached_property
    def stride(self) -> int:
        """Elements of ``element`` in a row."""
        return self.row * self.parts

    @cached_property
    def unit(self) -> float:
        """What rows are times z."""
        return UNIT if self.split else 1.0

    @cached_property
    def cosine(self) -> float:
        """What products of operands are to be multiplied by."""
        return (self.fp8_scale if self.precision == "fp8" else self.unit) ** -2

    @cached_property
    def fp8_scale(self) -> float:
        """The power of two nearest 2 sqrt(d): typical entries of unit rows near 2 in e4m3."""
        return 2.0 ** round(0.5 * math.log2(4 * self.dim))

    @cached_property
    def products(self) -> str:
        """How tiles are multiplied: "highest", or ``input_precision`` of tl.dot, which Triton reads
        for fp32 operands only."""
        return self.precision if self.precision in ("highest", "tf32") else "ieee"

    def elements(self, x: Tensor) -> Tensor:
        """The same memory as ``element``."""
        return x if self.dtype == self.element else x.view(self.element)

    def operand(self, z: Tensor) -> Tensor:
        """(rows, pitch parts): what the similarity tiles are computed from."""
        if self.precision == "fp8":
            return z.view(torch.float8_e4m3fn)[:, 4 * self.pitch : 5 * self.pitch]
        return self.half_operand(z)

    def unit_rows(self, z: Tensor) -> Tensor:
        """(rows, dim) fp32: hi + lo."""
        z = self.elements(z)
        rows = z[:, : self.dim].float()
        if self.split:
            rows = (rows + z[:, self.pitch : self.pitch + self.dim].float()) / UNIT
        return rows

    def half_operand(self, z: Tensor) -> Tensor:
        """(rows, pitch parts): what the gradient products are computed from."""
        return self.elements(z)[:, : self.parts * self.pitch]


_made = lru_cache(256)(Layout)


def layout_of(precision: str, dim: int) -> Layout:
    """The layout, made once: what it derives is asked for some 90 times a step."""
    make = _made if type(dim) is int else Layout  # traced sizes have no hash
    return make(precision, dim)


@dataclass
class Factors:
    """What a tile of weights is made with: per-row (M,) and per-column (N,) fp32, and the
    positives' terms.

    ``diagonal`` (M,) is times STORE and the layout's unit, like P z. Without ``bounded`` the shifts
    are the log-sums in base 2. ``ids``: int32 of the rows and of the columns, or None; where they
    are equal P is 0.
    """

    row: Tensor
    row_shift: Tensor
    col: Tensor
    col_shift: Tensor
    diagonal: Tensor
    symmetric: bool
    bounded: bool
    ids: tuple[Tensor, Tensor] | None = None

    @classmethod
    def empty(cls, m: int, n: int, symmetric: bool, bounded: bool, device) -> Factors:
        """To be filled; what a call does not need is the memory of what it has."""

        def vector(length: int) -> Tensor:
            return torch.empty(length, dtype=torch.float32, device=device)

        row, diagonal = vector(m), vector(m)
        col = vector(n) if symmetric else row
        row_shift = row if bounded else vector(m)
        col_shift = vector(n) if symmetric and not bounded else row_shift
        return cls(row, row_shift, col, col_shift, diagonal, symmetric, bounded)

    @property
    def crowded(self) -> bool:
        """Whether a tile wants more registers: for two exponentials an element, or for ids."""
        return not self.bounded or self.ids is not None


class Side:
    """One view's side of ``finish``: packed z, rnorm, accumulated dz, output or None, its dots."""

    def __init__(self, z: Tensor, rnorm: Tensor, acc: Tensor, dr: Tensor | None, dots: bool):
        self.z, self.rnorm, self.acc, self.dr = z, rnorm, acc, dr
        self.dots = torch.empty_like(rnorm) if dots else None
