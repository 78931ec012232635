"""The five stages in CUDA C++ for Hopper (csrc/cuda): TMA, wgmma, the epilogues in registers.

``precision="tf32"``, and every other GPU, stay with Triton. It is chosen automatically for the
shapes that a result file says it is faster on (:data:`FASTER`); until one does, only by name.
"""

from __future__ import annotations

import sys

import torch

from ..problem import Problem
from . import hopper
from .packed import Packed, capability

# (precision, at least so many columns, at least so many rows) where it beat Triton, each with the
# result file in bench/results/ that says so. None yet: no GPU has run it.
FASTER: tuple[tuple[str, int, int], ...] = ()


class Cuda(Packed):
    name = "cuda"
    kernels = hopper

    def why_not(self, problem: Problem) -> list[str]:
        if hopper._cuda is None:
            reason = f"the compiled extension is not installed ({hopper.missing})"
            return [f"{reason}; DIRECTCLR_FAST_CUDA=1 and nvcc build it"]
        if sys.platform != "linux" or problem.device_type != "cuda" or torch.version.hip:
            return [f"it runs on NVIDIA GPUs under Linux, got {problem.device_type}"]
        reasons = problem.reference_only()
        if torch.cuda.is_available():
            major, minor = capability(problem)
            if (major, minor) != (9, 0):
                reasons.append(f"it needs compute capability 9.0, got {major}.{minor}")
        if problem.dtype == torch.float64:
            reasons.append("it computes in fp32 and less, got float64")
        if problem.ignores:
            reasons.append("its kernels leave out the positives only, got same_label 'ignore'")
        chosen = self.precision(problem)
        if chosen == "tf32":
            reasons.append("its products are of fp16, bf16 or fp8 operands, got 'tf32'")
        return reasons

    def why_not_unasked(self, problem: Problem) -> str | None:
        chosen, rows = self.precision(problem), min(problem.rows, problem.candidates)
        if any(chosen == p and problem.dim >= d and rows >= n for p, d, n in FASTER):
            return None
        return "no result file says that it is faster than Triton on this shape"

    def details(self) -> dict[str, str]:
        if hopper._cuda is None:
            return {}
        major, minor = divmod(hopper._cuda.built_with(), 1000)
        return {"built with CUDA": f"{major}.{minor // 10}"}

    def _tile(self, kernel, layout, device, crowded=False):
        return hopper.tile(layout)

    def _whole_rows(self, tile) -> int:
        return 2 * tile.rows  # a cluster (csrc/cuda/order.h)

    def _bounded_sums(self, problem: Problem, scale) -> bool:
        return not problem.return_stats and super()._bounded_sums(problem, scale)

    def _programs(self, device: torch.device) -> int:
        return hopper.multiprocessors(device)


BACKEND = Cuda()
