"""Compiles every Triton kernel a call would launch, for GPUs that need not be there, and reads the
binaries: registers, stack, shared memory, matrix instructions.

    python tests/gates/triton_kernels.py                      # what is not in the record, a summary
    python tests/gates/triton_kernels.py --anew --arch sm_90  # everything again, without the record
    python tests/gates/triton_kernels.py --triton 3.6.0 3.9.0 --write --out docs/triton-kernels.md
    python tests/gates/triton_kernels.py --fill FOLDER --arch sm_90  # a cache for such a GPU

The launches are those of the backend itself, recorded instead of run, and each is compiled as
Triton's JIT asks for it, under the same key of its cache: what is checked is what ships. Exit
status 1 if a kernel spills, needs more shared memory than the chip has, or a tile product lacks the
chip's matrix instruction.

A compiler is a function of its input, so a kernel that was judged once need not be compiled again:
the record (bench/results/triton_gate.json) holds what each Triton made of each launch, under a key
of the kernel's code, the launch and the architecture. A change of a kernel, a tile or an option
changes the key. ``--recheck`` compiles some of the recorded ones again and compares.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import triton
from directclr_fast.kernels import common, configs
from triton.backends.compiler import GPUTarget

from directclr_fast import driver
from directclr_fast.backends.triton import Triton
from directclr_fast.problem import Problem
from directclr_fast.world import ALONE

if __package__:
    from . import sanitize
else:
    import sanitize

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "bench/results/triton_gate.json"
READ = ("shared", "registers", "stack", "spills", "matrix")  # what a binary tells

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


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel as Triton's JIT makes it: arguments' types, what is known of
    them (multiples of 16), constants. ``told`` is its own record of that, to be compiled from."""

    module: str
    kernel: str
    types: tuple[str, ...]
    known: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    warps: int
    stages: int
    told: str = field(default="", compare=False, repr=False)

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

    def key(self, arch: str) -> str:
        """Names everything the binary depends on but the compiler."""
        parts = (code_of(self.module, self.kernel), repr(self), arch)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@cache
def definitions(module: str) -> dict[str, ast.stmt]:
    """Top-level functions and constants of ``kernels/<module>.py``, without docstrings."""
    named = {}
    for node in ast.parse((ROOT / "kernels" / f"{module}.py").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node):
                del node.body[0]
            named[node.name] = node
        elif isinstance(node, ast.Assign):
            names = [n.id for target in node.targets for n in ast.walk(target) if hasattr(n, "id")]
            named |= dict.fromkeys(names, node)
    return named


def form(node) -> str:
    """``ast.dump`` in a spelling on which all Pythons agree: they differ in what is empty."""
    if isinstance(node, list):
        return f"[{', '.join(map(form, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{k}={form(v)}" for k, v in ast.iter_fields(node) if v is not None and v != []]
    return f"{type(node).__name__}({', '.join(fields)})"


@cache
def code_of(module: str, kernel: str) -> str:
    """The code of a kernel and of everything it reaches in its module and those it imports from."""
    known = definitions("layout") | definitions("common") | definitions(module)
    reached, new = {}, [kernel]
    while new:
        name = new.pop()
        if name in known and name not in reached:
            reached[name] = form(known[name])
            new += [node.id for node in ast.walk(known[name]) if isinstance(node, ast.Name)]
    return "\n".join(reached[name] for name in sorted(reached))


class _Elsewhere:
    """The driver of a GPU that is not here: Triton compiles for it and launches nothing. Every
    architecture is a device of its own, since the JIT keeps a target for each."""

    def __init__(self, arch: str) -> None:
        self.device, self.target = list(TARGETS).index(arch), TARGETS[arch]

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def warm(kernel, grid, args, options):
    """What a launch does before it runs; a recorder of launches."""
    return kernel.warmup(*args, grid=grid, **options)


