"""Operations and bytes of the loss, counted once for every benchmark and figure.

c = M N d is the unit of docs/design.md section 3: one tile product S = z1 z2^T is 2c operations.
"""

from __future__ import annotations


def unit(rows: int, candidates: int, dim: int) -> int:
    """c = M N d."""
    return rows * candidates * dim


def forward(rows: int, candidates: int, dim: int, negatives: str = "cross") -> int:
    """Operations of the forward pass: one tile product, and two triangular ones for "both"."""
    operations = 2 * unit(rows, candidates, dim)
    if negatives == "both":
        operations += unit(rows, rows, dim) + unit(candidates, candidates, dim)
    return operations


def backward(
    rows: int, candidates: int, dim: int, negatives: str = "cross", kept: float = 0.0
) -> int:
    """Operations of the backward pass: recompute (less the fraction ``kept``) and two products."""
    operations = round((6 - 2 * kept) * unit(rows, candidates, dim))
    if negatives == "both":
        operations += 3 * (unit(rows, rows, dim) + unit(candidates, candidates, dim))
    return operations


def total(rows: int, candidates: int, dim: int, negatives: str = "cross", kept: float = 0.0) -> int:
    """Operations of forward and backward: 8c for "cross", 16c for "both", at M = N."""
    return forward(rows, candidates, dim, negatives) + backward(
        rows, candidates, dim, negatives, kept
    )


def saved_bytes(rows: int, candidates: int, dim: int, itemsize: int = 4) -> int:
    """Bytes kept from forward to backward: both z, and the per-row statistics in fp32."""
    return (rows + candidates) * dim * itemsize + 4 * (5 * rows + 3 * candidates)
