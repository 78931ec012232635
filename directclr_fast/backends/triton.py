"""The five stages as Triton kernels (kernels/): tile products on the tensor cores of a GPU.

The order of launches is in ``packed``; ``directclr_fast.kernels`` knows neither problems nor
autograd.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import cached_property

import torch

from ..kernels import configs
from ..problem import Problem
from .packed import Packed, capability


def interpreted() -> bool:
    """Whether Triton interprets the kernels on the CPU (TRITON_INTERPRET=1), as the tests do."""
    loaded = sys.modules.get("directclr_fast.kernels.common")
    if loaded is not None:  # kernels keep what they were defined as
        return loaded.INTERPRETED.value
    return os.environ.get("TRITON_INTERPRET") == "1"


class Triton(Packed):
    """``arch`` fixes the row of the tile table (the compile gate asks for each); None takes the
    device's.
    """

    name = "triton"

    def __init__(self, arch: str | None = None) -> None:
        self.arch = arch

    @cached_property
    def kernels(self):
        from ..kernels import launchers  # only where Triton is

        return launchers

    def why_not(self, problem: Problem) -> list[str]:
        if importlib.util.find_spec("triton") is None:
            return ["triton is not installed"]
        reasons = problem.reference_only()
        if problem.device_type == "cpu" and not interpreted():
            reasons.append("it runs on GPUs, got cpu")
        elif problem.device_type not in ("cuda", "cpu"):
            reasons.append(f"it runs on CUDA and ROCm devices, got {problem.device_type}")
        if problem.dtype == torch.float64:
            reasons.append("it computes in fp32 and less, got float64")
        if problem.device_type == "cuda" and torch.cuda.is_available() and not torch.version.hip:
            major, minor = capability(problem)
            if major < 8:
                reasons.append(f"it needs compute capability 8.0, got {major}.{minor}")
            if problem.precision == "fp8" and (major, minor) < (8, 9):
                reasons.append(f"precision 'fp8' needs compute capability 8.9, got {major}.{minor}")
        if problem.precision == "tf32" and torch.version.hip and torch.cuda.is_available():
            chip = torch.cuda.get_device_properties(problem.device_index or 0).gcnArchName
            if not chip.startswith("gfx94"):
                reasons.append(f"precision 'tf32' needs a chip of CDNA 3 (gfx94x), got {chip}")
        if problem.precision == "fp8" and torch.version.hip:
            reasons.append("precision 'fp8' is there for CUDA devices only")
        return reasons

    def why_not_unasked(self, problem: Problem) -> str | None:
        if problem.device_type == "cpu":
            return "interpreted kernels run only where they are asked for by name"
        return None

    def details(self) -> dict[str, str]:
        if importlib.util.find_spec("triton") is None:
            return {}
        shown = {"triton": importlib.import_module("triton").__version__}
        if torch.cuda.is_available():
            shown["tiles of"] = configs.architecture(torch.device("cuda", 0))[0]
        return shown

    def _tile(self, kernel, layout, device, crowded=False):
        arch = self.arch or configs.architecture(device)[0]
        itemsize = configs.HI_LO if layout.precision == "highest" else layout.dtype.itemsize
        if layout.precision == "fp8" and kernel != "products":
            itemsize = 1
        return configs.tile(kernel, arch, itemsize, crowded)

    def _programs(self, device: torch.device) -> int:
        """Programs that fill the device a few times over."""
        return 4 * (configs.architecture(device)[1] if self.arch is None else 132)


BACKEND = Triton()
