"""Operations and bytes of the loss, counted once for every benchmark and figure.

c = M N d is the unit of docs/design.md section 3: one tile product S = z1 z2^T is 2c operations.

Counted is what the loss needs, with a view's products with itself as triangles. A backend may run
more, which its rate then pays for: d padded to whole vectors, tiles on an edge or a diagonal in
full; "triton" backward computes S whole in the super-blocks on the diagonal.
"""

from __future__ import annotations


def total(rows: int, candidates: int, dim: int, negatives: str = "cross") -> int:
    """Operations of forward (S) and backward (S again, two products): 8c for "cross", 16c for
    "both", at M = N."""
    operations = 8 * rows * candidates * dim
    if negatives == "both":
        operations += 4 * (rows**2 + candidates**2) * dim
    return operations


def gathered_bytes(
    rows: int, dim: int, itemsize: int, negatives: str = "cross", groups: int = 1
) -> int:
    """Bytes a process holds with gather="all": z2 of all N rows in every group ("both": z1 too),
    and fp32 dz2 of one group at a time. While dz2 is sent under Gloo, N d fp32 of arrivals join."""
    views = 2 if negatives == "both" else 1
    return rows * dim * (groups * views * itemsize + 4)
