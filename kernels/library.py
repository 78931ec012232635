"""Stage 4 by PyTorch's library, for kernels that leave it the products; needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .configs import Tile
from .layout import LO_SCALE, Layout

# A tensor core drops what does not fit behind a sum, once in 16 terms: of "highest" so many terms
# are added there, and the rest in fp32.
CHAIN = 1024


def product(
    layout: Layout, p: Tensor, z: Tensor, dz: Tensor, rows: slice, inner: slice, *,
    transposed: bool, add: bool, tile: Tile | None = None,
) -> None:  # fmt: skip
    """dz[rows] = (or +=) op(P) z[inner]: half operands, fp32 result and sums. ``p`` is as
    ``weights`` leaves it, dz (., pitch); ``tile`` is for kernels."""
    n, k, pitch, dz = rows.stop - rows.start, inner.stop - inner.start, layout.pitch, dz[rows]
    z = layout.half_operand(z)[inner]
    parts = p.chunk(layout.parts, 1)
    hi, *lo = [part[:k, :n].T if transposed else part[:n, :k] for part in parts]
    if not lo:
        multiply(dz, hi, z, add)
        return
    multiply(dz, hi, z[:, pitch:], add)
    for columns in (slice(pitch, None), slice(pitch)):
        multiply(dz, lo[0], z[:, columns], True, 1 / LO_SCALE)
    for start in range(0, k, CHAIN):
        these = slice(start, start + CHAIN)
        multiply(dz, hi[:, these], z[these, :pitch], True)


def multiply(dz: Tensor, a: Tensor, b: Tensor, add: bool, alpha: float = 1.0) -> None:
    """dz = a b, or dz += alpha a b."""
    if add:
        torch.ops.aten.addmm.dtype_out(dz, a, b, torch.float32, alpha=alpha, out=dz)
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=dz)
