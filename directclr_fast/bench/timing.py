"""One way to time: every variant in one process, in turn, after a warm-up; medians and quartiles.

Variants that take turns drift together with their machine, so their ratio holds. On a GPU the clock
is that of device events, and a buffer larger than its L2 cache is written before every call, so
inputs are cold; on a CPU the caches are as the variant before left them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 2**28  # beyond any L2
BACKLOG_CYCLES = 4_000_000  # about 2 ms of a GPU's clock: longer than the launches of a small step


def synchronise() -> None:
    """Waits for the device, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on a device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text


def failure(error: BaseException) -> dict:
    """The record of a variant that raised: {"failed": one line, "out_of_memory": bool}."""
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return {"failed": f"{type(error).__name__}: {line}", "out_of_memory": out_of_memory(error)}


def interleaved(
    variants: dict[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 1,
    *,
    device: str = "cpu",
    warm_seconds: float = 0.0,
    budget: float | None = None,
    backlog: bool = False,
    after: Callable[[str], None] | None = None,
) -> dict[str, dict]:
    """Seconds of each variant over ``rounds`` turns: median, quartiles, all values by round.

    Args:
        variants: name to a call that takes one step.
        rounds, warmup: turns that count, and turns before that do not.
        device: "cuda" takes device events and flushes the cache; other devices the host's clock.
        warm_seconds: warm up at least this long.
        budget: seconds after which no further round starts, once 3 are done. None: all rounds.
        backlog: keep the GPU busy until a call's kernels are queued: no gaps between launches.
        after: called with the name after each call.

    The order turns by one from round to round, so that no variant always follows the same other.
    A result is {"median", "quartiles", "seconds"} or what :func:`failure` returns.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    failed: dict[str, dict] = {}
    names = list(variants)
    clock = _Events(backlog) if device == "cuda" else _host_clock
    start, counted, turn = time.perf_counter(), None, 0
    while True:
        now = time.perf_counter()
        if counted is None and turn >= warmup and now - start >= warm_seconds:
            counted, start = turn, now
        done = 0 if counted is None else turn - counted
        if counted is not None and (
            done >= rounds or budget is not None and done >= 3 and now - start > budget
        ):
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
            if name in failed:
                continue
            try:
                seconds = clock(variants[name])
            except Exception as error:  # a peer may raise what it likes; that is its result
                failed[name] = failure(error)
            else:
                if counted is not None:
                    times[name].append(seconds)
            if name in failed and device == "cuda":
                torch.cuda.empty_cache()  # after the error, whose frames held tensors, is gone
            if after is not None:
                after(name)
        turn += 1
    return {name: failed.get(name) or summary(times[name]) for name in names}


def summary(seconds: list[float]) -> dict:
    """{"median", "quartiles", "seconds"} of the times of one variant, in the order of rounds."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "median": statistics.median(seconds),
        "quartiles": [quartiles[0], quartiles[2]],
        "seconds": seconds,
    }


def ratio(other: dict, one: dict) -> float | None:
    """How many times longer ``other`` took than ``one``: the median over their common rounds.

    None where either has no time. Records that interleaved did not make together (different
    numbers of rounds) are compared by their medians.
    """
    if "median" not in other or "median" not in one:
        return None
    if len(other["seconds"]) != len(one["seconds"]):
        return other["median"] / one["median"]
    return statistics.median(a / b for a, b in zip(other["seconds"], one["seconds"]))


def _host_clock(call: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


class _Events:
    """Seconds of a call by device events, the L2 cache flushed before it."""

    def __init__(self, backlog: bool) -> None:
        self.backlog = backlog
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.backlog:
            torch.cuda._sleep(BACKLOG_CYCLES)
        else:
            torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
