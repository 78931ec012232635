"""What the stages hand to each other, whoever wrote the kernels; needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

# The stored weights' power of two: |P| <= 2 STORE, so fp16 keeps entries normal down to 2^-28 of a
# probability.
STORE = 2.0**13
UNIT = 2.0**15  # of unit rows (layout.py)
LO_SCALE = 2.0**11  # of the remainders of stored weights, normal then where these are


class Factors:
    """What a tile of weights is made with: per-row and per-column fp32, and the positives' terms.

    ``diagonal`` (M,) is times STORE and the layout's unit, like P z. Without ``bounded`` the shifts
    are the log-sums in base 2. ``ids``: int32 of the rows and of the columns, or None; where they
    are equal P is 0.
    """

    ids: tuple[Tensor, Tensor] | None = None

    @property
    def crowded(self) -> bool:
        """Whether a tile wants more registers: for two exponentials an element, or for ids."""
        return not self.bounded or self.ids is not None

    def __init__(self, m: int, n: int, symmetric: bool, bounded: bool, device) -> None:
        def vector(length: int) -> Tensor:
            return torch.empty(length, dtype=torch.float32, device=device)

        self.row, self.diagonal = vector(m), vector(m)
        self.col = vector(n) if symmetric else self.row
        self.row_shift = self.row if bounded else vector(m)
        self.col_shift = vector(n) if symmetric and not bounded else self.row_shift
        self.symmetric, self.bounded = symmetric, bounded


class View:
    """One view's side of ``finish``: packed z, rnorm, accumulated dz, output or None, its dots."""

    def __init__(self, z: Tensor, rnorm: Tensor, acc: Tensor, dr: Tensor | None, dots: bool):
        self.z, self.rnorm, self.acc, self.dr = z, rnorm, acc, dr
        self.dots = torch.empty_like(rnorm) if dots else None
