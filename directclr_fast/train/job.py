"""Which process of a job this one is, by the variables of its launcher. Needs no torch."""

from __future__ import annotations

import os

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def place() -> tuple[int, int]:
    """(rank, number of processes) as torchrun has them in RANK and WORLD_SIZE.

    (0, 1) where WORLD_SIZE says no more than one: then a RANK is what an older job left. A variable
    that is empty is not set, for who reads it later too. ValueError: variable, expected, got.
    """
    for name in VARIABLES:
        if not os.environ.get(name, "set").strip():
            del os.environ[name]
    size = _number("WORLD_SIZE", 1, 2**31, os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return 0, 1
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(
                f"{name}: expected it beside WORLD_SIZE={size}, got none; start the processes with "
                "torchrun, or unset WORLD_SIZE for one alone"
            )
    return _number("RANK", 0, size - 1, os.environ["RANK"]), size


def speaks() -> bool:
    """Whether this process prints what all of them would: the first one, and one of no job."""
    try:
        return place()[0] == 0
    except ValueError:
        return True


def _number(name: str, low: int, high: int, text: str) -> int:
    if text.strip().isdecimal() and low <= int(text) <= high:
        return int(text)
    expected = f"a number from {low} to {high}" if high < 2**31 else f"a number from {low} on"
    raise ValueError(f"{name}: expected {expected}, got {text!r}")
