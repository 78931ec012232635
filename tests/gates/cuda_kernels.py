"""Builds the Hopper kernels for sm_90a, with no GPU needed, and reads the binaries: registers,
stack, spills, matrix instructions, and what a warp executes of an epilogue (sass.py).

    python tests/gates/cuda_kernels.py                                # a table
    python tests/gates/cuda_kernels.py --write --out docs/cuda-kernels.md
    python tests/gates/cuda_kernels.py --recheck      # what the suite runs

``--write`` records what was found beside this file, under a key of all it follows from: the code,
the flags, nvcc and CUTLASS. ``--recheck`` builds one object and compares it where the key is still
the record's, and everything where it is not.

Exit status 1 if a kernel spills or has a stack, if ptxas serialises its wgmma (C75xx), if a tile
product lacks Hopper's matrix instruction, TMA or multicast, if its epilogue branches or shuffles
otherwise than LIMITS says, or if the linked module does not load or names a library beyond the
system's own.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    from . import sass
except ImportError:  # run as a script
    import sass

CSRC = Path(__file__).parents[2] / "csrc"
SYSTEM = "linux-vdso libstdc++ libgcc_s libc. libm. ld-linux libpthread libdl librt".split()
_spec = importlib.util.spec_from_file_location("directclr_fast_build", CSRC / "build.py")
_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_build)
build_cuda = _build.CUDA
RECORD = Path(__file__).with_suffix(".json")
RECHECKED = "rows.o"  # the quickest object with kernels

# At most, of the instructions on the way of a tile without a mask, by stage and form; exactly 128
# values of a lane take an exponential each (two without the bound), and as many shuffles as said.
WAY = {
    "sums bounded": 900, "sums unbounded": 2350, "weights bounded": 1100, "weights unbounded": 2100,
    "split weights bounded": 1950, "split weights unbounded": 2900,
}  # fmt: skip
SHUFFLES = {
    "sums bounded": 4 + 56, "sums unbounded": 2 * (4 + 56), "weights bounded": 64,
    "weights unbounded": 64, "split weights bounded": 128, "split weights unbounded": 128,
}  # fmt: skip
# Branches on the way: masks, edges, options, all of them the same for a whole warp. Of the whole
# kernel: what must reconverge, and CUTLASS's own two divergent calls in its loading warps.
BRANCHES = {
    "sums bounded": 9, "sums unbounded": 9, "weights bounded": 8, "weights unbounded": 16,
    "split weights bounded": 24, "split weights unbounded": 24,
}  # fmt: skip
RECONVERGE, COLLECTIVES = 20, 4


def nvcc_says() -> str:
    """The compiler's own name of its version."""
    command = [build_cuda.compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def key(folder: Path = CSRC / "cuda") -> str:
    """Digest of the code in ``folder`` without its comments, flags, compiler, CUTLASS, reader."""
    parts = [nvcc_says(), (build_cuda.cutlass() / "cutlass/version.h").read_text()]
    parts += [inspect.getsource(reader) for reader in (kernels, label, sass)]
    for command, _, target in build_cuda.compile_commands(Path()):
        parts += [target.name, *(word for word in command if "/" not in word)]
    for path in sorted(folder.iterdir()):
        if path.suffix in (".cu", ".cuh", ".cpp", ".h") and path.stem != "stages_host":
            parts += [path.name, *re.sub(r"//.*", "", path.read_text()).split()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def compile_objects(commands: Sequence, jobs: int) -> dict[str, str]:
    """What the compiler said by object."""

    def run(entry) -> tuple[str, str]:
        command, _, target = entry
        done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{target.name}: {done.stderr[-2000:]}")
        return target.name, done.stdout + done.stderr

    with ThreadPoolExecutor(jobs) as pool:
        return dict(pool.map(run, commands))


def link(folder: Path) -> Path:
    """The module, of all objects."""
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = [str(target) for _, _, target in build_cuda.compile_commands(folder)]
    subprocess.run([*build_cuda.link_command(), *objects, "-o", str(module)], check=True)
    return module


def tool(name: str) -> str:
    """A binary tool of Triton's package, otherwise the one beside nvcc."""
    found = importlib.util.find_spec("triton")
    if found is not None:
        path = Path(found.origin).parent / "backends/nvidia/bin" / name
        if path.exists():
            return str(path)
    return str(Path(build_cuda.compiler()).resolve().with_name(name))


def kernels(name: str, said: str, binary: Path) -> list[dict]:
    """One record for each kernel of an object file."""
    dump = subprocess.run(
        [tool("cuobjdump"), "--dump-sass", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", dump, re.S))
    found = []
    for entry in re.split(r"Compiling entry function '", said)[1:]:
        symbol = entry.partition("'")[0]
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        whole = sass.instructions(code[symbol])
        way = sass.epilogue(whole)
        found.append(
            {
                "object": name,
                "kernel": label(name, symbol),
                "registers": int(re.search(r"Used (\d+) registers", entry)[1]),
                "stack": int(stack),
                "spills": int(stores) + int(loads),
                "matrix": sorted({c.operation[:5] for c in whole if "GMMA." in c.operation}),
                "tma": sass.count(whole, "UTMALDG"),
                "multicast": sass.count(whole, r"UTMALDG\S*MULTICAST"),
                "wide_stores": sass.count(whole, r"STG\S*\.128"),
                "reconverge": sass.count(whole, "BSSY"),
                "collectives": sass.count(whole, r"WARPSYNC\.COLLECTIVE|ENDCOLLECTIVE"),
                "way": len(way),
                "branches": sass.count(way, "BRA"),
                "exponentials": sass.count(way or whole, r"MUFU\.EX2"),
                "shuffles": sass.count(way or whole, r"SHFL\.BFLY"),
            }
        )
    return found


def label(name: str, symbol: str) -> str:
    if name.startswith("similarity"):
        stage = "sums" if "SumsEpilogue" in symbol else "weights"
        first = re.search(r"(?:Sums|Weights)Epilogue.*?Lb([01])E", symbol)[1]
        form = "bounded" if first == "1" else "unbounded"
        kind = name.removeprefix("similarity_").removesuffix(".o").replace("_", " ")
        return f"{stage} {kind} {form}"
    short = re.search(r"\d+([a-z_]+_kernel)", symbol)[1]
    halves = {"Fp16": "fp16", "Bf16": "bf16"}
    kinds = [text for key, text in halves.items() if key in symbol]
    source = "fp32" if re.search(r"kernelIf|ViewIf", symbol) else ""
    source = "fp16 rows" if "kernelI6__half" in symbol else source
    source = "bf16 rows" if "kernelI13__nv_bfloat16" in symbol else source
    return " ".join([short, *([source] if source else []), *kinds])


def problems(record: dict, said: str) -> list[str]:
    """What would make a kernel unfit to ship."""
    found = []
    if record["spills"] or record["stack"]:
        found.append(f"spills {record['spills']} bytes, stack {record['stack']} bytes")
    if record["object"].startswith("similarity"):
        wanted = "QGMMA" if "e4m3" in record["object"] else "HGMMA"
        if wanted not in record["matrix"]:
            found.append(f"no {wanted}, got {record['matrix']}")
        if not record["tma"] or not record["multicast"]:
            found.append("no TMA load with multicast")
        if "C75" in said:
            found.append("ptxas serialises wgmma: " + re.search(r"\(C75\d+\)[^\n]{0,80}", said)[0])
        if record["registers"] > 168:
            found.append(f"{record['registers']} registers of 384 threads, at most 168")
        stage, *_, bound = record["kernel"].split()
        form = f"{stage} {bound}"
        if "split" in record["object"] and stage == "weights":
            form = f"split {form}"
        if not 0 < record["way"] <= WAY[form]:
            found.append(f"{record['way']} instructions a tile, at least 1, at most {WAY[form]}")
        if record["shuffles"] != SHUFFLES[form]:
            found.append(f"{record['shuffles']} shuffles a tile, expected {SHUFFLES[form]}")
        if bound == "bounded" and record["exponentials"] != 128:
            found.append(f"{record['exponentials']} exponentials a lane and tile, expected 128")
        for key, most in (
            ("branches", BRANCHES[form]), ("reconverge", RECONVERGE), ("collectives", COLLECTIVES)
        ):  # fmt: skip
            if record[key] > most:
                found.append(f"{key}: {record[key]}, at most {most}")
    return found


def loads(module: Path) -> list[str]:
    """What is wrong with the linked module on a machine like this one."""
    found = []
    listed = subprocess.run(["ldd", str(module)], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        if not any(name in line for name in SYSTEM):
            found.append(f"needs {line.split()[0]}")
    code = (
        f"import sys; sys.path.insert(0, {str(module.parent)!r}); import _cuda; _cuda.built_with()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        found.append(f"does not load: {done.stderr.strip().splitlines()[-1]}")
    return found


def recheck(folder: Path, recorded: list[dict], jobs: int) -> list[str]:
    """How the kernels of one object, compiled now, differ from the record of them."""
    commands = [c for c in build_cuda.compile_commands(folder) if c.target.name == RECHECKED]
    said = compile_objects(commands, jobs)[RECHECKED]
    now = kernels(RECHECKED, said, folder / RECHECKED)
    then = [record for record in recorded if record["object"] == RECHECKED]
    differ = [f"recorded {a}, found {b}" for a, b in zip(then, now) if a != b]
    if len(then) != len(now):
        differ.append(f"recorded {len(then)} kernels of {RECHECKED}, found {len(now)}")
    return differ


def table(records: list[dict]) -> str:
    heads = "kernel|registers|spills|matrix|TMA|16-byte stores|BSSY|COLLECTIVE|way|BRA|EX2|SHFL"
    keys = "kernel registers spills matrix tma wide_stores reconverge collectives".split()
    keys += "way branches exponentials shuffles".split()
    rows = [f"| {heads.replace('|', ' | ')} |", "|" + "---|" * len(keys)]
    for record in records:
        values = [" ".join(v) if isinstance(v := record[k], list) else str(v) for k in keys]
        rows.append(f"| {' | '.join(values)} |")
    return "\n".join(rows)


def main() -> int:
    """Builds, prints the table, writes it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="markdown file")
    parser.add_argument("--json", help="file of the records")
    parser.add_argument("--write", action="store_true", help="record what is found")
    parser.add_argument("--recheck", action="store_true", help="trust the record where it holds")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4))
    arguments = parser.parse_args()
    begin = time.monotonic()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    holds = arguments.recheck and record.get("key") == key()
    records, wrong, said = record.get("kernels", []), [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if holds:
            wrong += recheck(folder, records, arguments.jobs)
        else:
            said = compile_objects(build_cuda.compile_commands(folder), arguments.jobs)
            wrong += loads(link(folder))
            texts = {k: v for k, v in said.items() if "Compiling entry function" in v}
            records = [r for k, v in texts.items() for r in kernels(k, v, folder / k)]
    for one in records:
        wrong += [f"{one['kernel']}: {p}" for p in problems(one, said.get(one["object"], ""))]
    how = "recorded" if holds else "built"
    seconds = time.monotonic() - begin
    last = f"{len(records)} kernels, {len(wrong)} problems, {how}, {seconds:.0f} s"
    print("\n".join([table(records), "", *wrong, last]))
    if arguments.write and not wrong:
        RECORD.write_text(json.dumps({"key": key(), "kernels": records}, indent=1) + "\n")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"kernels": records, "wrong": wrong}, indent=1))
    if arguments.out:
        release = re.search(r"release ([\d.]+)", nvcc_says())[1]
        text = (
            "# The Hopper kernels, read off their binaries\n\n"
            f"nvcc {release}, {build_cuda.cutlass_package.replace('==', ' ')}, sm_90a; counts of "
            "instructions in the machine code. Written by `python tests/gates/cuda_kernels.py "
            "--write --out docs/cuda-kernels.md`, no GPU needed. Tile products have 384 threads "
            "and, after `setmaxnreg`, more registers in their consumers than the 168 they start "
            "with.\n\n"
            "BSSY opens a region whose lanes may part and must meet again; COLLECTIVE begins or "
            "ends what the parts of a warp do one after another (CUTLASS's loading warps do so "
            "twice). `way` is the number of instructions that a warp executes of the epilogue of a "
            "tile without a mask: the fewest that lead from the end of the products to the barrier "
            "where column sums meet (`sums`) or, past the loads of column factors, to the last "
            "store (`weights`). The columns after it count on that way, and in all the code of "
            "kernels without a tile. A lane holds 128 values. The script fails above its limits."
            "\n\n"
        )
        Path(arguments.out).write_text(text + table(records) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
