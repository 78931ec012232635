"""Shared fixtures: fresh memory is NaN in every test, so that output nobody wrote shows."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    # Triton decides when it is imported; without a GPU there is nothing else it could do.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty returns NaN (and the largest integers) while a test runs."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def run_dir(tmp_path):
    """A folder for the runs of one test."""
    return tmp_path / "runs"


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's interpreter as tests of kernels want it.

    GPUs round to nearest where it cuts bits off (to bf16 and fp8). Its time goes by operations and
    not by elements, so programs take more rows.
    """
    import numpy as np

    interpreter = pytest.importorskip("triton.runtime.interpreter")
    from directclr_fast.kernels import finish, normalize

    for module in (finish, normalize):
        monkeypatch.setattr(module, "ROWS", 32)
    narrow = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}
    plain = interpreter._convert_float

    def convert(value, source, target, mode):
        if source.name == "fp32" and target.name in narrow:
            wide = torch.from_numpy(np.ascontiguousarray(value).reshape(-1))
            found = wide.to(narrow[target.name])
            bits = found.view(torch.int16 if target.name == "bf16" else torch.uint8).numpy()
            unsigned = np.uint16 if target.name == "bf16" else np.uint8
            return bits.view(unsigned).reshape(value.shape)
        return plain(value, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