def recorded(arch: str, calls: list[dict] | None = None) -> list[Launch]:
    """Every distinct specialisation that the JIT asks for in ``calls``, by default those over the
    options and widths that ship; nothing is compiled."""
    launches: dict[Launch, None] = {}

    def noted(fn, compile, **_) -> bool:
        names = fn.jit_function.arg_names
        attributes = compile["configs"][0]
        entry = Launch(
            fn.module.rpartition(".")[2], fn.name, tuple(compile["signature"].values()),
            tuple((names[place], repr(v)) for (place,), v in sorted(attributes.items()) if v),
            tuple(sorted((names[place], v) for (place,), v in compile["constants"].items())),
            compile["num_warps"], compile["num_stages"], compile["specialization_data"],
        )  # fmt: skip
        launches[entry] = None
        return True

    triton.runtime.driver.set_active(_Elsewhere(arch))
    triton.knobs.runtime.jit_cache_hook, common.launch.recorder = noted, warm
    try:
        for options in cases(arch) if calls is None else calls:
            _call(Triton(arch), **options)
    finally:
        triton.knobs.runtime.jit_cache_hook = common.launch.recorder = None
    return list(launches)


def cases(arch: str) -> list[dict]:
    """Calls that between them reach every kernel, option and tile of the table."""
    precisions = ["fp16", "bf16", "tf32", "highest"]
    if arch in MATRIX_FP8:
        precisions.append("fp8")
    calls = [{"precision": precision} for precision in precisions]
    calls += [{"precision": precision, "temperature": None} for precision in precisions]
    calls += [{**options, "return_stats": True} for options in calls]
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
        {"negatives": "both", "return_stats": True},
        {"labelled": True, "same_label": "ignore"},
        {"labelled": True, "same_label": "ignore", "negatives": "both", "temperature": None},
        {"symmetric": False, "return_stats": True},
        {"rows": 70_001, "candidates": 70_001, "temperature": None},
    ]
    return calls + [{"precision": "fp16", **options} for options in fp16]


def first_minutes() -> list[dict]:
    """What the three calls of bench/Makefile run: smoke test, launches, tests, benchmark."""
    fp32, half = ("fp16", "bf16", "tf32", "highest", "fp8"), (torch.bfloat16, torch.float16)
    options = [
        {}, {"negatives": "both"}, {"symmetric": False, "reduction": "none"},
        {"temperature": 0.005}, {"temperature": None}, {"gathered": True, "groups": 3},
        {"workspace_bytes": 2**16},
    ]  # fmt: skip
    smoke = [
        {"rows": rows, "width": sanitize.WIDTH, "dim": dim, "precision": precision, **more}
        for (rows, dim), precisions in (*sanitize.FEW, *sanitize.TILES)
        for precision in precisions
        for more in options
    ]
    tests = [
        {"rows": rows, "width": width, "dim": dim, "precision": precision}
        for rows, width, dim in (*sanitize.TESTED, (2048, 360, 360), (4096, 360, 360))
        for precision in fp32
    ]
    tests += [
        {"rows": 700, "width": 512, "dtype": dtype, "precision": precision, **other, **more}
        for dtype, precision in ((torch.float32, "highest"), *((dtype, "fp16") for dtype in half))
        for other in ({}, {"negatives": "both"}, {"symmetric": False})
        for more in (*options[2:5], {"gathered": True, "groups": 3, "dim": 100})
    ]
    # Several super-blocks, and several strips.
    bench = [{"width": d, "dim": d, "precision": "fp16"} for d in (128, 256, 360, 768)]
    bench += [
        {"dim": d, "dtype": dtype, "precision": precision}
        for d in (128, 256, 360, 768, 2048)
        for dtype, several in ((half[0], ("fp16", "bf16", "fp8")), (torch.float32, fp32[2:4]))
        for precision in several
    ]
    bench = [call | {"rows": rows} for rows in (4096, 16_384) for call in bench]
    bench.append({"rows": 70_001, "width": 360, "dtype": half[0], "precision": "fp16"})
    return [{"candidates": call["rows"], **call} for call in smoke + tests + bench]


def fill(folder: str, arch: str, workers: int) -> int:
    """Puts into ``folder``, a TRITON_CACHE_DIR, what Triton itself would compile for the calls of
    :func:`cases` and :func:`first_minutes` on a GPU of ``arch``; the number of kernels there."""
    os.environ["TRITON_CACHE_DIR"] = str(Path(folder).resolve())
    calls = cases(arch) + first_minutes()
    with ProcessPoolExecutor(workers) as pool:
        return len(set(pool.map(binary_hash, [(e, arch) for e in recorded(arch, calls)])))


