"""Times the loss, forward and backward, against plain PyTorch; writes one JSON file.

    python bench/loss.py --rows 2048 4096 8192 --out bench/results/cpu-2core-zen5/loss.json

Variants, interleaved in one process: "released", two cross entropies and two logits matrices as in
the DirectCLR release; "eager", one logits matrix; "compiled", torch.compile of that; and every
backend of this package that can run the call. Each is checked against the reference in fp64 before
it is timed (on a smaller batch), and its error beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from timing import fma_peak, interleaved, machine, matmul_rate

from directclr_fast import dispatch, fast_directclr_loss, flops
from directclr_fast.testing import eager_loss, evaluate, make_views, relative_error

CHECKED_ROWS = 512


def released_loss(r1, r2, dim, temperature=0.1):
    """The released trainer's arithmetic: each direction normalises and multiplies anew."""

    def one_direction(x, y):
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        return F.cross_entropy(x @ y.T / temperature, torch.arange(len(x), device=x.device))

    x, y = r1[:, :dim], r2[:, :dim]
    return one_direction(x, y) / 2 + one_direction(y, x) / 2


def variants(dim: int) -> dict:
    """Name to function of (r1, r2)."""
    compiled = torch.compile(eager_loss, dynamic=False)
    found = {
        "released": lambda a, b: released_loss(a, b, dim),
        "eager": lambda a, b: eager_loss(a, b, dim),
        "compiled": lambda a, b: compiled(a, b, dim),
    }
    for name in dispatch.PRIORITY:
        if name != "reference":
            found[name] = lambda a, b, name=name: fast_directclr_loss(a, b, dim, backend=name)
    return found


def errors(functions: dict, rows: int, width: int, dim: int) -> dict[str, float]:
    """Relative error of the gradient of r1 against fp64, per variant."""
    r1, r2 = make_views(min(rows, CHECKED_ROWS), width)
    truth = evaluate(lambda a, b, **_: eager_loss(a, b, dim), r1.double(), r2.double())
    return {
        name: relative_error(evaluate(lambda a, b, f=f, **_: f(a, b), r1, r2).dr1, truth.dr1)
        for name, f in functions.items()
    }


def measure(rows: int, width: int, dim: int, rounds: int) -> dict:
    """One row of the table: times, rates at 8c, ratios and errors at this shape."""
    torch._dynamo.reset()
    functions = variants(dim)
    wrong = {n: e for n, e in errors(functions, rows, width, dim).items() if not e < 1e-4}
    if wrong:
        raise RuntimeError(f"not the same loss, so not timed: {wrong}")
    r1, r2 = make_views(rows, width)
    r1.requires_grad_(), r2.requires_grad_()

    def step(function):
        r1.grad = r2.grad = None
        function(r1, r2).backward()

    peaks = [fma_peak()]
    times = interleaved({n: lambda f=f: step(f) for n, f in functions.items()}, rounds)
    peaks.append(fma_peak())
    work = flops.total(rows, rows, dim)
    result = {
        "rows": rows,
        "width": width,
        "dim": dim,
        "mm_gflops": round(matmul_rate(rows, rows, dim) / 1e9, 1),
        "fma_peak_gflops": None if None in peaks else round(sum(peaks) / 2e9, 1),
        "error": errors(functions, rows, width, dim),
        "variants": times,
    }
    for values in times.values():
        if "median" in values:
            values["gflops_at_8c"] = round(work / values["median"] / 1e9, 1)
    return result


def main(argv: list[str] | None = None) -> int:
    """Measures the grid asked for and prints it as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--dim", type=int, nargs="+", default=[360])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args(argv)
    results = {"machine": machine(), "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}
    results["cases"] = []
    for dim in arguments.dim:
        for rows in arguments.rows:
            case = measure(rows, arguments.width, dim, arguments.rounds)
            results["cases"].append(case)
            print(
                f"N {rows}, d {dim} of {arguments.width}, mm {case['mm_gflops']} GFLOP/s, "
                f"FMA peak {case['fma_peak_gflops']} GFLOP/s"
            )
            for name, values in case["variants"].items():
                if "median" not in values:
                    print(f"  {name:<10} {values['failed']}")
                    continue
                ratio = case["variants"]["released"].get("median", float("nan"))
                print(
                    f"  {name:<10} {1e3 * values['median']:9.2f} ms  "
                    f"{values['gflops_at_8c']:7.1f} GFLOP/s at 8c  "
                    f"{ratio / values['median']:5.2f}x the released  "
                    f"error {case['error'][name]:.1e}",
                    flush=True,
                )
    if arguments.out:
        path = Path(arguments.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
