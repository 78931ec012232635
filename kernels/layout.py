"""How unit rows lie in memory for the tensor cores; needs no Triton: other kernels read it too.

Unit rows are packed for the tensor cores (:class:`Layout`). With half-precision operands a row is

.. code-block:: text

    [ hi (PITCH) | lo (PITCH) | e4m3 (PITCH bytes, precision "fp8" only) ]

hi = round(z), lo = round((z - hi) LO_SCALE): hi is the operand of the tile products, hi + lo the
fp32-grade row that the positives' terms and the normalisation's backward need. That is the memory
of an fp32 row, and nothing has to be read again from the representation. PITCH is d rounded up to
64 with zeros in between, so no tile needs a mask along d: 360 columns cost 384.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

LO_SCALE = 2048.0  # keeps the remainders of small entries out of fp16's denormals


@dataclass(frozen=True)
class Layout:
    """How the unit rows of one precision lie in memory; ``dim`` columns, ``pitch`` with padding."""

    precision: str  # "fp16", "bf16", "tf32", "highest" or "fp8"
    dim: int
    ieee: bool = False  # "highest" by IEEE products: where there is no tf32x3 (ROCm)

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
    def split(self) -> bool:
        """Whether a row is hi and lo."""
        return self.dtype != torch.float32

    @cached_property
    def row(self) -> int:
        """Elements of ``dtype`` in a row."""
        if self.precision == "fp8":
            return 2 * self.pitch + self.pitch // 2
        return 2 * self.pitch if self.split else self.pitch

    @cached_property
    def fp8_scale(self) -> float:
        """The power of two nearest 2 sqrt(d): typical entries of unit rows near 2 in e4m3."""
        return 2.0 ** round(0.5 * math.log2(4 * self.dim))

    @cached_property
    def dot_precision(self) -> str:
        """``input_precision`` of tl.dot: named always, read by Triton for fp32 operands only."""
        if self.precision == "highest" and not self.ieee:
            return "tf32x3"
        return "tf32" if self.precision == "tf32" else "ieee"

    def operand(self, z: Tensor) -> Tensor:
        """(rows, pitch): what the similarity tiles are computed from."""
        if self.precision == "fp8":
            return z.view(torch.float8_e4m3fn)[:, 4 * self.pitch : 5 * self.pitch]
        return z[:, : self.pitch]

    def unit_rows(self, z: Tensor) -> Tensor:
        """(rows, dim) fp32: hi + lo."""
        rows = z[:, : self.dim].float()
        if self.split:
            rows = rows + z[:, self.pitch : self.pitch + self.dim].float() / LO_SCALE
        return rows

    def half_operand(self, z: Tensor) -> Tensor:
        """(rows, pitch): what the gradient products are computed from."""
        return z[:, : self.pitch]


_made = lru_cache(256)(Layout)


def layout_of(precision: str, dim: int, ieee: bool = False) -> Layout:
    """The layout, made once: what it derives is asked for some 90 times a step."""
    make = _made if type(dim) is int else Layout  # traced sizes have no hash
    return make(precision, dim, ieee)
