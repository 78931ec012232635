"""Builds `directclr_fast._cpu`, one object per instruction set, chosen at run time, and, where it
is wanted, `directclr_fast._cuda` (build_cuda.py).

Used from setup.py as `ext_modules=extensions(), cmdclass={"build_ext": BuildExt}`. Needs pybind11
and a C++17 compiler (gcc or clang); ninja, if there is one, makes rebuilds incremental. Without a
working compiler the package installs all the same, with one warning;
DIRECTCLR_FAST_REQUIRE_EXT=1 makes that an error.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import build_cuda  # noqa: E402

AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]

# Flags by source. Everything but the bodies is compiled for the baseline of the platform.
COMMON = {
    "csrc/cpu/bindings.cpp": ["-fvisibility=hidden"],
    "csrc/cpu/isa.cpp": [],
    "csrc/cpu/stages.cpp": [],
    "csrc/cpu/body_portable.cpp": [],
}
X86 = {
    "csrc/cpu/body_avx2.cpp": AVX2,
    "csrc/cpu/body_avx512.cpp": AVX512,
    "csrc/cpu/body_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
}
# No -ffast-math anywhere: NaN must reach the loss. Products and sums contract to fused ones.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-DNDEBUG",
]
WARNINGS = ["-Wall", "-Wextra", "-Wno-ignored-attributes"]
# gcc 12 takes its own AVX-512 headers' undefined registers for mistakes (gcc bug 105593).
GCC_WARNINGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]


def sources() -> dict[str, list[str]]:
    """Each source of this platform with its own flags."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return {**COMMON, **(X86 if x86 else {})}


def extensions() -> list[Extension]:
    headers = sorted(str(h.relative_to(HERE.parent)) for h in HERE.glob("*/*.h"))
    found = [Extension("directclr_fast._cpu", list(sources()), depends=headers)]
    if build_cuda.wanted():
        headers += sorted(str(h.relative_to(HERE.parent)) for h in HERE.glob("*/*.cuh"))
        found.append(Extension("directclr_fast._cuda", build_cuda.sources(), depends=headers))
    return found


def compiler() -> list[str]:
    named = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    command = shlex.split(named)
    if shutil.which(command[0]) is None:
        command = [next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), command[0])]
    return command


def ninja() -> str | None:
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def compile_commands(objects: Path, extra: list[str]) -> list[tuple[list[str], Path, Path]]:
    """(command, source, object) for each source."""
    import pybind11

    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    flags = [*FLAGS, *WARNINGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *extra]
    is_clang = (
        "clang" in subprocess.run([*compiler(), "--version"], capture_output=True, text=True).stdout
    )
    if not is_clang:
        flags += GCC_WARNINGS
    commands = []
    for source, own in sources().items():
        path, target = HERE.parent / source, objects / (Path(source).stem + ".o")
        commands.append(([*compiler(), *include, *flags, *own, "-c", str(path)], path, target))
    return commands


def build(
    output: Path, objects: Path, extra: list[str] | None = None, jobs: int | None = None
) -> None:
    """Compiles and links the module to `output`; raises CalledProcessError or OSError."""
    objects.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    jobs = jobs or min(os.cpu_count() or 1, 4)
    extra = extra or []
    commands = compile_commands(objects, extra)
    shared = (
        ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    )
    link = [*compiler(), *shared, "-pthread", *extra, *shlex.split(os.environ.get("LDFLAGS", ""))]
    make(commands, link, output, objects, jobs)


def make(
    commands: list[tuple[list[str], Path, Path]],
    link: list[str],
    output: Path,
    objects: Path,
    jobs: int,
) -> None:
    """Runs the compile commands, only those that are out of date if there is ninja, and links."""
    targets = [str(target) for _, _, target in commands]
    tool = ninja()
    if tool is None:
        with ThreadPoolExecutor(jobs) as pool:
            run = lambda c: subprocess.run([*c[0], "-o", str(c[2])], check=True)  # noqa: E731
            list(pool.map(run, commands))
        subprocess.run([*link, *targets, "-o", str(output)], check=True)
        return

    def escape(path: str | Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "rule cxx",
        "  command = $cmd -MMD -MF $out.d -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    lines += ["rule link", "  command = $cmd $in -o $out"]
    for command, source, target in commands:
        lines.append(f"build {escape(target)}: cxx {escape(source)}")
        lines.append("  cmd = " + shlex.join(command).replace("$", "$$"))
    lines.append(f"build {escape(output)}: link " + " ".join(map(escape, targets)))
    lines.append("  cmd = " + shlex.join(link).replace("$", "$$"))
    (objects / "build.ninja").write_text("\n".join(lines) + "\n")
    subprocess.run([tool, "-C", str(objects), "-j", str(jobs)], check=True)


def build_hopper(output: Path, objects: Path, jobs: int | None = None) -> None:
    """Compiles and links `_cuda` to `output`; raises CalledProcessError or OSError."""
    objects.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    commands = build_cuda.compile_commands(objects)
    # Each takes some 1.5 GiB.
    make(commands, build_cuda.link_command(), output, objects, jobs or min(os.cpu_count() or 1, 8))


class BuildExt(build_ext):
    """Compiles with the flags of each source; a failure is a warning unless required."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        kind = ext.name.rpartition("_")[2]
        objects = Path(self.build_temp).resolve() / f"directclr_fast_{kind}"
        try:
            (build_hopper if kind == "cuda" else build)(output, objects, jobs=self.parallel)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            if os.environ.get("DIRECTCLR_FAST_REQUIRE_EXT", "0") not in ("", "0"):
                raise
            ext.optional = True
            if kind == "cuda":
                self.warn(
                    f"directclr_fast is installed without its Hopper kernels ({error}); GPUs take "
                    "the Triton kernels. nvcc 12.4 or later and CUTLASS are needed; "
                    "DIRECTCLR_FAST_CUDA=0 leaves them out in silence."
                )
                return
            self.warn(
                f"directclr_fast is installed without its compiled CPU kernels ({error}); it "
                "works, on the slower PyTorch path. A C++17 compiler (gcc 12, clang 14 or later) "
                "and pybind11 are needed; set DIRECTCLR_FAST_REQUIRE_EXT=1 to make this an error."
            )


if __name__ == "__main__":  # python csrc/build.py FOLDER [compiler flags]: builds FOLDER/_cpu.*.so
    folder = Path(sys.argv[1]).resolve()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if sys.argv[2:] == ["cuda"]:  # python csrc/build.py FOLDER cuda
        build_hopper(folder / f"_cuda{suffix}", folder / "objects_cuda")
    else:
        build(folder / f"_cpu{suffix}", folder / "objects", sys.argv[2:])
