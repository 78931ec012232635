"""Fast, exact, memory-linear DirectCLR / InfoNCE for PyTorch.

The public names load on first use, so ``import directclr_fast`` itself imports neither torch nor
triton, opens no device and needs no compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

_PUBLIC = {
    "fast_directclr_loss": "loss", "info_nce": "loss", "DirectCLRLoss": "loss", "LossStats": "loss",
    "last_backend": "dispatch", "collapse_report": "paper.spectrum",
    "CollapseReport": "paper.spectrum",
}  # fmt: skip

__all__ = [
    "CollapseReport", "DirectCLRLoss", "LossStats", "__version__", "collapse_report",
    "fast_directclr_loss", "info_nce", "last_backend",
]  # fmt: skip

if TYPE_CHECKING:
    from .dispatch import last_backend
    from .loss import DirectCLRLoss, LossStats, fast_directclr_loss, info_nce
    from .paper.spectrum import CollapseReport, collapse_report


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'directclr_fast' has no attribute {name!r}")
    try:
        module = importlib.import_module(f".{_PUBLIC[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("directclr_fast"):
            raise
        raise ImportError(
            f"directclr_fast is incomplete ({error.name} is missing): install it with "
            "'pip install .' from the project's folder"
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
