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

    `sums` ends at the barrier past the last exchange of column sums. `weights` ends at the last
    store of P that does not turn blocks for its mirror image, by way of the last paired load of
    column factors, where there is one: without it the way of ``symmetric=False`` is shorter. Both
    arms of a divergent branch are run and one of them is on the way, hence branches are to be
    counted beside it.
    """
    products = [i for i, c in enumerate(code) if re.match(r"[HQ]GMMA", c.operation)]
    if not products:
        return []
    after = range(products[-1], len(code))
    way = [next(i for i in after if code[i].operation == "WARPGROUP.DEPBAR.LE")]
    stores = any(re.match(r"STG\S*\.128", c.operation) for c in code)
    to_barrier = {r"SHFL\.BFLY": -1, r"BAR\.": 0}  # the last one, then the first one
    to_store = {r"LDG\.E\.64": -1, r"STG\S*\.128": -1}
    for pattern, which in (to_store if stores else to_barrier).items():
        source = reached(code, way[-1])
        marks = [i for i in source if re.match(pattern, code[i].operation) and i != way[-1]]
        if not marks:
            continue
        part = [marks[which]]
        while source[part[-1]] != way[-1]:
            part.append(source[part[-1]])
        way += part[::-1]
    return [code[i] for i in way]


def reached(code: list[Instruction], begin: int) -> dict[int, int]:
    """Indices of what can be executed from ``begin`` on without MOVM, the nearest first, each with
    the index of the instruction before it on a shortest way."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    source, front = {begin: begin}, [begin]
    while front:
        following = []
        for i in front:
            _, conditional, operation, operands = code[i]
            target = re.search(r"0x([0-9a-f]+)$", operands) if operation == "BRA" else None
            then = [index[int(target[1], 16)]] if target else []
            if conditional or operation not in ("BRA", "EXIT", "RET"):
                then.append(i + 1)
            for j in then:
                if j < len(code) and j not in source and not code[j].operation.startswith("MOVM"):
                    source[j] = i
                    following.append(j)
        front = following
    return source


def count(code: list[Instruction], pattern: str) -> int:
    """Instructions whose operation begins like ``pattern``."""
    return sum(bool(re.match(pattern, c.operation)) for c in code)
