"""Compiles every Triton kernel a call would launch, for GPUs that need not be there, and reads the
binaries: registers, stack, shared memory, matrix instructions.

    python bench/triton_gate.py                                   # all architectures, a table
    python bench/triton_gate.py --arch sm_90 --out docs/triton-kernels.md

The launches are those of the backend itself, recorded instead of run, so what is checked is what
ships. Exit status 1 if a kernel spills, needs more shared memory than the chip has, or a tile
product lacks the chip's matrix instruction.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from directclr_fast.kernels import common, configs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from directclr_fast.backends import stages as driver
from directclr_fast.backends.triton import TritonStages
from directclr_fast.problem import Problem

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a half-precision tile product must be made of: warpgroup products on Hopper, the fifth
# generation's on data-centre Blackwell, matrix-core products on CDNA 3.
MATRIX = {
    "sm_80": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
MATRIX_FP8 = {"sm_89": "QMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA", "sm_120": "QMMA"}
PRODUCTS = ("_sums_kernel", "_weights_kernel", "_product_kernel")

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel: argument types, which are multiples of 16, constants."""

    module: str
    kernel: str
    types: tuple[str, ...]
    aligned: tuple[bool, ...]
    constants: tuple[tuple[str, object], ...]
    warps: int
    stages: int

    def label(self) -> str:
        """The constants that tell specialisations apart, in short."""
        named = dict(self.constants)
        text = [next((t for t in self.types if t[:2] in ("*f", "*b") or "tensor" in t), "")]
        sizes = [str(named[k]) for k in named if k.startswith("BLOCK_")]
        if sizes:
            text.append("x".join(sizes))
        text += [k.lower() for k, v in named.items() if v is True]
        text += [f"{k.lower()} {v}" for k, v in named.items() if k in ("D", "PITCH", "PRECISION")]
        return " ".join(text)


def recorded(arch: str) -> list[Launch]:
    """Every distinct launch of the backend over the options and widths that ship."""
    found: dict[Launch, None] = {}

    def record(kernel, grid, args, warps, stages, constants):
        types, aligned, fixed = [], [], dict(constants)
        for name, value, parameter in zip(kernel.arg_names, args, kernel.params):
            kind, multiple = _argument(value, not parameter.do_not_specialize)
            if kind == "constexpr":
                fixed[name] = value
            types.append(kind)
            aligned.append(multiple)
        types += ["constexpr"] * len(constants)
        aligned += [False] * len(constants)
        module = kernel.fn.__module__.rpartition(".")[2]
        entry = Launch(
            module, kernel.fn.__name__, tuple(types), tuple(aligned),
            tuple(sorted(fixed.items())), warps, stages,
        )  # fmt: skip
        found[entry] = None

    common.launch.recorder = record
    try:
        for options in cases(arch):
            _call(TritonStages(arch), **options)
    finally:
        common.launch.recorder = None
    return list(found)


def _argument(value, specialised: bool) -> tuple[str, bool]:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        shape = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_TYPES[value.base.dtype]}[{shape}]>", False
    if isinstance(value, int):
        if value == 1 and specialised:
            return "constexpr", False
        kind = "i32" if abs(value) < 2**31 else "i64"
        return kind, specialised and value % 16 == 0
    return "fp32", False


def cases(arch: str) -> list[dict]:
    """Calls that between them reach every kernel, option and tile of the table."""
    precisions = ["fp16", "bf16", "tf32", "highest"]
    if arch in MATRIX_FP8:
        precisions.append("fp8")
    found = [{"precision": precision} for precision in precisions]
    found += [{"precision": precision, "temperature": None} for precision in precisions]
    fp16 = [
        {"dim": 128, "width": 128},
        {"dim": 2048},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "reduction": "none"},
        {"temperature": 0.005},
        {"symmetric": False},
        {"symmetric": False, "temperature": None},
        {"gathered": True},
        {"gathered": True, "groups": 2},
        {"negatives": "both"},
        {"rows": 70_001, "candidates": 70_001, "temperature": None},
    ]
    return found + [{"precision": "fp16", **options} for options in fp16]