def _call(backend: Triton, **changes) -> None:
    given = {
        "rows": 4096,
        "candidates": 4096,
        "width": 2048,
        "dim": 360,
        "dtype": torch.float32,
        "device_type": "cuda",
        "temperature": 0.1,
        "differentiable": True,
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
    labels = torch.arange(problem.candidates) // 2 if problem.labelled else None
    loss, states, _ = driver.forward(backend, problem, ALONE, r1, r2, columns, scale, labels)
    upstream = torch.ones_like(loss)
    driver.backward(backend, problem, ALONE, upstream, states, columns, scale, need, labels)


def binary_of(entry: Launch, arch: str):
    """What the JIT would compile for a launch, compiled, or found in its cache."""
    triton.runtime.driver.set_active(_Elsewhere(arch))
    module = importlib.import_module(f"directclr_fast.kernels.{entry.module}")
    return getattr(module, entry.kernel).preload(entry.told)


def binary_hash(work: tuple[Launch, str]) -> str:
    """Under which the JIT finds it again."""
    return binary_of(*work).hash


def compiled(work: tuple[Launch, str]) -> dict:
    """What the binary of one launch tells (:data:`READ`), or the error."""
    entry, arch = work
    try:
        binary = binary_of(entry, arch)
    except Exception as error:  # one kernel that does not compile is a row of the table
        return {"error": f"does not compile: {str(error).splitlines()[0]}"}
    read = _amd(binary) if arch.startswith("gfx") else _nvidia(binary)
    return {"shared": binary.metadata.shared} | read


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
    if "error" in row:
        return [row["error"]]
    problems = []
    if row["spills"] or row["stack"]:
        problems.append(f"spills: {row['spills']} instructions, {row['stack']} bytes of stack")
    if row["shared"] > configs.SHARED_BYTES[arch]:
        problems.append(f"shared memory {row['shared']} of {configs.SHARED_BYTES[arch]} bytes")
    if entry.kernel in PRODUCTS:
        operands = " ".join(entry.types[:2])
        wanted = MATRIX_FP8[arch] if "fp8" in operands else MATRIX[arch]
        if "fp32" not in operands and wanted not in row["matrix"]:
            problems.append(f"no {wanted} among {row['matrix']}")
    return problems


def judged(work: list, record: dict, workers: int, anew: bool, recheck: int) -> list[dict]:
    """A row for each (launch, architecture): from the record, else compiled and put into it."""
    keys = [entry.key(arch) for entry, arch in work]
    fresh = [i for i, key in enumerate(keys) if anew or key not in record]
    again = sorted((i for i, key in enumerate(keys) if i not in set(fresh)), key=keys.__getitem__)
    again = again[:recheck]
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(compiled, [work[i] for i in fresh + again], chunksize=1)
        results = dict(zip(fresh + again, results))
    rows = []
    for i, ((entry, arch), key) in enumerate(zip(work, keys)):
        row = {"arch": arch, "kernel": entry.kernel, "what": entry.label(), "key": key}
        row |= {"warps": entry.warps, "stages": entry.stages, "compiled": i in results}
        values = results.get(i) or dict(zip(READ, record[key]))
        row |= values | {"problems": _problems(values, entry, arch)}
        if i in again and [values.get(name) for name in READ] != record[key]:
            row["problems"].append(f"the record says {record[key]}, the compiler {values}")
        rows.append(row)
    return rows


def summary(version: str, rows: list[dict]) -> list[str]:
    """Lines of the table for one Triton."""
    lines = []
    for arch in dict.fromkeys(row["arch"] for row in rows):
        of = [row for row in rows if row["arch"] == arch]
        whole = [row for row in of if "error" not in row]
        most = max(whole, key=lambda row: row["shared"])
        products = [row["registers"] for row in whole if row["kernel"] in PRODUCTS]
        matrix = sorted({name for row in whole for name in row["matrix"]})
        lines.append(
            f"| {version} | {arch} | {len(of)} | {max(products)} | "
            f"{most['shared'] / 1024:.0f} of {configs.SHARED_BYTES[arch] / 1024:.0f} | "
            f"{sum(bool(row['spills'] or row['stack']) for row in whole)} | "
            f"{sum(bool(row['problems']) for row in of)} | {' '.join(matrix)} |"
        )
    return lines


PAGE = """# Triton kernels, compiled

What Triton makes of every kernel that ships, compiled as its JIT would for a call and read off the
binaries; no GPU is needed. There are rows for each Triton that has judged all of today's kernels
(PyTorch 2.11 brings 3.6, 2.12 and 2.13 bring 3.7, 2.14 brings 3.8, 2.15 brings 3.9). Every single
kernel, with its registers, stack, shared memory and matrix instructions, is in
[bench/results/triton_gate.json](../bench/results/triton_gate.json);
`python tests/gates/triton_kernels.py --list` prints those of the installed Triton as a table.

| Triton | architecture | kernels | most registers, tile products | most shared memory, KiB | spill | with problems | matrix instructions |
|---|---|---|---|---|---|---|---|
"""  # noqa: E501


def other_triton(version: str) -> Path:
    """A folder that holds that Triton, to stand before the installed one."""
    folder = ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*command, str(folder), f"triton=={version}"], check=True)
    return folder


