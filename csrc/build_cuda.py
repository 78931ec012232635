"""Builds `directclr_fast._cuda`, the Hopper kernels (csrc/cuda), with nvcc for sm_90a.

Wanted where nvcc and NVIDIA's driver are there, or where DIRECTCLR_FAST_CUDA=1 says so (to build a
wheel on a machine without a GPU); DIRECTCLR_FAST_CUDA=0 leaves it out. CUTLASS's headers come from
the package `nvidia-cutlass`, which csrc/backend.py asks for then, or from CUTLASS_PATH. The CUDA
runtime is linked in, so at run time nothing is needed beyond the driver.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUTLASS = "nvidia-cutlass==4.2.0.0"
TARGET = "-gencode=arch=compute_90a,code=sm_90a"
# NDEBUG: a device assert is a function call, at which ptxas would serialise wgmma.
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", TARGET, "--expt-relaxed-constexpr", "-Xptxas=-v"]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden"]
# Operand and schedule of the tile products that ship.
PRODUCTS = [
    ("Fp16", "Cooperative"),
    ("Fp16", "Pingpong"),
    ("Bf16", "Cooperative"),
    ("Bf16", "Pingpong"),
    ("E4m3", "Cooperative"),
]


def nvcc() -> str | None:
    """The compiler: of CUDA_HOME, otherwise the first on the path."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def cutlass() -> Path | None:
    """CUTLASS's include folder."""
    named = os.environ.get("CUTLASS_PATH")
    if named:
        return Path(named) / "include"
    found = importlib.util.find_spec("cutlass_library")
    if found is None:
        return None
    return Path(found.origin).parent / "source" / "include"


def wanted() -> bool:
    """Whether an installation builds the kernels."""
    asked = os.environ.get("DIRECTCLR_FAST_CUDA", "")
    if asked:
        return asked != "0"
    return nvcc() is not None and ctypes.util.find_library("cuda") is not None


def sources() -> list[str]:
    return ["csrc/cuda/bindings.cpp", "csrc/cuda/products.cpp", "csrc/cuda/rows.cu",
            "csrc/cuda/product.cu"]  # fmt: skip


def compiler() -> str:
    found = nvcc()
    if found is None:
        raise OSError("no nvcc on the path and none in CUDA_HOME")
    return found


def compile_commands(objects: Path) -> list[tuple[list[str], Path, Path]]:
    """(command, source, object) of each object file, the slow ones first."""
    import pybind11

    headers = cutlass()
    if headers is None or not (headers / "cutlass" / "cutlass.h").exists():
        raise OSError(f"CUTLASS's headers are missing, install {CUTLASS} or set CUTLASS_PATH")
    include = [f"-I{HERE / 'cuda'}", "-isystem", str(headers)]
    include += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    base = [compiler(), *FLAGS, *(f"-Xcompiler={flag}" for flag in HOST_FLAGS), *include]
    found = []
    for operand, kind in PRODUCTS:
        own = [f"-DDIRECTCLR_OPERAND={operand}", f"-DDIRECTCLR_KIND={kind}"]
        source = HERE / "cuda" / "product.cu"
        name = f"product_{operand}_{kind}".lower()
        found.append(([*base, *own, "-c", str(source)], source, objects / f"{name}.o"))
    for source in (HERE / "cuda" / "rows.cu", HERE / "cuda" / "products.cpp",
                   HERE / "cuda" / "bindings.cpp"):  # fmt: skip
        found.append(([*base, "-c", str(source)], source, objects / f"{source.stem}.o"))
    return found


def link_command() -> list[str]:
    return [compiler(), "-shared", TARGET, "-cudart", "static", "-Xlinker=--exclude-libs,ALL"]


def host_commands(output: Path, fragments: bool) -> list[list[str]]:
    """Builds `_cuda` with the kernels' functions run on the CPU (csrc/cuda/stages_host.cu), for
    tests; ``fragments`` adds a check against CUTLASS's own description of the accumulators."""
    import pybind11

    base = [compiler(), "-std=c++17", "-O2", "-DNDEBUG", TARGET, "--expt-relaxed-constexpr"]
    base += ["-diag-suppress", "20011,20014", *(f"-Xcompiler={flag}" for flag in HOST_FLAGS[:1])]
    base += [f"-I{HERE / 'cuda'}", f"-I{pybind11.get_include()}"]
    base += [f"-I{sysconfig.get_paths()['include']}"]
    if fragments:
        base += ["-DDIRECTCLR_CHECK_FRAGMENT", "-isystem", str(cutlass())]
    stages, binding = output.with_suffix(".stages.o"), output.with_suffix(".binding.o")
    return [
        [*base, "-c", str(HERE / "cuda" / "stages_host.cu"), "-o", str(stages)],
        [*base, "-c", str(HERE / "cuda" / "bindings.cpp"), "-o", str(binding)],
        [*link_command()[:-1], str(stages), str(binding), "-o", str(output)],
    ]
