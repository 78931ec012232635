"""The most that this machine can do, measured beside the figures that are held against it.

"fma": a loop of independent fp32 multiply-adds on every thread (CPU, by the native extension).
"tiles", where the processor has a matrix unit: products of tiles on random data from L1 with a load
for each, divided by how many of them a product of that precision takes; "tiles 2:1" with half the
loads.
"square": the library's product of two large square matrices. "products": its three products of a
step that keeps its N x N matrix, at the same N and d. "copy": bytes read and written per second.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

from ..backends.cpu import _cpu
from ..products import fp32_products
from .timing import interleaved

_DTYPES = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16
}  # fmt: skip
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "tf32", "bf16", "fp16")}
SQUARE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
PRODUCT_ROWS = 16384  # the library's rate no longer changes beyond


def _loop_rate(loop: Callable[[], float], rounds: int) -> float:
    """Median operations per second of a native loop, which returns how many it did."""
    rates = []
    for _ in range(rounds):
        start = time.perf_counter()
        operations = loop()
        rates.append(operations / (time.perf_counter() - start))
    return statistics.median(rates)


def fma_peak(rounds: int = 9) -> float | None:
    """fp32 operations per second of the CPU's multiply-add units. None without the extension."""
    if _cpu is None:
        return None
    return _loop_rate(lambda: _cpu.fma_peak(torch.get_num_threads(), 1_000_000), rounds)


# Whether its tiles are of bf16, and products of tiles to one of numbers.
_TILES = {"fp32": (False, 6), "tf32": (False, 3), "bf16": (True, 1)}


def tile_rates(rounds: int = 9) -> dict[str, float]:
    """Operations per second of the CPU's matrix unit, by name; empty where there is none."""
    if _cpu is None or not _cpu.has_tiles():
        return {}
    iterations = 1_000_000 if _cpu.isa() == "amx" else 200  # emulated, it is there to be tested
    rates = {}
    for bf16, few_loads in itertools.product((False, True), (False, True)):
        loop = (torch.get_num_threads(), iterations, bf16, few_loads)
        rate = _loop_rate(lambda loop=loop: _cpu.tile_peak(*loop), rounds)
        for precision, (is_bf16, products) in _TILES.items():
            if is_bf16 == bf16:
                rates[f"{'tiles 2:1' if few_loads else 'tiles'} {precision}"] = rate / products
    return rates


def _rate(
    operations: int, call: Callable[[], object], device: str, precision: str = "", rounds: int = 5
) -> float | None:
    """``operations`` over the median seconds of ``call``, in which fp32 products of the library run
    in TF32 where ``precision`` says so. None if it fails."""
    with fp32_products(device, "tf32" if precision == "tf32" else "ieee"):
        times = interleaved({"call": call}, rounds, warmup=2, device=device)["call"]
    return operations / times["median"] if "median" in times else None


def square_rate(precision: str, device: str = "cpu") -> float | None:
    """Operations per second of a large square library product. None where there is none."""
    side, dtype = SQUARE[device], _DTYPES[precision]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return _rate(2 * side**3, lambda: a @ b, device, precision)


def products_rate(precision: str, rows: int, dim: int, device: str) -> float | None:
    """Operations per second of z1 z2^T, G z2 and G^T z1 by the library, fp32 results of the last
    two where the library has them."""
    rows, dtype = min(rows, PRODUCT_ROWS), _DTYPES[precision]
    z1, z2 = (torch.randn(rows, dim, device=device).to(dtype) for _ in range(2))
    s = torch.empty(rows, rows, dtype=dtype, device=device)
    wide = device == "cuda" and dtype.itemsize == 2 and hasattr(torch.ops.aten.mm, "dtype_out")
    out = torch.empty(rows, dim, dtype=torch.float32 if wide else dtype, device=device)

    def product(left, right) -> None:
        if wide:
            torch.ops.aten.mm.dtype_out(left, right, torch.float32, out=out)
        else:
            torch.mm(left, right, out=out)

    def all_three() -> None:
        torch.mm(z1, z2.T, out=s)
        product(s, z2)
        product(s.T, z1)

    work = (6 * rows * rows * dim, all_three, device, precision, 3)
    rate = _rate(*work)
    if wide and rate is None:  # this library has no such product
        wide, out = False, out.to(dtype)
        rate = _rate(*work)
    return rate


def measure(device: str) -> dict[str, float]:
    """Ceilings that do not depend on the case: operations/s by name, and "copy" in bytes/s, read
    and written."""
    source = torch.zeros(COPY_BYTES[device] // 4, device=device).normal_()
    target = torch.empty_like(source)
    rates = {"copy": _rate(2 * COPY_BYTES[device], lambda: target.copy_(source), device)}
    if device == "cpu":
        rates |= {"fma fp32": fma_peak(), **tile_rates()}
    for precision in PRECISIONS[device]:
        rates[f"square {precision}"] = square_rate(precision, device)
    return {name: rate for name, rate in rates.items() if rate is not None}


def unit_of(precision: str) -> str:
    """The library's precision that a variant's products are held against."""
    return "fp16" if precision == "fp8" else precision


def roof(ceilings: dict[str, float], precision: str) -> float | None:
    """The highest rate measured for this precision, on this machine or at this case."""
    unit = unit_of(precision)
    kinds = ("fma", "tiles", "tiles 2:1", "square", "products")
    names = [f"{kind} {unit}" for kind in kinds]
    return max((ceilings[name] for name in names if name in ceilings), default=None)


def least_bytes(rows: int, width: int, dim: int, itemsize: int) -> int:
    """Bytes a step must move: the slice of both views read, both full-width gradients written."""
    return 2 * rows * (dim + width) * itemsize
