"""The tables of docs/scaling.md are what its script prints of the result files."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
table = runpy.run_path(str(ROOT / "docs/scaling.py"))["table"]


@pytest.mark.parametrize("name", ("cpu-2core-zen5/distributed.json", "hosts/cost.json"))
def test_the_page_is_what_the_script_prints(name):
    page = (ROOT / "docs/scaling.md").read_text()
    assert table(ROOT / "bench/results" / name) in page
