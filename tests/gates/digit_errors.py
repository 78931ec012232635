"""Errors of the products of 8-bit digits on the emulated tiles, by rows and temperature.

    python tests/gates/digit_errors.py --out bench/results/cpu-2core-zen4/digits.json

Of each case: relative errors of the loss and of both gradients against fp64, as a share of what
docs/design.md section 6 allows, for the fp32 kernels and for the body with tiles, and which
products this one chose. The exit status is 1 where the chosen digits exceed what is allowed.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

from directclr_fast import _cpu, fast_directclr_loss, machine
from directclr_fast.testing import bound, eager_loss, evaluate, make_views, relative_error

ROWS = 512
MADE = ("views", "unrelated", "converged", "clustered")
OTHERS = ("relu", "signs", "heavy 0.3", "heavy 0.6", "heavy 1.0", "one-hot 0.5", "one-hot 2.0")


def views(kind: str, d: int) -> list[torch.Tensor]:
    """Two views (512, d) fp32. "heavy" and "one-hot" have the width of their tails and noise."""
    if kind in MADE:
        return list(make_views(ROWS, d, kind=kind))
    generator = torch.Generator().manual_seed(0)

    def gaussian() -> torch.Tensor:
        return torch.randn(ROWS, d, generator=generator, dtype=torch.float64)

    base, width = gaussian(), float(kind.split()[-1]) if " " in kind else 0.0
    if kind == "relu":
        return [(base + 0.5 * gaussian()).relu().float() for _ in range(2)]
    if kind == "signs":
        return [torch.where(gaussian() < -1.64, -base.sign(), base.sign()).float() for _ in "12"]
    if kind.startswith("heavy"):
        base = base * torch.exp(width * gaussian())
        return [(base * (1 + 0.3 * gaussian())).float() for _ in range(2)]
    base = 0.02 * width * base
    base[torch.arange(ROWS), torch.randint(d, (ROWS,), generator=generator)] += 1.0
    return [(base + 0.01 * gaussian()).float() for _ in range(2)]


def case(kind: str, d: int, temperature: float) -> dict:
    x1, x2 = views(kind, d)
    given = {"temperature": temperature}
    truth = evaluate(eager_loss, x1.double(), x2.double(), None, **given)
    eager = evaluate(eager_loss, x1, x2, None, **given)
    allowed = [bound(relative_error(e, t), torch.float32) for e, t in zip(eager[:3], truth)]
    row = {"rows": kind, "d": d, **given, "eager": relative_error(eager[1], truth[1])}
    for name, isa in (("fp32", "avx2"), ("tiles", "tiles")):
        _cpu.force_isa(isa if isa in _cpu.available_isas() else "portable")
        ours = evaluate(fast_directclr_loss, x1, x2, None, backend="cpu", **given)
        errors = [relative_error(o, t) for o, t in zip(ours[:3], truth)]
        row[name] = errors[1]
        row[f"{name}, of allowed"] = max(e / a for e, a in zip(errors, allowed))
    return {**row, "products": _cpu.arithmetic()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="JSON file, written when all is measured")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 360])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 0.1, 0.05])
    args = parser.parse_args()
    cases = []
    for d in args.dims:
        for kind in (*MADE, *OTHERS):
            for temperature in args.temperatures:
                cases.append(case(kind, d, temperature))
                print(json.dumps(cases[-1]), flush=True)
    digits = [c for c in cases if c["products"] != "fp32"]
    eight = sum(c["products"] == "int8x8" for c in cases)
    worst = max(c["tiles, of allowed"] for c in digits)
    worse = [c["tiles"] / c["fp32"] for c in digits if c["tiles"] > c["fp32"]]
    print(
        f"{len(digits)} of {len(cases)} cases took digits, {eight} eight products: at most "
        f"{worst:.2f} of what is allowed; the gradient is worse than the fp32 kernels' in "
        f"{len(worse)}, by {max(worse, default=1.0):.1f} times at most"
    )
    if args.out:
        with open(args.out, "w") as file:
            json.dump(
                {"machine": machine.machine(gpu=False), "rows": ROWS, "cases": cases},
                file,
                indent=1,
            )
            file.write("\n")
    return 1 if worst > 1.0 else 0


if __name__ == "__main__":
    sys.exit(main())
