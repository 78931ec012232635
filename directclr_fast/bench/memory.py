"""Peak memory of a forward and backward pass, above the inputs.

    python -m directclr_fast.bench.memory --out memory.json

On a GPU the allocator reports it. On the CPU the system does (VmHWM, Linux): every step runs in a
process of its own, forked from one that has imported torch and computed nothing, so that memory of
an earlier step hides none. The process may take what the machine has free and no more, so a step
that does not fit becomes a result and does not bring the machine down.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch

from .. import machine
from . import study, timing, variants
from .variants import Case, Loss

WARM_ROWS = 64  # loads libraries and starts threads before the step that counts
MIB = 2**20
FLAGS = {
    "--rows": {"type": int, "nargs": "+", "default": [1024 * 2**i for i in range(6)]},
    "--width": {"type": int, "default": 2048},
    "--dim": {"type": int, "default": 360},
    "--negatives": {"default": "cross", "choices": ("cross", "both")},
    "--variants": {"nargs": "+", "help": "only these (default: all that can run)"},
}


def on_device(step: Callable[[], object]) -> float:
    """Peak MiB that ``step`` takes on the GPU above what stands before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def supported() -> bool:
    """Whether this system lets a process fork and read its own peak."""
    return sys.platform.startswith("linux") and os.path.exists("/proc/self/clear_refs")


def in_processes(
    jobs: list[tuple[Case, str]],
    after: Callable[[int, dict], None] | None = None,
    limit: int | None = None,
) -> list[dict]:
    """{"peak_mib"} or a failure, for each (case, name of a variant) on the CPU.

    ``limit``: bytes a process may take; None takes what the machine has free. ``after`` is called
    with the number of each job and its result, as soon as the job ends.
    """
    asked = {
        "jobs": [(dataclasses.asdict(case), name) for case, name in jobs],
        "limit": limit or int(0.9 * machine.available_memory()) or None,
        "threads": torch.get_num_threads(),
    }
    results: list[dict] = []
    with subprocess.Popen(
        [sys.executable, "-c", f"from {__spec__.name} import _serve; _serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # compilers talk there
        text=True,
    ) as child:
        child.stdin.write(json.dumps(asked))
        child.stdin.close()
        for line in child.stdout:
            results.append(json.loads(line))
            if after is not None:
                after(len(results) - 1, results[-1])
    lost = {"failed": f"the measuring process ended with code {child.returncode}"}
    return results + [{**lost, "out_of_memory": False}] * (len(jobs) - len(results))


@contextlib.contextmanager
def limited(limit: int | None = None) -> Iterator[None]:
    """Allocations beyond ``limit`` bytes, or what the machine has free, fail inside the block
    instead of having the system end the process. Does nothing where there is no such limit."""
    try:
        import resource
    except ImportError:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    free = limit or int(0.9 * machine.available_memory())
    if not free:
        yield
        return
    bound = free + (_status("VmData") or 0)
    resource.setrlimit(resource.RLIMIT_DATA, (_lesser(bound, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _lesser(bound: int, hard: int) -> int:
    return bound if hard < 0 else min(bound, hard)  # RLIM_INFINITY is -1


def _status(key: str) -> int | None:
    """Bytes that /proc/self/status gives for ``key``."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith(key):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


# ------------------------------------------------------------------------ the study


def measure(arguments: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """Every variant at every N, smallest first, until it runs out of memory."""
    if not supported():
        raise SystemExit("memory: expected Linux with /proc/self/clear_refs, got a system without")
    gone: dict[str, str] = {}
    for rows in sorted(arguments.rows):
        case = Case(rows, arguments.width, arguments.dim, negatives=arguments.negatives)
        names = [v.name for v in variants.catalogue(case) if not v.why_not(case)]
        names = [n for n in arguments.variants or names if n in names and n not in gone]
        peaks, failed = {}, dict(gone)
        for name, result in zip(names, in_processes([(case, name) for name in names])):
            if "peak_mib" in result:
                peaks[name] = result["peak_mib"]
            else:
                failed[name], gone[name] = result["failed"], f"failed at N = {rows}"
        record = {
            "rows": rows,
            "width": case.width,
            "dim": case.dim,
            "negatives": case.negatives,
            "gradients_mib": 2 * rows * case.width * 4 / MIB,
            "z_and_dz_mib": 4 * rows * -(-case.dim // 16) * 16 * 4 / MIB,
            "peak_mib": peaks,
            "failed": failed,
        }
        must = record["gradients_mib"] + record["z_and_dz_mib"]
        shown = [f"{name} {peak:.0f} ({peak - must:+.0f})" for name, peak in peaks.items()]
        shown += [f"{name}: {text}" for name, text in failed.items()]
        yield record, f"N {rows}: gradients, z and dz {must:.0f} MiB; peak {', '.join(shown)}"


# ------------------------------------------------------------------------ the measuring process


def _serve() -> None:
    asked = json.loads(sys.stdin.read())
    for fields, name in asked["jobs"]:
        print(json.dumps(_forked(Case(**fields), name, asked)), flush=True)


def _forked(case: Case, name: str, asked: dict) -> dict:
    """The result of one job, measured by a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            torch.set_num_threads(asked["threads"])
            with limited(asked["limit"]):
                result = {"peak_mib": round(_peak(case, name) / MIB, 2)}
        except BaseException as error:
            result = timing.failure(error)
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(result))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if text:
        return json.loads(text)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9
    return {"failed": f"the process ended with status {status}", "out_of_memory": killed}


def _peak(case: Case, name: str) -> int:
    """Bytes of one step in this process above what stands before it."""
    variant = next(v for v in variants.catalogue(case) if v.name == name)
    function: Loss = variant.build(case)
    r1, r2 = (r.requires_grad_() for r in case.views())
    # A compiled function serves one shape, so it warms up with the whole step.
    warm = case.rows if "compiled" in name else min(WARM_ROWS, case.rows)
    function(r1[:warm], r2[:warm]).backward()
    r1.grad = r2.grad = None
    return peak(lambda: function(r1, r2).backward())


def peak(step: Callable[[], object]) -> int:
    """Bytes that ``step`` takes in this process at most, above what stands before it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


if __name__ == "__main__":
    study.main(sys.modules[__name__])
