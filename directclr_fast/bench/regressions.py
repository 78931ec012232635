"""Compares two results and says what moved.

Times are compared as shares of eager PyTorch's in the same run, or, where it has none, of the roof
it measured. A figure has moved when it changed by more than a relative and an absolute threshold
together, peaks of memory and errors likewise by their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from ..train.config import check_setting
from . import timing

RELATIVE = 0.15
ABSOLUTE = 0.02  # of eager's time: below, a share is noise whatever its relative change
MEMORY_MIB = 16.0
ERROR_FACTOR = 2.0  # an error has grown when it is beyond twice the old one and the floor
ERROR_FLOOR = 2e-6
KEYS = ("rows", "width", "dim", "dtype", "device", "negatives", "temperature")


class Regressed(RuntimeError):
    """Figures got worse than those compared with; the exit code of the command is 1."""

    exit_code = 1


@dataclasses.dataclass(frozen=True)
class Change:
    """One figure that moved: ``worse`` or better, or a note that says what cannot be compared."""

    case: str
    variant: str
    what: str
    old: float | None
    new: float | None
    worse: bool | None  # None: only a note

    def __str__(self) -> str:
        if self.worse is None:
            return f"note: {self.case}, {self.variant}: {self.what}"
        word = "WORSE" if self.worse else "better"
        text = f"{word}: {self.case}, {self.variant}: {self.what}"
        if not self.old or self.new is None:
            return text
        change = 100 * (self.new / self.old - 1)
        return f"{text} {self.old:.4g} -> {self.new:.4g} ({change:+.0f} %)"


def compare(
    old: dict,
    new: dict,
    *,
    relative: float = RELATIVE,
    absolute: float = ABSOLUTE,
    milliseconds: bool = False,
) -> list[Change]:
    """What moved from ``old`` to ``new``, the worst first.

    ``relative``: share of the old figure. ``absolute``: of the figure, in times of eager PyTorch.
    ``milliseconds`` compares plain times, for runs on one quiet machine; ``absolute`` is then in
    milliseconds. ValueError for thresholds below 0 and for results without a common case.
    """
    check_setting("relative", relative, low=0)
    check_setting("absolute", absolute, low=0)
    before = {_key(case): case for case in old["cases"]}
    after = {_key(case): case for case in new["cases"]}
    common = [key for key in after if key in before]
    if not common:
        raise ValueError("against: expected results with a common case, got none")
    changes = [
        change
        for key in common
        for change in _case(before[key], after[key], relative, absolute, milliseconds)
    ]
    rank = {True: 0, False: 1, None: 2}
    return sorted(changes, key=lambda c: (rank[c.worse], -_size(c)))


def summary(changes: list[Change], old: dict, new: dict) -> str:
    """The changes as lines, and what was compared."""
    shared = {_key(case) for case in old["cases"]} & {_key(case) for case in new["cases"]}
    worse, better = (sum(c.worse is flag for c in changes) for flag in (True, False))
    head = f"{len(shared)} cases compared: {worse} figures worse, {better} better"
    return "\n".join([head, *(f"  {change}" for change in changes)])


def _key(case: dict) -> tuple:
    return tuple(case[key] for key in KEYS)


def _size(change: Change) -> float:
    if not change.old or change.new is None:
        return float("inf")
    return abs(change.new / change.old - 1)


def _case(old: dict, new: dict, relative, absolute, milliseconds) -> Iterator[Change]:
    text = f"N {new['rows']}, d {new['dim']}, {new['dtype']}, {new['negatives']}"
    for name, was in old["variants"].items():
        row = new["variants"].get(name)
        if row is None or "why_not" in row:
            if "median" in was and row is not None:
                reasons = "; ".join(row["why_not"])
                yield Change(text, name, f"not run now: {reasons}", None, None, None)
            continue
        if "median" in was and "median" not in row:
            reason = row.get("failed", "it has no time")
            yield Change(text, name, f"fails now: {reason}", None, None, True)
            continue
        if "median" in row and "failed" in was:
            yield Change(text, name, "runs now, failed before", None, None, False)
        if "median" in was and "median" in row and (name != "eager" or milliseconds):
            what, a, b, threshold = _times(old, new, name, milliseconds, absolute)
            if a is None or b is None:
                yield Change(text, name, "no time of eager to compare", None, None, None)
            elif _moved(a, b, relative, threshold):
                yield Change(text, name, what, a, b, b > a)
        if was.get("peak_mib") and row.get("peak_mib"):
            a, b = was["peak_mib"], row["peak_mib"]
            if _moved(a, b, relative, MEMORY_MIB):
                yield Change(text, name, "peak MiB", a, b, b > a)
        if was.get("error") and row.get("error") and was["family"] == "ours":
            a, b = was["error"], row["error"]
            if b > ERROR_FACTOR * a + ERROR_FLOOR or a > ERROR_FACTOR * b + ERROR_FLOOR:
                yield Change(text, name, "error", a, b, b > a)


def _times(old, new, name, milliseconds, absolute) -> tuple:
    """(what is compared, the old and the new figure, the absolute threshold); more is slower."""
    if milliseconds:
        a, b = (1e3 * case["variants"][name]["median"] for case in (old, new))
        return "ms", a, b, absolute
    rows = [case["variants"] for case in (old, new)]
    a, b = (timing.ratio(of_case[name], of_case.get("eager", {})) for of_case in rows)
    if a is not None and b is not None:
        return "time / eager's", a, b, absolute
    shares = [case["variants"][name].get("of_roof") for case in (old, new)]
    if all(shares):
        return "roof / rate", 1 / shares[0], 1 / shares[1], absolute
    return "time", None, None, absolute


def _moved(old: float, new: float, relative: float, absolute: float) -> bool:
    return abs(new - old) > relative * old and abs(new - old) > absolute
