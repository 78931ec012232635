"""The formula, which materialises the N x N matrix: the options nothing faster has."""

from __future__ import annotations

from ..problem import Problem
from .base import Backend


class Reference(Backend):
    """No stages: ``ops`` runs ``directclr_fast.reference`` as it is, under PyTorch's autograd."""

    name = "reference"

    def why_not(self, problem: Problem) -> list[str]:
        if problem.precision not in ("auto", "highest"):
            return [f"precision {problem.precision!r}: it computes in fp32 (fp64 for fp64 inputs)"]
        return []


BACKEND = Reference()
