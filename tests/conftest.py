"""Shared fixtures: fresh memory is NaN in every test, so that output nobody wrote shows."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys

import interpreting
import numpy as np
import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# The suite may itself run under torchrun or a scheduler; no test is a rank of that job.
_JOB = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
for _name in [*os.environ]:
    if _name in _JOB or _name.startswith(("MASTER_", "TORCHELASTIC_")):
        del os.environ[_name]
# All processes of a test are on this machine, whose own name need not resolve: Gloo would ask.
_LOOPBACK = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
if _LOOPBACK:
    os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK.pop()
os.environ["MPLBACKEND"] = "agg"
# The processor's flags say which vectors Inductor may use; its trials take 6 s in each process.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# Of a home that cannot be written to, and of a font cache that takes long to build.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
if not torch.cuda.is_available():
    # Triton decides when it is imported; without a GPU there is nothing else it could do.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    # pytest-xdist's own marker, for runs without it.
    config.addinivalue_line("markers", "xdist_group(name): tests that share what is dear to make")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """torch.empty returns NaN (and the largest integers) while a test runs."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def one_thread():
    """Models this small gain nothing from threads and lose much where other work runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def inductor():
    """Skips where PyTorch's compiler finds no C++ compiler to call."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        pytest.skip(f"torch.compile needs a C++ compiler, got no {name}")


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
    original = interpreter._convert_float

    def convert(value, source, target, mode):
        if source.name == "fp32" and target.name in narrow:
            wide = torch.from_numpy(np.ascontiguousarray(value).reshape(-1))
            rounded = wide.to(narrow[target.name])
            bits = rounded.view(torch.int16 if target.name == "bf16" else torch.uint8).numpy()
            unsigned = np.uint16 if target.name == "bf16" else np.uint8
            return bits.view(unsigned).reshape(value.shape)
        return original(value, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    with interpreting.quicker():
        yield


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures: cat and dog, 10 of each."""
    image = pytest.importorskip("PIL.Image")
    noise = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "im" / name).mkdir(parents=True)
        for i in range(10):
            pixels = noise.integers(256, size=(10, 12, 3), dtype=np.uint8)
            image.fromarray(pixels).save(tmp_path / "im" / name / f"{i}.png")
    return tmp_path / "im"
