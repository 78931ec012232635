"""Times the loss on a CUDA GPU, forward and backward, beside its peers and the chip's own ceilings.

    python bench/gpu_loss.py --rows 4096 16384 32768 --dim 360 --out bench/results/h200/loss.json

Every variant computes the same loss of the same bf16 representations and is checked against fp64
first (on fewer rows); one that cannot run (not installed, out of memory) is recorded as that. Times
are device events around whole steps, variants in turn, medians. Rates count 8 N^2 d operations; the
roofs, measured in the same run, are the library's products at the same N and d and a copy.

Peers: "released" (two logits matrices) and "eager" (one) under bf16 autocast, "compiled" (the
latter), memeff (stable=False) and inf_cl where they are installed, at their own precision.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from loss import released_loss
from timing import machine

from directclr_fast import fast_directclr_loss, flops
from directclr_fast.testing import eager_loss, evaluate, make_views, relative_error

CHECKED_ROWS = 1024
TEMPERATURE = 0.1


def variants(dim: int, precisions: list[str]) -> dict[str, Callable]:
    """Name to function of (r1, r2), both of them bf16."""

    def autocast(function):
        def run(a, b):
            with torch.autocast("cuda", torch.bfloat16):
                return function(a, b, dim)

        return run

    compiled = torch.compile(eager_loss, dynamic=False)
    found = {
        f"triton {p}": lambda a, b, p=p: fast_directclr_loss(
            a, b, dim, TEMPERATURE, precision=p, backend="triton"
        )
        for p in precisions
    }
    found |= {
        "released": autocast(released_loss),
        "eager": autocast(eager_loss),
        "compiled": autocast(compiled),
    }
    try:
        from memeff import MemoryEfficientCLIPLoss

        module = MemoryEfficientCLIPLoss(temperature=TEMPERATURE, stable=False)
        # Its own normalisation is left to it; it wants contiguous rows.
        found["memeff"] = lambda a, b: module(a[:, :dim].contiguous(), b[:, :dim].contiguous())
    except ImportError:
        pass
    try:
        from inf_cl import cal_flash_loss

        head = next(h for h in (256, 128, 64, 32, 16, 8) if dim % h == 0)

        def inf_cl(a, b):
            x, y = (F.normalize(r[:, :dim].float(), dim=1) for r in (a, b))
            one = cal_flash_loss(x, y, scale=1 / TEMPERATURE, head_dim=head)
            other = cal_flash_loss(y, x, scale=1 / TEMPERATURE, head_dim=head)
            return (one.mean() + other.mean()) / 2

        found["inf_cl"] = inf_cl
    except ImportError:
        pass
    return found


def errors(functions: dict[str, Callable], width: int, dim: int) -> dict[str, float | str]:
    """Relative error of the gradient of r1 against fp64, or why there is none."""
    r1, r2 = make_views(CHECKED_ROWS, width, dtype=torch.bfloat16, device="cuda")
    truth = evaluate(lambda a, b, **_: eager_loss(a, b, dim), r1.double(), r2.double())
    found: dict[str, float | str] = {}
    for name, function in functions.items():
        try:
            # Gradients rounded to bf16 would all look alike: fp32 copies of the same values.
            got = evaluate(lambda a, b, f=function, **_: f(a, b), r1.float(), r2.float())
            found[name] = relative_error(got.dr1, truth.dr1)
        except Exception as error:  # a peer's failure is a row of the table
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return found


def timed(functions: dict[str, Callable], rounds: int) -> dict[str, dict]:
    """Milliseconds by device events, variants in turn; peak MiB above what stood before."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    peak: dict[str, float] = {}
    failed: dict[str, str] = {}
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # beyond any L2
    for turn in range(rounds + 2):
        for name, function in functions.items():
            if name in failed:
                continue
            try:
                flush.zero_()
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                stop.record()
                torch.cuda.synchronize()
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
                if turn >= 2:
                    times[name].append(start.elapsed_time(stop))
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                torch.cuda.empty_cache()
    found = {}
    for name in functions:
        if name in failed:
            found[name] = {"failed": failed[name]}
            continue
        values = sorted(times[name])
        found[name] = {
            "median_ms": statistics.median(values),
            "quartiles_ms": [values[len(values) // 4], values[3 * len(values) // 4]],
            "peak_mib": round(peak[name], 1),
        }
    return found


def roofs(rows: int, dim: int, rounds: int = 5) -> dict[str, float]:
    """Library rates at these sizes: the three products of 6c operations, and a large copy."""
    rows = min(rows, 16384)
    z = [torch.randn(rows, dim, device="cuda").half() for _ in range(2)]
    s = torch.empty(rows, rows, dtype=torch.float16, device="cuda")
    out = [torch.empty(rows, dim, dtype=torch.float32, device="cuda") for _ in range(2)]

    def products() -> None:
        torch.mm(z[0], z[1].T, out=s)
        torch.ops.aten.mm.dtype_out(s, z[1], torch.float32, out=out[0])
        torch.ops.aten.mm.dtype_out(s.T, z[0], torch.float32, out=out[1])

    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    square = torch.randn(8192, 8192, device="cuda").half()
    found = timed(
        {
            "products": products,
            "copy": lambda: target.copy_(source),
            "square": lambda: square @ square,
        },
        rounds,
    )

    def seconds(name: str) -> float:
        return found[name].get("median_ms", float("nan")) / 1e3

    return {
        "products_tflops": round(6 * rows * rows * dim / seconds("products") / 1e12, 1),
        "square_fp16_tflops": round(2 * 8192**3 / seconds("square") / 1e12, 1),
        "copy_tb_s": round(2 * source.numel() * 4 / seconds("copy") / 1e12, 2),
    }


def measure(rows: int, width: int, dim: int, precisions: list[str], rounds: int) -> dict:
    """One case of the table."""
    torch._dynamo.reset()
    functions = variants(dim, precisions)
    wrong = errors(functions, width, dim)
    r1, r2 = make_views(min(rows, 4096), width, dtype=torch.bfloat16, device="cuda")
    repeats = -(-rows // len(r1))
    generator = torch.Generator("cuda").manual_seed(1)

    def grown(r: torch.Tensor) -> torch.Tensor:
        """More rows of the same kind, drawn on the device."""
        noise = torch.randn(rows, width, device="cuda", dtype=r.dtype, generator=generator)
        return (r.repeat(repeats, 1)[:rows] + 0.7 * noise).requires_grad_()

    r1, r2 = grown(r1), grown(r2)

    def step(function) -> Callable:
        def run():
            r1.grad = r2.grad = None
            function(r1, r2).backward()

        return run

    usable = {n: f for n, f in functions.items() if isinstance(wrong[n], float) and wrong[n] < 0.1}
    # N x N matrices of a plain step: not tried where they cannot fit.
    room = torch.cuda.get_device_properties(0).total_memory
    if 10 * rows * rows > room:
        usable = {n: f for n, f in usable.items() if n not in ("released", "eager", "compiled")}
    found = timed({n: step(f) for n, f in usable.items()}, rounds)
    forward = timed(
        {n: lambda f=f: f(r1.detach(), r2.detach()) for n, f in usable.items() if "triton" in n},
        rounds,
    )
    work = flops.total(rows, rows, dim)
    roof = roofs(rows, dim)
    for name, values in found.items():
        if "median_ms" in values:
            rate = work / values["median_ms"] / 1e9
            values["tflops_at_8c"] = round(rate, 1)
            values["rho"] = round(rate / roof["products_tflops"], 3)
        if name in forward:
            values["forward_ms"] = forward[name].get("median_ms")
    return {
        "rows": rows, "width": width, "dim": dim, "roofs": roof, "error": wrong, "variants": found,
    }  # fmt: skip


def gpu() -> dict:
    """The card, its driver and clocks as they are found."""
    fields = "name,driver_version,clocks.sm,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields.split(","), (part.strip() for part in text.split(","))))


def main(argv: list[str] | None = None) -> int:
    """Measures the grid asked for; the file is written after every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--dim", type=int, nargs="+", default=[360])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--precisions", nargs="+", default=["fp16", "fp8"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args(argv)
    import triton

    results = {
        "machine": machine() | {"triton": triton.__version__, "card": gpu()},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "cases": [],
    }
    for dim in arguments.dim:
        for rows in arguments.rows:
            width = max(arguments.width, dim)
            case = measure(rows, width, dim, arguments.precisions, arguments.rounds)
            results["cases"].append(case)
            print(f"N {rows}, d {dim} of {width}: {case['roofs']}")
            for name, values in case["variants"].items():
                print(f"  {name:<14} {values}  error {case['error'][name]}", flush=True)
            for name in case["error"].keys() - case["variants"].keys():
                print(f"  {name:<14} not timed: {case['error'][name]}", flush=True)
            if arguments.out:
                path = Path(arguments.out)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
