"""Builds the extensions of directclr_fast, and is the build backend that pyproject.toml names.

    _cpu    csrc/cpu with a C++17 compiler (gcc, clang): an object for each instruction set
    _cuda   csrc/cuda, the Hopper kernels, with nvcc for sm_90a and CUTLASS's headers

Needs pybind11; ninja, if there is one, makes rebuilds incremental. The package installs without an
extension that cannot be built, with one warning; DIRECTCLR_FAST_REQUIRE_EXT=1 makes that an error.

``_cuda`` is wanted where nvcc and NVIDIA's driver are, or where DIRECTCLR_FAST_CUDA=1 says so (to
build a wheel on a machine without a GPU); DIRECTCLR_FAST_CUDA=0 leaves it out. Then the backend
asks for the package ``nvidia-cutlass`` as well, unless CUTLASS_PATH names the headers.

    python csrc/build.py FOLDER [cpu | cuda]      # by hand; CXXFLAGS and LDFLAGS count for cpu
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, build_meta
from setuptools.build_meta import *  # noqa: F403
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent


class Object(NamedTuple):
    """One object file."""

    command: list[str]  # without its output
    source: Path
    target: Path


class Recipe:
    """How an extension is built from a folder of csrc/. Tools are looked for when they are used."""

    jobs = 4  # compilers at once, where there are so many cores

    @property
    def name(self) -> str:
        return f"_{self.folder}"

    def extension(self) -> Extension:
        folder = HERE / self.folder
        headers = [path for path in folder.iterdir() if path.suffix in (".h", ".cuh")]
        return Extension(
            f"directclr_fast.{self.name}",
            [_from_root(folder / source) for source in self.sources()],
            depends=sorted(map(_from_root, headers)),
        )

    def build(self, output: Path, objects: Path, jobs: int | None = None) -> None:
        """Compiles and links to ``output``; raises CalledProcessError, ImportError or OSError."""
        objects.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        jobs = jobs or min(os.cpu_count() or 1, self.jobs)
        make(self.compile_commands(objects), self.link_command(), output, objects, jobs)


def _from_root(path: Path) -> str:
    return str(path.relative_to(HERE.parent))


def _python_headers() -> list[str]:
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]


# ------------------------------------------------------------------------------- the CPU


class Cpu(Recipe):
    """One binary with a body for each instruction set, of which the processor's best runs."""

    folder = "cpu"
    without = (
        "directclr_fast is installed without its compiled CPU kernels ({error}); it works, on the "
        "slower PyTorch path. A C++17 compiler (gcc 12, clang 14 or later) and pybind11 are "
        "needed; set DIRECTCLR_FAST_REQUIRE_EXT=1 to make this an error."
    )
    # No -ffast-math anywhere: NaN must reach the loss. Products and sums contract to fused ones.
    flags = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fno-math-errno", "-ffp-contract=fast",
             "-DNDEBUG", "-Wall", "-Wextra", "-Wno-ignored-attributes"]  # fmt: skip
    # gcc 12 takes its own AVX-512 headers' undefined registers for mistakes (gcc bug 105593).
    gcc_flags = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    avx2 = ["-mavx2", "-mfma"]
    avx512 = [*avx2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    # Flags by source. Everything but the bodies is compiled for the baseline of the platform.
    baseline = {"bindings.cpp": ["-fvisibility=hidden"], "isa.cpp": [], "stages.cpp": [],
                "step.cpp": [], "body_portable.cpp": [], "body_tiles.cpp": []}  # fmt: skip
    x86 = {"body_avx2.cpp": avx2, "body_avx512.cpp": avx512,
           "body_avx512_bf16.cpp": [*avx512, "-mavx512bf16"],
           "body_tiles_avx512.cpp": avx512,
           "body_amx.cpp": [*avx512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"]}  # fmt: skip

    def _flags_by_source(self) -> dict[str, list[str]]:
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        return {**self.baseline, **(self.x86 if is_x86 else {})}

    def sources(self) -> list[str]:
        """File names in the folder."""
        return list(self._flags_by_source())

    def compiler(self) -> list[str]:
        named = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
        command = shlex.split(named)
        if shutil.which(command[0]) is None:
            command = [next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), command[0])]
        return command

    def compile_commands(self, objects: Path) -> list[Object]:
        """The object files, the slow ones first."""
        compiler = self.compiler()
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
        base = [*compiler, *_python_headers(), *self.flags]
        base += [] if "clang" in version else self.gcc_flags
        base += shlex.split(os.environ.get("CXXFLAGS", ""))
        commands = []
        for name, own in self._flags_by_source().items():
            source = HERE / self.folder / name
            command = [*base, *own, "-c", str(source)]
            commands.append(Object(command, source, objects / f"{source.stem}.o"))
        return commands

    def link_command(self) -> list[str]:
        """All of it but the objects and the output."""
        mac = ["-bundle", "-undefined", "dynamic_lookup"]
        shared = mac if sys.platform == "darwin" else ["-shared"]
        return [*self.compiler(), *shared, "-pthread", *shlex.split(os.environ.get("LDFLAGS", ""))]


# ------------------------------------------------------------------------------- Hopper


class Cuda(Recipe):
    """The CUDA runtime is linked in, so at run time nothing is needed beyond the driver."""

    folder = "cuda"
    jobs = 8  # each takes some 1.5 GiB
    without = (
        "directclr_fast is installed without its Hopper kernels ({error}); GPUs take the Triton "
        "kernels. nvcc 12.4 or later and CUTLASS are needed; DIRECTCLR_FAST_CUDA=0 leaves them "
        "out in silence."
    )
    cutlass_package = "nvidia-cutlass==4.2.0.0"
    target = "-gencode=arch=compute_90a,code=sm_90a"
    # NDEBUG: a device assert is a function call, at which ptxas would serialise wgmma.
    flags = ["-std=c++17", "-DNDEBUG", target, "--expt-relaxed-constexpr", "-Xcompiler=-fPIC"]
    # Operand and schedule of the tile products that ship.
    instantiations = [("Fp16", "Cooperative"), ("Fp16", "Pingpong"), ("Bf16", "Cooperative"),
                      ("Bf16", "Pingpong"), ("E4m3", "Cooperative"),
                      ("Split", "Cooperative")]  # fmt: skip

    def wanted(self) -> bool:
        """Whether an installation builds the kernels."""
        asked = os.environ.get("DIRECTCLR_FAST_CUDA", "")
        if asked:
            return asked != "0"
        return self.nvcc() is not None and ctypes.util.find_library("cuda") is not None

    def nvcc(self) -> str | None:
        """The compiler: of CUDA_HOME, otherwise the first on the path."""
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")

    def compiler(self) -> str:
        nvcc = self.nvcc()
        if nvcc is None:
            raise OSError("no nvcc on the path and none in CUDA_HOME")
        return nvcc

    def cutlass(self) -> Path | None:
        """CUTLASS's include folder."""
        named = os.environ.get("CUTLASS_PATH")
        if named:
            return Path(named) / "include"
        package = importlib.util.find_spec("cutlass_library")
        return None if package is None else Path(package.origin).parent / "source" / "include"

    def sources(self) -> list[str]:
        return ["similarity.cu", "rows.cu", "similarity.cpp", "bindings.cpp"]

    def compile_commands(self, objects: Path) -> list[Object]:
        headers = self.cutlass()
        if headers is None or not (headers / "cutlass" / "cutlass.h").exists():
            package = self.cutlass_package
            raise OSError(f"CUTLASS's headers are missing, install {package} or set CUTLASS_PATH")
        base = [self.compiler(), *self.flags, "-O3", "-Xptxas=-v", "-Xcompiler=-fvisibility=hidden"]
        base += ["-isystem", str(headers), *_python_headers()]
        similarity, *others = (HERE / self.folder / name for name in self.sources())
        commands = []
        for operand, kind in self.instantiations:
            own = [f"-DDIRECTCLR_OPERAND={operand}", f"-DDIRECTCLR_KIND={kind}"]
            target = objects / f"{similarity.stem}_{operand}_{kind}.o".lower()
            commands.append(Object([*base, *own, "-c", str(similarity)], similarity, target))
        for source in others:
            command = [*base, "-c", str(source)]
            commands.append(Object(command, source, objects / f"{source.stem}.o"))
        return commands

    def link_command(self) -> list[str]:
        static = ["-cudart", "static", "-Xlinker=--exclude-libs,ALL"]
        return [self.compiler(), "-shared", self.target, *static]


CPU, CUDA = Cpu(), Cuda()


# ------------------------------------------------------------------------------- compiling


def make(commands: list[Object], link: list[str], output: Path, objects: Path, jobs: int) -> None:
    """Runs the compile commands, only those that are out of date if there is ninja, and links."""
    targets = [str(target) for _, _, target in commands]
    tool = ninja()
    if tool is None:
        with ThreadPoolExecutor(jobs) as pool:
            run = lambda c: subprocess.run([*c.command, "-o", str(c.target)], check=True)  # noqa: E731
            list(pool.map(run, commands))
        subprocess.run([*link, *targets, "-o", str(output)], check=True)
        return

    def escape(path: str | Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule cxx", "  command = $cmd -MMD -MF $out.d -o $out"]
    lines += ["  depfile = $out.d", "  deps = gcc", "rule link", "  command = $cmd $in -o $out"]
    for command, source, target in commands:
        lines.append(f"build {escape(target)}: cxx {escape(source)}")
        lines.append("  cmd = " + shlex.join(command).replace("$", "$$"))
    lines.append(f"build {escape(output)}: link " + " ".join(map(escape, targets)))
    lines.append("  cmd = " + shlex.join(link).replace("$", "$$"))
    (objects / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([tool, "-C", str(objects), "-j", str(jobs)], check=True)


def ninja() -> str | None:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


# ------------------------------------------------------------------------------- setuptools


def extensions() -> list[Extension]:
    """What setup.py installs: ``ext_modules=extensions(), cmdclass={"build_ext": BuildExt}``."""
    return [recipe.extension() for recipe in (CPU, CUDA) if recipe is CPU or CUDA.wanted()]


class BuildExt(build_ext):
    """Builds each extension by its recipe; a failure is a warning unless required."""

    def build_extension(self, ext: Extension) -> None:
        recipe = CUDA if ext.name.endswith(CUDA.name) else CPU
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve() / f"directclr_fast_{recipe.folder}"
        try:
            recipe.build(output, objects, jobs=self.parallel)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("DIRECTCLR_FAST_REQUIRE_EXT", "0") not in ("", "0"):
                raise
            ext.optional = True
            self.warn(recipe.without.format(error=error))


def _with_headers(requirements: list[str]) -> list[str]:
    needed = CUDA.wanted() and CUDA.cutlass() is None
    return [*requirements, CUDA.cutlass_package] if needed else requirements


def get_requires_for_build_wheel(config_settings=None):
    return _with_headers(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_headers(build_meta.get_requires_for_build_editable(config_settings))


if __name__ == "__main__":
    folder, recipe = Path(sys.argv[1]).resolve(), CUDA if sys.argv[2:] == ["cuda"] else CPU
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    recipe.build(folder / f"{recipe.name}{suffix}", folder / f"objects{recipe.name}")
