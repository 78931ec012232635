"""The model of docs/scaling.md: against its own counts, and the page against what it prints."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from directclr_fast import flops

ROOT = Path(__file__).parents[1]
MODEL = runpy.run_path(str(ROOT / "docs/scaling.py"))
step_time = MODEL["step_time"]


@pytest.mark.parametrize("gather", ("all", "ring"))
def test_the_model_agrees_with_the_counts(gather):
    """Without latency and launches: operations / rate and, where nothing hides, bytes / link."""
    rows, dim, size = 2**16, 64, 8
    still = replace(MODEL["H200"], near_hop=0.0, far_hop=0.0, launch=0.0)
    slow = replace(still, near=1.0)  # nothing hides behind products then
    step = step_time(rows, dim, size, gather, still)
    assert step.compute == flops.distributed(rows, dim, size) / still.rate
    assert step.total == step.compute + step.exposed
    sent = step_time(rows, dim, size, gather, slow).exposed
    counted = MODEL["sent_bytes"](rows, dim, size, gather, itemsize=2)
    assert sent == pytest.approx(counted, rel=1e-5)
    one = step_time(rows, dim, 1, gather, still)
    assert one.exposed == 0 and one.compute == size * step.compute
    held = [step_time(rows, dim, w, gather).held_bytes for w in (2, 16)]
    assert (held[0] / held[1] == 8) == (gather == "ring")


def test_the_page_is_what_the_script_prints():
    page = (ROOT / "docs/scaling.md").read_text()
    measured = ROOT / "bench/results/cpu-2core-zen5/distributed.json"
    printed = [MODEL["table"](), MODEL["measured"](str(measured))]
    printed += MODEL["over_hosts"](str(ROOT / "bench/results/hosts/cost.json"))
    for line in "\n".join(printed).splitlines():
        assert line.rstrip() in page
