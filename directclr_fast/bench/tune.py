"""Times candidate tiles of one Triton kernel on this GPU and prints the rows for the table.

    python -m directclr_fast.bench.tune --kernel sums weights products --dim 360 --out tune.json

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
from ..kernels import configs, normalize, products, weights
from ..kernels.common import Layout
from ..kernels.configs import Tile
from . import study
from .timing import failure, interleaved

KERNELS = ("sums", "weights", "products")
FLAGS = {
    "--kernel": {"nargs": "+", "choices": KERNELS, "default": KERNELS},
    "--dim": {"type": int, "nargs": "+", "default": [360]},
    "--rows": {"type": int, "default": 16384},
    "--precision": {"default": "fp16", "choices": ("fp16", "bf16", "fp8")},
}


def candidates(kernel: str, hopper: bool) -> Iterator[Tile]:
    """What is tried: shapes x warps x stages, with and without descriptors and flattening."""
    shapes = {
        "sums": [(64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (64, 256)],
        "weights": [(128, 128), (128, 256), (256, 128), (64, 256)],
        "products": [(128, 128), (128, 64), (64, 128), (128, 256)],
    }[kernel]
    for (rows, columns), inner, warps, stages in itertools.product(
        shapes, (64, 128), (4, 8), (2, 3, 4)
    ):
        tile = Tile(rows, columns, inner, warps, stages)
        if inner * (rows + columns) * 2 * stages > 220 * 1024 or rows * columns // warps > 4096:
            continue
        for tma in (False, True) if hopper else (False,):
            yield dataclasses.replace(tile, tma=tma)
            if kernel == "sums" and stages == 3:
                yield dataclasses.replace(tile, tma=tma, flatten=True)


def runner(kernel: str, layout: Layout, rows: int, tile: Tile):
    """(function to time, operations) of one kernel at this size."""
    device = torch.device("cuda")
    r = torch.randn(rows, layout.dim, device=device)
    z1, _ = normalize.normalize(layout, r, None, 1e-12)
    z2, _ = normalize.normalize(layout, torch.randn_like(r), None, 1e-12)
    operations = 2 * rows * rows * layout.dim
    if kernel == "sums":
        backend = Triton()
        strip = backend._strips(z1, z2, tile, True, False)[0]
        operations = operations * (strip.stop - strip.start) // rows
        return (
            lambda: backend._partials(
                layout, z1, z2, strip, 10.0, 0, tile, columns=True, bounded=True, tops=None
            ),
            operations,
        )
    block = slice(0, min(rows, 8192))
    operations = 2 * block.stop**2 * layout.dim
    out = torch.zeros(block.stop**2, dtype=layout.dtype, device=device)
    if kernel == "weights":
        factors = weights.Factors(rows, rows, True, True, device)
        for vector in (factors.row, factors.col):
            vector.fill_(1e-3)
        return (
            lambda: weights.weights(layout, z1, z2, factors, 10.0, 0, block, block, out, tile),
            operations,
        )
    dz = torch.empty(rows, layout.pitch, device=device)
    p = out.view(block.stop, block.stop)
    return (
        lambda: products.product(
            layout, p, z2, dz, block, block, transposed=False, add=False, tile=tile
        ),
        operations,
    )


def timed(kernel: str, layout: Layout, rows: int, tile: Tile) -> dict:
    """{"ms", "tflops"}, the L2 cache cold; {"failed"} where the tile does not compile or run."""
    try:
        function, operations = runner(kernel, layout, rows, tile)
        times = interleaved({"tile": function}, 9, warmup=2, device="cuda")["tile"]
    except Exception as error:
        times = failure(error)
    if "failed" in times:
        return {"failed": times["failed"]}
    ms = 1e3 * times["median"]
    return {"ms": ms, "tflops": operations / ms / 1e9}


def measure(arguments: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """Every kernel at every d, the best tiles first."""
    arch = configs.architecture(torch.device("cuda", 0))[0]
    for dim, kernel in itertools.product(arguments.dim, arguments.kernel):
        size = (kernel, Layout(arguments.precision, dim), arguments.rows)
        rows = []
        library = products._library_adds
        if kernel == "products":  # the library's product is timed beside ours, not instead of it
            rows.append({"tile": "library", **timed(*size, Tile(128, 128, 64, 8, 3))})
            products._library_adds = lambda *_: False
        for tile in candidates(kernel, arch in ("sm_90", "sm_100")):
            rows.append({"tile": dataclasses.asdict(tile), **timed(*size, tile)})
        products._library_adds = library
        rows.sort(key=lambda row: -row.get("tflops", 0.0))
        lines = [f"{kernel}, d {dim}, {arguments.precision}, {arch}"]
        lines += [f"  {row.get('tflops', 0):7.1f} TFLOP/s  {row['tile']}" for row in rows[:8]]
        yield {"kernel": kernel, "dim": dim, "arch": arch, "rows": rows}, "\n".join(lines)


study.as_script(__name__)
