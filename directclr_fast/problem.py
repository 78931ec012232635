"""What one call of the loss asks: a frozen record every backend reads.

A new option is added here once; a backend that cannot do it says so in its ``why_not``.
Only metadata lives in the record (sizes, dtypes, options), never a tensor's values, so it can be
built while tracing and costs no device synchronisation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

NEGATIVES = ("cross", "both", "same")
REDUCTIONS = ("mean", "sum", "none")
PRECISIONS = ("auto", "fp16", "bf16", "tf32", "fp8", "highest")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Problem:
    """Sizes and options of one loss call, in the symbols of docs/design.md section 2.

    ``rows`` M anchors (rows of r1), ``candidates`` N (rows of r2), ``width`` columns of both,
    ``dim`` d columns taken, ``groups`` G column groups whose losses are summed. The positive of
    anchor i is candidate ``row_offset + i``.
    """

    rows: int
    candidates: int
    width: int
    dim: int
    dtype: torch.dtype
    device_type: str
    temperature: float | None  # None: a 0-dim tensor, whose value the host must not need
    gathered: bool = False  # columns come from an index tensor, not from the slice [:, :dim]
    groups: int = 1
    negatives: str = "cross"
    symmetric: bool = True
    reduction: str = "mean"
    row_offset: int = 0
    precision: str = "auto"
    eps: float = 1e-12
    workspace_bytes: int | None = None
    mixed: bool = False  # called under autocast
    keep: bool = False  # a backward pass may follow, so keeping E tiles can pay
    top1: bool = False  # statistics are wanted: whether each positive is the largest logit

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the loss and, unless another is asked for, of z: fp64 for fp64, else fp32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def statistics_dtype(self) -> torch.dtype:
        """dtype of the per-row statistics: fp64, which costs nothing at O(N) and keeps a log-sum
        of 17 from rounding every weight of its row by 1e-6; fp32 where a device has no fp64."""
        return torch.float32 if self.device_type == "mps" else torch.float64

    def unshifted_is_safe(self, scale: float) -> bool:
        """Whether exp(scale * s), |s| <= 1, and its sums stay far inside the exponent range.

        Asked of ``scale = 1 / temperature``. The bound leaves room for the reciprocals of the
        sums times upstream gradients down to 1e-8 before anything turns denormal.
        """
        limit = 600.0 if self.compute_dtype == torch.float64 else 60.0
        # log(2 N) + scale <= limit, written so that a traced N is compared and not specialised.
        return 2 * max(self.rows, self.candidates) <= math.exp(limit - scale)