def main(argv: list[str] | None = None) -> int:
    """Judges every launch, prints a summary and every problem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--kernel", nargs="+", help="only these (sums, weights, ...)")
    parser.add_argument("--triton", nargs="+", help="versions to judge instead of the installed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--anew", action="store_true", help="compile what the record has, too")
    parser.add_argument("--recheck", type=int, default=0, help="recorded ones to compile again")
    parser.add_argument("--write", action="store_true", help="put what was compiled on record")
    parser.add_argument("--list", action="store_true", help="print a line for each kernel")
    parser.add_argument("--json", help="write the rows here")
    parser.add_argument("--out", help="write the summary of all recorded versions here")
    parser.add_argument("--fill", metavar="FOLDER", help="a Triton cache for GPUs of each --arch")
    arguments = parser.parse_args(argv)
    if arguments.fill:
        for arch in arguments.arch:
            count = fill(arguments.fill, arch, arguments.workers)
            print(f"Triton {triton.__version__}, {arch}: {count} kernels")
        return 0
    if arguments.triton:
        return _each(arguments.triton, argv or sys.argv[1:])
    version = triton.__version__
    work = [(entry, arch) for arch in arguments.arch for entry in recorded(arch)]
    if arguments.kernel:
        names = {f"_{name}_kernel" for name in arguments.kernel}
        work = [(entry, arch) for entry, arch in work if entry.kernel in names]
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    of_version = record.get(version, {})
    rows = judged(work, of_version, arguments.workers, arguments.anew, arguments.recheck)
    if arguments.list:
        for row in rows:
            numbers = " ".join(f"{name}={row.get(name)}" for name in ("warps", "stages", *READ))
            print(f"{row['arch']} {row['kernel']} {row['what']}: {numbers}")
    bad = [row for row in rows if row["problems"]]
    for row in bad:
        print(f"{row['arch']} {row['kernel']} {row['what']}: {'; '.join(row['problems'])}")
    count = sum(row["compiled"] for row in rows)
    print(
        f"Triton {version}: {len(rows)} kernels for {', '.join(arguments.arch)}, "
        f"{count} compiled now, {len(rows) - count} on record, {len(bad)} with problems"
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.write:
        whole = len(arguments.arch) == len(TARGETS) and not arguments.kernel
        old = {} if whole else of_version
        new = {row["key"]: [row[n] for n in READ] for row in rows if "error" not in row}
        record[version] = dict(sorted((old | new).items()))
        _write(dict(sorted(record.items())))
    if arguments.out:
        pages = [line for v in record for line in summary(v, _on_record(record[v]))]
        Path(arguments.out).write_text(PAGE + "\n".join(pages) + "\n")
    return 1 if bad else 0


def _each(versions: list[str], argv: list[str]) -> int:
    """This command once more with every Triton named after ``--triton``."""
    rest = argv[: argv.index("--triton")] + argv[argv.index("--triton") + 1 + len(versions) :]
    status = 0
    for version in versions:
        environment = dict(os.environ)
        if version != triton.__version__:
            environment["PYTHONPATH"] = str(other_triton(version))
        command = [sys.executable, __file__, *rest]
        status |= subprocess.run(command, env=environment).returncode
    return status


def _on_record(of_version: dict) -> list[dict]:
    """The rows of every launch of today, where a version has all of them on record."""
    work = [(entry, arch) for arch in TARGETS for entry in recorded(arch)]
    there = all(entry.key(arch) in of_version for entry, arch in work)
    return judged(work, of_version, 1, False, 0) if there else []


def _write(record: dict) -> None:
    """One line a kernel, so that a change of one is a change of one line."""
    versions = []
    for version, kernels in record.items():
        lines = ",\n".join(f'  "{key}": {json.dumps(values)}' for key, values in kernels.items())
        versions.append(f'"{version}": {{\n{lines}\n}}')
    RECORD.write_text("{\n" + ",\n".join(versions) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
