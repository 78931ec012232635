"""One way to time: every variant in one process, in turn, after a warm-up; medians and quartiles.

Machines drift; variants that take turns drift together, so their ratio holds where single times do
not. A variant that fails (out of memory) is recorded as that, not left out.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronise() -> None:
    """Waits for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleaved(
    variants: dict[str, Callable[[], object]], rounds: int = 7, warmup: int = 1
) -> dict[str, dict]:
    """Seconds of each variant over ``rounds`` turns: median, quartiles, all values.

    The order turns by one from round to round, so that no variant always follows the same other.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    names = list(variants)
    for turn in range(warmup + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in failed:
                continue
            try:
                synchronise()
                start = time.perf_counter()
                variants[name]()
                synchronise()
                seconds = time.perf_counter() - start
            except (RuntimeError, MemoryError) as error:
                failed[name] = str(error).splitlines()[0]
                continue
            if turn >= warmup:
                times[name].append(seconds)
    results = {}
    for name in names:
        if name in failed:
            results[name] = {"failed": failed[name]}
            continue
        values = sorted(times[name])
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        results[name] = {
            "median": statistics.median(values),
            "quartiles": [quartiles[0], quartiles[2]],
            "seconds": values,
        }
    return results


def matmul_rate(rows: int, columns: int, inner: int, dtype=torch.float32, rounds: int = 5) -> float:
    """Operations per second of the library's product at this shape, the roof beside a figure."""
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    found = interleaved({"mm": lambda: torch.mm(a, b.T, out=out)}, rounds)
    return 2 * rows * columns * inner / found["mm"]["median"]


def fma_peak(rounds: int = 9) -> float | None:
    """fp32 operations per second of a loop of independent multiply-adds on every thread: the roof
    of the CPU backend. None without the compiled extension."""
    try:
        from directclr_fast import _cpu
    except ImportError:
        return None
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        operations = _cpu.fma_peak(torch.get_num_threads(), 1_000_000)
        rates.append(operations / (time.perf_counter() - start))
    return statistics.median(rates)


def machine() -> dict:
    """Processor, threads, versions and commit: what every result file carries."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    result = {
        "processor": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    return result


def _git(*words: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
