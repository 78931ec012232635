"""Machine code as ``cuobjdump --dump-sass`` prints it, and what a warp executes of a tile product's
epilogue (csrc/cuda/tile.h)."""

from __future__ import annotations

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    conditional: bool  # runs under a predicate
    operation: str
    operands: str


def instructions(sass: str) -> list[Instruction]:
    """Those of a function, in order."""
    line = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+ +)?([A-Z][\w.]*)([^;]*);")
    return [
        Instruction(int(address, 16), bool(predicate), operation, operands.strip())
        for address, predicate, operation, operands in line.findall(sass)
    ]


def epilogue(code: list[Instruction]) -> list[Instruction]:
    """The fewest instructions from the end of a tile's products to the end of its epilogue, by way
    of the marks below: what a tile without a mask takes, since a mask only adds. Empty for a kernel
    without products.

    `sums` ends at the barrier where the warps' column sums meet. `weights` ends at the last store
    of P before blocks are turned for its mirror image, by way of the last paired load of column
    factors, where there is one: without it the way of ``symmetric=False`` is shorter. Both arms of
    a divergent branch are run and one of them is on the way, hence branches are to be counted
    beside it.
    """

    def last(pattern: str, end: int | None = None) -> int | None:
        there = (i for i, c in enumerate(code[:end]) if re.match(pattern, c.operation))
        return max(there, default=None)

    products = last(r"[HQ]GMMA")
    if products is None:
        return []
    after = range(products, len(code))
    begin = next(i for i in after if code[i].operation == "WARPGROUP.DEPBAR.LE")
    turned = (i for i in after if code[i].operation.startswith("MOVM"))
    stored = last(r"STG\S*\.128", next(turned, None))
    if stored is not None:
        marks = [last(r"LDG\.E\.64", stored), stored]
    else:
        marks = [next((i for i in after if code[i].operation.startswith("BAR.SYNC")), None)]
    way = [begin]
    for mark in marks:
        if mark is not None:
            way += shortest(code, way[-1], mark)
    return [code[i] for i in way]


def shortest(code: list[Instruction], begin: int, end: int) -> list[int]:
    """Indices of the fewest instructions that lead from ``begin``, without it, to ``end``."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    source, front = {begin: begin}, [begin]
    while end not in source:
        reached = []
        for i in front:
            _, conditional, operation, operands = code[i]
            target = re.search(r"0x([0-9a-f]+)$", operands) if operation == "BRA" else None
            following = [index[int(target[1], 16)]] if target else []
            if conditional or operation not in ("BRA", "EXIT", "RET"):
                following.append(i + 1)
            for j in following:
                if j < len(code) and j not in source:
                    source[j] = i
                    reached.append(j)
        if not reached:
            raise ValueError(f"no way from {code[begin]} to {code[end]}")
        front = reached
    way = [end]
    while source[way[-1]] != begin:
        way.append(source[way[-1]])
    return way[::-1]


def count(code: list[Instruction], pattern: str) -> int:
    """Instructions whose operation begins like ``pattern``."""
    return sum(bool(re.match(pattern, c.operation)) for c in code)
