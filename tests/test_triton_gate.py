"""Every Triton kernel that ships, compiled for GPUs that are not there (bench/triton_gate.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "bench" / "triton_gate.py"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills_and_with_matrix_instructions(arch, tmp_path):
    """The script fails on a spill, on too much shared memory, or on a missing instruction."""
    # In a process of its own: the kernels of this one are interpreted.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, str(SCRIPT), "--arch", arch, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    kernels = {row["kernel"] for row in rows}
    assert kernels == {
        "_normalize_kernel", "_positives_kernel", "_sums_kernel", "_fold_kernel",
        "_combine_kernel", "_total_kernel", "_factors_kernel", "_weights_kernel",
        "_product_kernel", "_finish_kernel", "_add_positives_kernel",
    }  # fmt: skip
    halves = [row for row in rows if row["kernel"] == "_sums_kernel" and "fp16" in row["what"]]
    wanted = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}[arch]
    assert halves and all(wanted in row["matrix"] for row in halves)


def test_the_gate_sees_a_spill_and_a_missing_instruction():
    code = """
import sys
sys.path.insert(0, {folder!r})
import triton_gate as gate
entry = gate.Launch("sums", "_sums_kernel", ("*fp16", "*fp16"), (True, True),
                    (("PRECISION", "ieee"),), 8, 3)
good = dict(spills=0, stack=0, shared=1000, matrix=["HGMMA"])
assert gate._problems(good, entry, "sm_90") == []
assert "spills" in gate._problems(good | dict(spills=2), entry, "sm_90")[0]
assert "shared" in gate._problems(good | dict(shared=2**18), entry, "sm_90")[0]
assert "HGMMA" in gate._problems(good | dict(matrix=["HMMA"]), entry, "sm_90")[0]
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = code.format(folder=str(SCRIPT.parent))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