def _call(backend: TritonStages, **changes) -> None:
    given = {
        "rows": 4096,
        "candidates": 4096,
        "width": 2048,
        "dim": 360,
        "dtype": torch.float32,
        "device_type": "cuda",
        "temperature": 0.1,
        "keep": True,
    }
    problem = Problem(**(given | changes))
    # No row is ever read: one row of memory, seen N times.
    r1, r2 = (
        torch.zeros(1, problem.width, dtype=problem.dtype).expand(rows, -1)
        for rows in (problem.rows, problem.candidates)
    )
    columns = None
    if problem.gathered:
        columns = torch.arange(problem.dim).repeat(problem.groups, 1)
    scale = torch.tensor(10.0) if problem.temperature is None else 1 / problem.temperature
    need = (True, True, problem.temperature is None)
    loss, saved = driver.forward(backend, problem, r1, r2, columns, scale)
    driver.backward(backend, problem, torch.ones_like(loss), saved, columns, scale, need)


def compiled(work: tuple[Launch, str]) -> dict:
    """One row of the table."""
    entry, arch = work
    module = __import__(f"directclr_fast.kernels.{entry.module}", fromlist=["x"])
    kernel = getattr(module, entry.kernel)
    constants = dict(entry.constants)
    signature = dict(zip(kernel.arg_names, entry.types))
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, aligned in enumerate(entry.aligned) if aligned
    }
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": entry.warps, "num_stages": entry.stages, "enable_fp_fusion": True}
    row = {"arch": arch, "kernel": entry.kernel, "what": entry.label()}
    try:
        binary = triton.compile(source, target=TARGETS[arch], options=options)
    except Exception as error:  # one kernel that does not compile is a row of the table
        return row | {"problems": [f"does not compile: {str(error).splitlines()[0]}"]}
    row |= {"warps": entry.warps, "stages": entry.stages, "shared": binary.metadata.shared}
    row |= _amd(binary) if arch.startswith("gfx") else _nvidia(binary)
    row["problems"] = _problems(row, entry, arch)
    return row


def _nvidia(binary) -> dict:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            command = [str(tool), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("--dump-resource-usage"), dump("-sass")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "matrix": sorted(set(re.findall(r"\b(\w*(?:HGMMA|QGMMA|UTC\wMMA|HMMA|QMMA))\b", sass))),
    }


def _amd(binary) -> dict:
    text = binary.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count"),
        "matrix": sorted(set(re.findall(r"\b(v_mfma)", text))),
    }


def _problems(row: dict, entry: Launch, arch: str) -> list[str]:
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"spills: {row['spills']} instructions, {row['stack']} bytes of stack")
    if row["shared"] > configs.SHARED_BYTES[arch]:
        found.append(f"shared memory {row['shared']} of {configs.SHARED_BYTES[arch]} bytes")
    if entry.kernel in PRODUCTS and dict(entry.constants)["PRECISION"] == "ieee":
        operands = " ".join(entry.types[:2])
        wanted = MATRIX_FP8[arch] if "fp8" in operands else MATRIX[arch]
        if "fp32" not in operands and wanted not in row["matrix"]:
            found.append(f"no {wanted} among {row['matrix']}")
    return found


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| arch | kernel | specialisation | warps | stages | registers | stack | shared, KiB "
        "| matrix instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "registers" not in row:
            lines.append(f"| {row['arch']} | {row['kernel']} | {row['what']} | {row['problems']} |")
            continue
        lines.append(
            f"| {row['arch']} | {row['kernel'].strip('_').removesuffix('_kernel')} | {row['what']} "
            f"| {row['warps']} | {row['stages']} | {row['registers']} | {row['stack']} "
            f"| {row['shared'] / 1024:.0f} | {' '.join(row['matrix'])} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints the table and every problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--kernel", nargs="+", help="only these (sums, weights, ...)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--out", help="write the table here, under its own heading")
    arguments = parser.parse_args(argv)
    work = [(entry, arch) for arch in arguments.arch for entry in recorded(arch)]
    if arguments.kernel:
        names = {f"_{name}_kernel" for name in arguments.kernel}
        work = [(entry, arch) for entry, arch in work if entry.kernel in names]
    with ProcessPoolExecutor(arguments.workers) as pool:
        rows = list(pool.map(compiled, work, chunksize=4))
    print(table(rows))
    bad = [row for row in rows if row["problems"]]
    for row in bad:
        print(f"{row['arch']} {row['kernel']} {row['what']}: {'; '.join(row['problems'])}")
    print(f"{len(rows)} kernels for {', '.join(arguments.arch)}, {len(bad)} with problems")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.out:
        head = (
            "# Triton kernels, compiled\n\nWhat the compiler made of every kernel that ships, read "
            f"off the binaries\n(Triton {triton.__version__}; no GPU is needed). Written by "
            "`python bench/triton_gate.py --out docs/triton-kernels.md`.\n\n"
        )
        Path(arguments.out).write_text(head + table(rows) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
