"""Peak memory of a forward and backward pass, above the inputs.

On a GPU the allocator reports it. On the CPU the system does (VmHWM, Linux): every step runs in a
process of its own, forked from one that has imported torch and computed nothing. It may take what
the machine has free and no more: a step that does not fit is a result.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

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


def of_step(case: Case, name: str, limit: int | None = None) -> dict:
    """{"peak_mib"} of a step of the variant ``name`` on the CPU, or a failure. ``limit``: bytes the
    process may take; None takes what the machine has free."""
    return isolated(_of_step, case, name, limit, torch.get_num_threads())


def isolated(function: Callable[..., dict], *args) -> dict:
    """What ``function(*args)`` returns in a process of its own, on Linux forked from one that has
    imported torch and computed nothing; a failure where it raises or is killed."""
    context = multiprocessing.get_context("forkserver" if supported() else "spawn")
    if supported():
        context.set_forkserver_preload([variants.__name__])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(writer, function, args))
    process.start()
    writer.close()
    try:
        result = reader.recv()
    except EOFError:
        result = None
    process.join()
    if result is not None:
        return result
    killed = process.exitcode == -9
    return {"failed": f"its process ended with {process.exitcode}", "out_of_memory": killed}


def _send(writer, function: Callable[..., dict], args: tuple) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)  # compilers talk
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    try:
        result = function(*args)
    except BaseException as error:
        result = timing.failure(error)
    writer.send(result)


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
    bound, hard = free + (status("VmData") or 0), before[1]
    bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def reset_peak() -> int:
    """Lets VmHWM begin anew; the bytes resident now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return status("VmRSS")


def status(key: str) -> int | None:
    """Bytes that /proc/self/status gives for ``key``."""
    try:
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"^{key}:\s+(\d+)", text, re.M)[1]) * 1024
    except (OSError, TypeError):
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
        for name in names:
            result = of_step(case, name)
            if "peak_mib" in result:
                peaks[name] = result["peak_mib"]
            else:
                failed[name], gone[name] = result["failed"], f"failed at N = {rows}"
        record = {
            "rows": rows, "width": case.width, "dim": case.dim, "negatives": case.negatives,
            "gradients_mib": 2 * rows * case.width * 4 / MIB,
            "z_and_dz_mib": 4 * rows * -(-case.dim // 16) * 16 * 4 / MIB, "peak_mib": peaks,
            "failed": failed,
        }  # fmt: skip
        must = record["gradients_mib"] + record["z_and_dz_mib"]
        shown = [f"{name} {peak:.0f} ({peak - must:+.0f})" for name, peak in peaks.items()]
        shown += [f"{name}: {text}" for name, text in failed.items()]
        yield record, f"N {rows}: gradients, z and dz {must:.0f} MiB; peak {', '.join(shown)}"


# ------------------------------------------------------------------------ the measuring process


def _of_step(case: Case, name: str, limit: int | None, threads: int) -> dict:
    torch.set_num_threads(threads)
    variant = next(v for v in variants.catalogue(case) if v.name == name)
    with limited(limit):
        function: Loss = variant.build(case)
        r1, r2 = (r.requires_grad_() for r in case.views())
        # A compiled function serves one shape, so it warms up with the whole step.
        warm = case.rows if "compiled" in name else min(WARM_ROWS, case.rows)
        function(r1[:warm], r2[:warm]).backward()
        r1.grad = r2.grad = None
        return {"peak_mib": round(peak(lambda: function(r1, r2).backward()) / MIB, 2)}


def peak(step: Callable[[], object]) -> int:
    """Bytes that ``step`` takes in this process at most, above what stands before it."""
    before = reset_peak()
    step()
    return status("VmHWM") - before


study.as_script(__name__)
