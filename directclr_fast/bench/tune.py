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
import json
import sys
from pathlib import Path

import torch

from directclr_fast.backends.triton import TritonStages
from directclr_fast.bench.timing import interleaved
from directclr_fast.kernels import configs, normalize, products, sums, weights
from directclr_fast.kernels.common import Layout
from directclr_fast.kernels.configs import Tile
from directclr_fast.machine import machine


def candidates(kernel: str, hopper: bool) -> list[Tile]:
    """What is tried: shapes x warps x stages, with and without descriptors and flattening."""
    shapes = {
        "sums": [(64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (64, 256)],
        "weights": [(128, 128), (128, 256), (256, 128), (64, 256)],
        "products": [(128, 128), (128, 64), (64, 128), (128, 256)],
    }[kernel]
    found = []
    for (rows, columns), inner, warps, stages in itertools.product(
        shapes, (64, 128), (4, 8), (2, 3, 4)
    ):
        tile = Tile(rows, columns, inner, warps, stages)
        if inner * (rows + columns) * 2 * stages > 220 * 1024 or rows * columns // warps > 4096:
            continue
        for tma in (False, True) if hopper else (False,):
            found.append(dataclasses.replace(tile, tma=tma))
            if kernel == "sums" and stages == 3:
                found.append(dataclasses.replace(tile, tma=tma, flatten=True))
    return found


def runner(kernel: str, layout: Layout, rows: int, tile: Tile):
    """(function to time, operations) of one kernel at this size."""
    device = torch.device("cuda")
    r = torch.randn(rows, layout.dim, device=device)
    z1, _ = normalize.normalize(layout, r, None, 1e-12)
    z2, _ = normalize.normalize(layout, torch.randn_like(r), None, 1e-12)
    operations = 2 * rows * rows * layout.dim
    if kernel == "sums":
        programs = TritonStages()._programs(device)
        strip = sums.strips(rows, rows, tile, True, False)[0]
        operations = operations * (strip.stop - strip.start) // rows
        return (
            lambda: sums.partial_sums(
                layout, z1, z2, strip, 10.0, 0, tile, programs, moving=True, bounded=True
            ),
            operations,
        )
    block = slice(0, min(rows, 8192))
    operations = 2 * block.stop**2 * layout.dim
    out = torch.zeros(block.stop**2, dtype=layout.dtype, device=device)
    if kernel == "weights":
        found = weights.Factors(rows, rows, True, True, device)
        for vector in (found.row, found.col):
            vector.fill_(1e-3)
        return (
            lambda: weights.weights(layout, z1, z2, found, 10.0, 0, block, block, out, tile),
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


def milliseconds(function, rounds: int = 9) -> float:
    """Median of device events, the L2 cache cold. RuntimeError where the tile does not run."""
    found = interleaved({"tile": function}, rounds, warmup=2, device="cuda")["tile"]
    if "failed" in found:
        raise RuntimeError(found["failed"])
    return 1e3 * found["median"]


def main(argv: list[str] | None = None) -> int:
    """Tunes the kernels asked for; best first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["sums", "weights", "products"]
    parser.add_argument("--kernel", nargs="+", choices=names, default=names)
    parser.add_argument("--dim", type=int, nargs="+", default=[360])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--precision", default="fp16", choices=["fp16", "bf16", "fp8"])
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args(argv)
    arch = configs.architecture(torch.device("cuda", 0))[0]
    results = {"machine": machine(), "arch": arch, "command": sys.argv[1:], "cases": []}
    # The library's product is timed beside ours, not instead of it.
    library = products._library_adds
    for dim, kernel in itertools.product(arguments.dim, arguments.kernel):
        layout = Layout(arguments.precision, dim)
        rows = []
        if kernel == "products":
            function, operations = runner(kernel, layout, arguments.rows, Tile(128, 128, 64, 8, 3))
            best = milliseconds(function)
            print(f"library {best:.3f} ms {operations / best / 1e9:.0f} TFLOP/s")
            rows.append({"tile": "library", "tflops": operations / best / 1e9})
            products._library_adds = lambda *_: False
        for tile in candidates(kernel, arch in ("sm_90", "sm_100")):
            row = {"tile": dataclasses.asdict(tile)}
            try:
                function, operations = runner(kernel, layout, arguments.rows, tile)
                row["ms"] = milliseconds(function)
                row["tflops"] = operations / row["ms"] / 1e9
            except Exception as error:
                row["failed"] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            rows.append(row)
        products._library_adds = library
        rows.sort(key=lambda row: -row.get("tflops", 0.0))
        results["cases"].append({"kernel": kernel, "dim": dim, "rows": rows})
        print(f"{kernel}, d {dim}, {arguments.precision}, {arch}")
        for row in rows[:8]:
            print(f"  {row.get('tflops', 0):7.1f} TFLOP/s  {row['tile']}", flush=True)
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
