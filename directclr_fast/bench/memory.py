"""Peak memory of a forward and backward pass, above the inputs.

On a GPU the allocator says it. On the CPU every step runs in a process of its own, forked from one
that has imported torch and computed nothing, and the system says it (VmHWM, Linux): memory that an
earlier step had returned or kept cannot hide any. The process may take what the machine has free
and no more, so a step that does not fit ends as a result and not with the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch

from .. import machine
from . import timing, variants
from .variants import Case, Loss

WARM_ROWS = 64  # loads libraries and starts threads before the step that counts
MIB = 2**20
BUDGETS_GIB = (1, 8, 24, 80)


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
    with the number of the job and its result, as they come.
    """
    asked = {
        "jobs": [(dataclasses.asdict(case), name) for case, name in jobs],
        "limit": limit or int(0.9 * machine.available_memory()) or None,
        "threads": torch.get_num_threads(),
    }
    found: list[dict] = []
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # compilers talk there
        text=True,
    ) as child:
        child.stdin.write(json.dumps(asked))
        child.stdin.close()
        for line in child.stdout:
            found.append(json.loads(line))
            if after is not None:
                after(len(found) - 1, found[-1])
    lost = {"failed": f"the measuring process ended with code {child.returncode}"}
    return found + [{**lost, "out_of_memory": False}] * (len(jobs) - len(found))


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


# ------------------------------------------------------------------------ growth with N


def growth(points: list[tuple[int, float]]) -> tuple[float, float, float]:
    """(MiB, MiB per row, MiB per pair of rows) of the peaks at each N.

    The least squares fit of relative errors whose three terms are not negative.
    """
    rows = np.array([n for n, _ in points], dtype=float)
    peaks = np.array([max(peak, 1e-9) for _, peak in points])
    terms = np.stack([np.ones_like(rows), rows, rows**2], axis=1) / peaks[:, None]
    best, least = (0.0, 0.0, 0.0), np.inf
    for bits in range(1, 8):
        used = [i for i in range(3) if bits >> i & 1]
        if len(used) > len(points):
            continue
        values = np.zeros(3)
        values[used] = np.linalg.lstsq(terms[:, used], np.ones(len(rows)), rcond=None)[0]
        error = float(np.square(terms @ values - 1).sum())
        # A further term has to earn its place: any one fits the noise a little better.
        if (values >= 0).all() and error < 0.5 * least - 1e-12:
            best, least = tuple(float(v) for v in values), error
    return best


def largest(fit: tuple[float, float, float], mib: float, row_mib: float = 0.0) -> int:
    """The largest N that a fit of :func:`growth` puts into ``mib``, with ``row_mib`` more a row."""
    fixed, row, pair = fit
    row, room = row + row_mib, mib - fixed
    if room <= 0:
        return 0
    if pair <= 0:
        return int(room / row) if row > 0 else sys.maxsize
    return int((-row + (row**2 + 4 * pair * room) ** 0.5) / (2 * pair))


def fits(peaks: dict[str, list[tuple[int, float]]], row_mib: float) -> dict[str, dict]:
    """What :func:`growth` says of each variant's (N, MiB), and the N it puts into BUDGETS_GIB.

    ``row_mib``: inputs, MiB a row. Only the points within a factor 8 of the largest N are fitted:
    what is bounded (a workspace, kept tiles) still grows below. Fewer than 4 of them say nothing:
    the terms cannot be told apart.
    """
    found = {}
    for name, points in peaks.items():
        last = max(n for n, _ in points)
        points = [(n, peak) for n, peak in points if 8 * n >= last]
        if len(points) < 4:
            continue
        fit = growth(points)
        found[name] = {
            "fixed_mib": fit[0],
            "kib_per_row": 1024 * fit[1],
            "bytes_per_pair": MIB * fit[2],
            "measured_to": last,
            "largest": {str(g): largest(fit, 1024 * g, row_mib) for g in BUDGETS_GIB},
        }
    return found


def lines(found: dict[str, dict]) -> list[str]:
    """A line for each fit."""
    return [
        f"{name}: {fit['fixed_mib']:.0f} MiB + {fit['kib_per_row']:.1f} KiB N + "
        f"{fit['bytes_per_pair']:.1f} B N^2 (to N = {fit['measured_to']}); with its inputs N = "
        + ", ".join(f"{n:,} in {g} GiB" for g, n in fit["largest"].items())
        for name, fit in found.items()
    ]


# ------------------------------------------------------------------------ the measuring process


def _main() -> None:
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
                found = {"peak_mib": round(_peak(case, name) / MIB, 2)}
        except BaseException as error:
            found = timing.failure(error)
        with os.fdopen(writer, "w") as pipe:
            pipe.write(json.dumps(found))
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
    # What compiles does so for one shape: there the whole step warms up.
    warm = case.rows if "compiled" in name else min(WARM_ROWS, case.rows)
    function(r1[:warm], r2[:warm]).backward()
    r1.grad = r2.grad = None
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    function(r1, r2).backward()
    return _status("VmHWM") - before


if __name__ == "__main__":
    _main()
