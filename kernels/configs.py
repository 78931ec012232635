"""Tile choices: one fixed table per architecture, each row with its reason.

Nothing is tuned at run time. ``directclr_fast/bench/tune.py`` measures candidates on a GPU and
prints rows for this table; until a result file backs a row its reason is arithmetic, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """One tile product: ``rows`` x ``columns`` of the result, ``inner`` of the dot a step.

    ``warps`` and ``stages`` are Triton's num_warps and num_stages.

    ``flatten``: the loops over tiles and along the dot are one, so that the loads of a tile overlap
    the end of the one before. ``fold`` (1, 2 or 4): candidates of "sums" that are added before they
    enter the second tile, which is as many times smaller; a thread of Hopper's products holds them.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    tma: bool = False
    flatten: bool = False
    fold: int = 1
    group: int = 8  # tile rows that share their column tiles in L2


# Shared memory a block may use, bytes: NVIDIA's technical specifications by compute capability,
# AMD's LDS of CDNA 3.
SHARED_BYTES = {
    "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024,
    "sm_100": 227 * 1024, "sm_120": 99 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip

_INTERPRETER = Tile(32, 64, 32, 1, 1)
HI_LO = "hi lo"

# (kernel, architecture, bytes of an operand element, or HI_LO for both parts of fp16 rows). "sums":
# rows are the fixed side (anchors), columns the moving one, and a second fp32 tile lives beside the
# accumulator, a ``fold``-th of its size; HI_LO writes the positives' logits too. By arithmetic (no
# result file yet):
# - a tile of 128 x 128 fp32 over 8 warps is 64 registers a thread, for "sums" 64 / fold more;
# - a tile of fp16 does rows columns / (rows + columns) operations a byte from L2: of 500 TFLOP/s
#   128 x 128 tiles want 7.8 TB/s, 128 x 256 ones 5.9;
# - flattened where one block fills a multiprocessor, so that nothing else runs under its epilogue;
# - 64 fp16 (128 bytes) along d is one row of the swizzled shared-memory tile;
# - sm_86, sm_120 and gfx942 have 64 to 99 KiB of shared memory: fewer stages.
_TABLE = {
    ("sums", "sm_80", 2): Tile(64, 128, 64, 8, 3),
    ("sums", "sm_80", 4): Tile(64, 128, 16, 8, 3),
    ("sums", "sm_86", 2): Tile(64, 128, 64, 8, 2),
    ("sums", "sm_86", 1): Tile(64, 128, 64, 8, 3),
    ("sums", "sm_86", 4): Tile(64, 64, 16, 8, 2),
    ("sums", "sm_90", 1): Tile(128, 256, 64, 8, 4, tma=True, flatten=True, fold=4),
    ("sums", "sm_90", 2): Tile(128, 256, 64, 8, 4, tma=True, flatten=True, fold=4),
    ("sums", "sm_90", 4): Tile(64, 128, 32, 8, 3),
    ("sums", "sm_100", 1): Tile(64, 128, 64, 8, 4, tma=True),
    ("sums", "sm_100", 2): Tile(64, 128, 64, 8, 4, tma=True),
    ("sums", "sm_100", 4): Tile(64, 64, 32, 8, 3),
    ("sums", "gfx942", 2): Tile(128, 128, 32, 8, 2),
    ("sums", "gfx942", 4): Tile(64, 64, 32, 4, 1),
    ("weights", "sm_80", 2): Tile(128, 128, 64, 8, 3),
    ("weights", "sm_80", 4): Tile(128, 64, 32, 8, 3),
    ("weights", "sm_86", 2): Tile(128, 128, 64, 8, 2),
    ("weights", "sm_86", 1): Tile(128, 128, 64, 8, 3),
    ("weights", "sm_86", 4): Tile(64, 64, 16, 4, 2),
    ("weights", "sm_90", 1): Tile(128, 256, 64, 8, 3, tma=True, flatten=True),
    ("weights", "sm_90", 2): Tile(128, 256, 64, 8, 3, tma=True, flatten=True),
    ("weights", "sm_90", 4): Tile(128, 64, 32, 8, 3),
    ("weights", "sm_100", 1): Tile(128, 128, 64, 8, 4, tma=True),
    ("weights", "sm_100", 2): Tile(128, 128, 64, 8, 4, tma=True),
    ("weights", "sm_100", 4): Tile(64, 64, 32, 8, 3),
    ("weights", "gfx942", 2): Tile(128, 128, 32, 8, 2),
    ("weights", "gfx942", 4): Tile(64, 64, 32, 4, 1),
    ("products", "sm_80", 2): Tile(128, 128, 64, 8, 3),
    ("products", "sm_80", 4): Tile(64, 64, 32, 4, 3),
    ("products", "sm_86", 2): Tile(128, 128, 64, 8, 2),
    ("products", "sm_86", 4): Tile(64, 64, 32, 4, 2),
    ("products", "sm_90", 2): Tile(128, 128, 64, 8, 4, tma=True),
    ("products", "sm_90", 4): Tile(64, 64, 32, 4, 3),
    ("products", "sm_100", 2): Tile(64, 128, 64, 8, 4, tma=True),
    ("products", "sm_100", 4): Tile(64, 64, 32, 8, 3),
    ("products", "gfx942", 2): Tile(128, 128, 32, 8, 2),
    ("products", "gfx942", 4): Tile(64, 64, 32, 4, 1),
    ("products", "sm_80", HI_LO): Tile(64, 64, 32, 8, 3),
    ("sums", "sm_80", HI_LO): Tile(64, 64, 32, 8, 3),
    ("sums", "sm_90", HI_LO): Tile(64, 128, 64, 8, 4, tma=True, flatten=True),
    ("weights", "sm_90", HI_LO): Tile(128, 128, 64, 8, 4, tma=True, flatten=True),
    ("sums", "sm_100", HI_LO): Tile(64, 64, 64, 8, 4, tma=True),
}
# Two exponentials an element, the triangle's mask, or maxima beside the sums want more registers:
# there the tiles above spill. Every row here and above is free of spills with each Triton in the
# record of tests/gates/triton_kernels.py, but for 2 instructions of gfx942's sums with ids and
# "highest" under 3.7.1; what decides is often the oldest (sm_80's tf32x3 products, the triangle on
# sm_100, whose unbounded sums in turn want fewer anchors with 3.7).
_CROWDED = {
    ("weights", "sm_80", HI_LO): Tile(128, 64, 32, 8, 3),
    ("weights", "sm_86", 4): Tile(64, 64, 16, 8, 2),
    **{("weights", "sm_90", size): Tile(128, 128, 64, 8, 4, True, True) for size in (1, 2)},
    **{("sums", "sm_90", size): Tile(64, 128, 64, 8, 4, True, True) for size in (1, 2)},
    **{("sums", "sm_100", size): Tile(32, 64, 64, 4, 4, tma=True) for size in (1, 2, HI_LO)},
    **{("weights", "sm_100", size): Tile(128, 64, 64, 8, 4, tma=True) for size in (1, 2)},
    ("ids", "sm_80", 2): Tile(64, 64, 32, 8, 3),
    ("tops", "sm_80", 4): Tile(64, 64, 16, 8, 3),
    ("tops", "sm_86", 1): Tile(64, 128, 64, 8, 2),
    **{("tops", "sm_100", size): Tile(64, 64, 64, 8, 4, tma=True) for size in (1, 2, HI_LO)},
}


def tile(kernel: str, arch: str, itemsize: int | str, crowded: bool = False) -> Tile:
    """The tile of "sums", "weights" or "products" for operands of ``itemsize`` bytes, or HI_LO.

    "tops" are sums with maxima, "ids" those with ids. ``crowded``: two exponentials an element,
    or a triangle to stay above.
    """
    if arch == "interpreter":
        return _INTERPRETER
    # Ada and consumer Blackwell have the shared memory and the warp-level products of sm_86.
    arch = "sm_86" if arch in ("sm_89", "sm_120") else arch
    kernels = {"tops": ("tops", "sums"), "ids": ("ids", "tops", "sums")}.get(kernel, (kernel,))
    tables = (_CROWDED, _TABLE) if crowded or len(kernels) > 1 else (_TABLE,)
    # Without a row of its own HI_LO takes that of fp16; its products none that leaves the row of z.
    sizes = (HI_LO, 4 if kernel == "products" else 2) if itemsize == HI_LO else (itemsize,)
    places = ((t, (k, arch, s)) for s in sizes for t in tables for k in kernels)
    return next(table[place] for table, place in places if place in table)


@cache
def architecture(device: torch.device) -> tuple[str, int]:
    """(name in the table, multiprocessors) of a GPU; ("interpreter", 4) for the CPU."""
    if device.type != "cuda":
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942", properties.multi_processor_count
    return nearest(properties.major, properties.minor), properties.multi_processor_count


def nearest(major: int, minor: int) -> str:
    """The row of the table for a compute capability."""
    if major == 8:
        return {0: "sm_80", 9: "sm_89"}.get(minor, "sm_86")
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")
