"""The Hopper kernels built for sm_90a on a machine without a GPU (gates/cuda_kernels.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from gates import cuda_kernels as gate


@pytest.mark.slow
def test_everything_builds_without_spills_and_with_hopper_instructions(tmp_path):
    """One object where the record is of this code, nvcc and CUTLASS; otherwise every source and
    the link, and the module loads here."""
    if gate.build_cuda.nvcc() is None or gate.build_cuda.cutlass() is None:
        pytest.skip("needs nvcc and CUTLASS's headers")
    if shutil.which("ldd") is None:
        pytest.skip("no ldd")
    command = [sys.executable, gate.__file__, "--recheck", "--json", str(tmp_path / "records.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "records.json").read_text())
    assert found["wrong"] == []
    names = {record["kernel"] for record in found["kernels"]}
    for operand, kind in gate.build_cuda.instantiations:
        for stage in ("sums", "weights"):
            assert f"{stage} {operand} {kind}".lower() in names
    assert len(found["kernels"]) == 30


@pytest.mark.skipif(gate.build_cuda.nvcc() is None, reason="needs nvcc")
@pytest.mark.skipif(gate.build_cuda.cutlass() is None, reason="needs CUTLASS's headers")
def test_the_key_follows_the_code_and_not_the_words(tmp_path, monkeypatch):
    shutil.copytree(gate.CSRC / "cuda", tmp_path / "cuda")
    before, source = gate.key(tmp_path / "cuda"), tmp_path / "cuda" / "rows.cu"
    assert before == gate.key()
    text = source.read_text()
    source.write_text("// words\n" + text)
    assert gate.key(tmp_path / "cuda") == before
    source.write_text(text.replace("float", "double", 1))
    assert gate.key(tmp_path / "cuda") != before
    monkeypatch.setattr(gate.build_cuda, "flags", [*gate.build_cuda.flags, "-G"])
    assert gate.key() != before


def test_a_record_that_the_compiler_does_not_make_is_seen(tmp_path, monkeypatch):
    good = {"object": gate.RECHECKED, "kernel": "total_kernel", "registers": 20}
    monkeypatch.setattr(gate.build_cuda, "compile_commands", lambda folder: [])
    monkeypatch.setattr(gate, "compile_objects", lambda commands, jobs: {gate.RECHECKED: ""})
    monkeypatch.setattr(gate, "kernels", lambda name, said, binary: [good])
    assert gate.recheck(tmp_path, [good], 1) == []
    assert "registers" in gate.recheck(tmp_path, [good | {"registers": 24}], 1)[0]
    assert "0 kernels" in gate.recheck(tmp_path, [], 1)[0]


def test_the_gate_sees_what_it_is_for():
    good = {
        "object": "similarity_fp16_cooperative.o", "kernel": "sums", "registers": 168, "stack": 0,
        "spills": 0, "matrix": ["HGMMA"], "tma": 2, "multicast": 1,
    }  # fmt: skip
    assert gate.problems(good, "") == []
    assert "spills 8" in gate.problems(good | {"spills": 8}, "")[0]
    assert "stack 16" in gate.problems(good | {"stack": 16}, "")[0]
    assert "no HGMMA" in gate.problems(good | {"matrix": []}, "")[0]
    assert "no QGMMA" in gate.problems(good | {"object": "similarity_e4m3_cooperative.o"}, "")[0]
    assert "multicast" in gate.problems(good | {"multicast": 0}, "")[0]
    assert "serialises" in gate.problems(good, "ptxas info : (C7510) Potential Loss")[0]
    assert "registers" in gate.problems(good | {"registers": 255}, "")[0]
