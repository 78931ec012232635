"""The AMX body as the compiler left it: read, since few machines can run it.

All that it computes is tested as the bodies `tiles` and `tiles_avx512`, the same source over
emulated instructions (test_native_kernels.py). Its own are a dozen asm statements, and the
epilogue's place between them.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter

import pytest

_cpu = pytest.importorskip(
    "directclr_fast._cpu", reason="the compiled CPU kernels are not installed"
)
# Columns, rows, sums. A product of bf16 has two of each in the registers.
PRODUCT = re.compile(r"tdpbssd\s+%tmm7,%tmm6,%tmm[0-5]|tdpbf16ps\s+%tmm[72],%tmm[65],%tmm[0134]")


@pytest.fixture(scope="module")
def instructions():
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the AMX body is for x86-64")
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("reading machine code needs objdump (binutils), got none")
    command = [objdump, "-d", "--no-show-raw-insn", _cpu.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = (line.partition("\t")[2].strip() for line in listing.splitlines())
    return [line for line in lines if line]


def test_tile_instructions_are_there_and_each_register_has_one_part(instructions):
    tiles = [line for line in instructions if line.startswith(("tile", "ldtile", "tdp"))]
    counts = Counter(line.split()[0] for line in tiles)
    assert counts.keys() == {
        "ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tileloaddt1", "tilestored", "tdpbssd",
        "tdpbf16ps",
    }  # fmt: skip
    assert counts["ldtilecfg"] == counts["tilerelease"]
    for line in tiles:
        name, _, operands = line.partition(" ")
        register = re.findall(r"tmm(\d)", operands)
        if name.startswith("tdp"):
            assert PRODUCT.match(line), line
        elif name == "tileloaddt1":
            assert register in (["7"], ["2"]), line
        elif name in ("tilestored", "tilezero"):  # of sums alone: an operand stored is one spilled
            assert register[0] in "012345", line


def test_the_epilogue_runs_between_products(instructions):
    places = [i for i, line in enumerate(instructions) if PRODUCT.match(line)]
    gaps = [instructions[a + 1 : b] for a, b in zip(places, places[1:]) if b - a < 100]

    def gaps_with(name):
        return sum(any(line.startswith(name) for line in gap) for gap in gaps)

    # A block has six gaps: sums and weights have the exponential in theirs, both products with G
    # only the conversion of the sums.
    assert gaps_with("vscalefps") >= 10
    assert gaps_with("vcvtdq2ps") >= 20
    # Between a product and the next no vector goes to the stack and back.
    spills = [
        line for gap in gaps for line in gap if "zmm" in line and re.search(r"\(%r[sb]p\)", line)
    ]
    assert not spills, spills
