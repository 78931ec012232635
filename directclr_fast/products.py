"""How torch multiplies fp32 matrices: the one place that asks its switches, and that turns them.

The newer switches (``torch.backends.*.fp32_precision``) know what the older one was set to, which
raises once one of them says anything but "ieee".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def _switch(device_type: str):
    return torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul


def rounding(device_type: str) -> str | None:
    """What torch may round the operands of fp32 products to there: "tf32", "bf16" or None."""
    asked = _switch(device_type).fp32_precision
    return asked if asked in ("tf32", "bf16") else None


def may_round(device_type: str) -> bool:
    """Whether torch may round the operands of fp32 products there, to TF32 or bf16."""
    return rounding(device_type) is not None


@contextlib.contextmanager
def fp32_products(device_type: str, precision: str) -> Iterator[None]:
    """Sets it to "ieee" or "tf32" on a device, and back."""
    switch = _switch(device_type)
    before = switch.fp32_precision
    switch.fp32_precision = "none"
    if (
        switch.fp32_precision == before
    ):  # it followed torch.backends.fp32_precision, and shall again
        before = "none"
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before
