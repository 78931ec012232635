"""Times candidate tiles of one Triton kernel on this GPU and prints the rows for the table.

Nothing is tuned while the loss runs: what this prints is put into ``kernels/configs.py`` by hand,
with the file it came from as the reason. A candidate that does not compile or needs too much shared
memory is recorded as that.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator

import torch

from ..backends.triton import Triton
from ..kernels import configs, products
from ..kernels.configs import Tile
from ..problem import Problem
from . import launches, study
from .timing import failure
from .variants import Case

LAUNCHES = {"sums": "sums", "weights": "weights", "products": "product"}  # of each kernel
FLAGS = {
    "--kernel": {"nargs": "+", "choices": [*LAUNCHES], "default": [*LAUNCHES]},
    "--dim": {"type": int, "nargs": "+", "default": [360]},
    "--rows": {"type": int, "default": 16384, "help": "a multiple of 256, the largest tile"},
    "--precision": {"default": "fp16", "choices": ("fp16", "bf16", "fp8")},
    "--device": launches.FLAGS["--device"],
}


def candidates(kernel: str, hopper: bool) -> Iterator[Tile]:
    """What is tried: shapes x warps x stages, with and without descriptors; flattened first."""
    shapes = {
        "sums": [(64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (64, 256)],
        "weights": [(128, 128), (128, 256), (256, 128), (64, 256)],
        "products": [(128, 128), (128, 64), (64, 128), (128, 256)],
    }[kernel]
    for (rows, columns), inner, warps, stages in itertools.product(
        shapes, (64, 128), (4, 8), (2, 3, 4)
    ):
        fold = 4 if columns >= 32 * warps else 2
        tile = Tile(rows, columns, inner, warps, stages, fold=fold)
        if inner * (rows + columns) * 2 * stages > 220 * 1024 or rows * columns // warps > 4096:
            continue
        for tma in (False, True) if hopper else (False,):
            if kernel != "products":
                yield dataclasses.replace(tile, tma=tma, flatten=True)
            if kernel == "products" or stages == 3:
                yield dataclasses.replace(tile, tma=tma)


def timed(kernel: str, problem: Problem, tile: Tile) -> dict:
    """{"ms", "tflops"} of its launches in a step; {"failed"} where it does not compile or run."""
    backend, launch = Triton(), LAUNCHES[kernel]
    usual = backend._tile
    backend._tile = lambda name, *how: tile if name == kernel else usual(name, *how)
    try:
        ms = launches.medians(backend, problem, 9)[launch]
    except Exception as error:
        return {"failed": failure(error)["failed"]}
    return {"ms": ms, "tflops": launches.rate(launch, problem, ms)}


def measure(arguments: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """Every kernel at every d, the best tiles first."""
    device = arguments.device
    arch = configs.architecture(torch.device(device))[0]
    for dim, kernel in itertools.product(arguments.dim, arguments.kernel):
        problem = Case(arguments.rows, dim, dim, device=device).problem(arguments.precision)
        rows = []
        library = products._library_adds
        if kernel == "products":  # the library's product is timed beside ours, not instead of it
            rows.append({"tile": "library", **timed(kernel, problem, Tile(128, 128, 64, 8, 3))})
            products._library_adds = lambda *_: False
        for tile in candidates(kernel, arch in ("sm_90", "sm_100")):
            rows.append({"tile": dataclasses.asdict(tile), **timed(kernel, problem, tile)})
        products._library_adds = library
        rows.sort(key=lambda row: -row.get("tflops", 0.0))
        lines = [f"{kernel}, d {dim}, {arguments.precision}, {arch}"]
        lines += [f"  {row.get('tflops', 0):7.1f} TFLOP/s  {row['tile']}" for row in rows[:8]]
        yield {"kernel": kernel, "dim": dim, "arch": arch, "rows": rows}, "\n".join(lines)


study.as_script(__name__)
