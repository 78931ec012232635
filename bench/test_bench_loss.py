"""The loss's grid under pytest-benchmark, for its storage and comparison.

    pytest bench --benchmark-only --benchmark-autosave
    pytest bench --benchmark-only --benchmark-compare --benchmark-compare-fail=median:30%

Its clock is the host's, so a step synchronises. ``extra_info`` has the row that the package's own
grid gives, and the ratio to eager PyTorch in turns, which holds on a machine that drifts.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from directclr_fast.bench import grid, timing
from directclr_fast.bench.settings import Settings

SETTINGS = Settings(both_rows=(), rounds=5, memory=False).resolved()
SIZES = {"cpu": (256, 1024, 4096), "cuda": (4096, 16384, 32768)}[SETTINGS.device]
CASES = {n: replace(SETTINGS, rows=(n,)).cases()[0] for n in SIZES}
GRID = [(n, v) for n, c in CASES.items() for v in SETTINGS.catalogue(c) if not v.why_not(c)]


@functools.cache
def measured(rows: int) -> dict[str, dict]:
    """The grid's row of each variant, once for all tests of this size."""
    return grid.run(replace(SETTINGS, rows=(rows,)))["cases"][0]["variants"]


@pytest.mark.parametrize("rows,variant", GRID, ids=[f"{v.name}-{n}" for n, v in GRID])
def test_loss(benchmark, rows, variant):
    row, case = measured(rows)[variant.name], CASES[rows]
    benchmark.group = f"N {rows}, d {case.dim}"
    benchmark.extra_info.update({k: v for k, v in row.items() if k != "seconds"})
    if row.get("out_of_memory"):
        pytest.skip(row["failed"])  # a result, kept above, and no error
    assert "failed" not in row, row["failed"]
    benchmark.extra_info["times_of_eager"] = timing.ratio(row, measured(rows)["eager"])
    function, (r1, r2) = variant.build(case), (r.requires_grad_() for r in case.views(seed=2))

    def step() -> None:
        r1.grad = r2.grad = None
        function(r1, r2).backward()
        timing.synchronise()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
