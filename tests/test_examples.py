"""Every file of examples/ runs and its loss falls, or it says in a sentence what it needs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import waiting

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"with_lightning": "lightning"}


def run(folder, *command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return waiting.process([sys.executable, *command], folder, env=environment)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    done = run(tmp_path, EXAMPLES / f"{name}.py")
    assert done.returncode == 0, done.stderr[-4000:]
    first, last = re.match(r"loss: ([\d.]+) at first, ([\d.]+) after", done.stdout).groups()
    assert float(last) < 0.9 * float(first)


@pytest.mark.parametrize("name", NEEDS)
def test_example_without_its_package(name, tmp_path):
    absent = f"import runpy, sys; sys.modules[{NEEDS[name]!r}] = None; "
    code = absent + f"runpy.run_path({str(EXAMPLES / name)!r} + '.py', run_name='__main__')"
    done = run(tmp_path, "-c", code)
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(rf"This example needs .*pip install {NEEDS[name]}.*\.\n", done.stderr)
