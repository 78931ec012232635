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
    report = json.loads((tmp_path / "records.json").read_text())
    assert report["wrong"] == []
    names = {record["kernel"] for record in report["kernels"]}
    for operand, kind in gate.build_cuda.instantiations:
        for stage in ("sums", "weights"):
            for form in ("bounded", "unbounded"):
                assert f"{stage} {operand} {kind} {form}".lower() in names
    assert len(report["kernels"]) == 44


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
        "object": "similarity_fp16_cooperative.o", "kernel": "sums fp16 cooperative bounded",
        "registers": 168, "stack": 0, "spills": 0, "matrix": ["HGMMA"], "tma": 2, "multicast": 1,
        "way": 860, "branches": 6, "exponentials": 128, "shuffles": 60, "reconverge": 8,
        "collectives": 4,
    }  # fmt: skip
    assert gate.problems(good, "") == []
    assert "spills 8" in gate.problems(good | {"spills": 8}, "")[0]
    assert "stack 16" in gate.problems(good | {"stack": 16}, "")[0]
    assert "no HGMMA" in gate.problems(good | {"matrix": []}, "")[0]
    assert "no QGMMA" in gate.problems(good | {"object": "similarity_e4m3_cooperative.o"}, "")[0]
    assert "multicast" in gate.problems(good | {"multicast": 0}, "")[0]
    assert "serialises" in gate.problems(good, "ptxas info : (C7510) Potential Loss")[0]
    assert "registers" in gate.problems(good | {"registers": 255}, "")[0]
    assert "901 instructions" in gate.problems(good | {"way": 901}, "")[0]
    assert "0 instructions" in gate.problems(good | {"way": 0}, "")[0]
    assert "4 shuffles" in gate.problems(good | {"shuffles": 4}, "")[0]
    assert "256 exponentials" in gate.problems(good | {"exponentials": 256}, "")[0]
    assert "branches: 130" in gate.problems(good | {"branches": 130}, "")[0]
    assert "reconverge: 279" in gate.problems(good | {"reconverge": 279}, "")[0]
    assert "collectives: 484" in gate.problems(good | {"collectives": 484}, "")[0]


def test_the_way_of_a_tile_is_the_shortest_past_its_marks():
    """A mask is jumped over, the loop before is not entered, the loads are not missed."""
    listing = """
        /*0000*/  HGMMA.64x256x16.F32 R24, gdesc[UR12], R24, gsb0 ;  /* 0x0 */
                                                                     /* 0x1 */
        /*0010*/  @P0 BRA 0x0 ;
        /*0020*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/  @!P1 BRA 0x60 ;
        /*0040*/  LDG.E.64.CONSTANT R152, desc[UR10][R198.64] ;
        /*0050*/  BRA 0x70 ;
        /*0060*/  CS2R R152, SRZ ;
        /*0070*/  @P2 BRA 0xa0 ;
        /*0080*/  FSEL R1, R1, -INF , P3 ;
        /*0090*/  FSEL R2, R2, -INF , P3 ;
        /*00a0*/  MUFU.EX2 R1, R1 ;
        /*00b0*/  @P0 STG.E.128 desc[UR8][R2.64], R4 ;
        /*00c0*/  @P4 BRA 0xf0 ;
        /*00d0*/  MOVM.16.MT88 R1, R2 ;
        /*00e0*/  STG.E.128 desc[UR8][R2.64], R4 ;
        /*00f0*/  EXIT ;
    """
    code = gate.sass.instructions(listing)
    assert len(code) == 16 and code[1].conditional and code[1].operation == "BRA"
    way = [c.address for c in gate.sass.epilogue(code)]
    assert way == [0x20, 0x30, 0x40, 0x50, 0x70, 0xA0, 0xB0]
    to_a_barrier = listing.replace("@P0 STG.E.128 desc[UR8][R2.64], R4", "BAR.ARV 0x8, 0x100")
    to_a_barrier = to_a_barrier.replace("STG.E.128", "STG.E").replace("CS2R", "BAR.SYNC")
    to_a_barrier = to_a_barrier.replace("MUFU.EX2 R1, R1", "SHFL.BFLY R1, R1, 0x1, 0x1f")
    way = [c.address for c in gate.sass.epilogue(gate.sass.instructions(to_a_barrier))]
    assert way == [0x20, 0x30, 0x60, 0x70, 0xA0, 0xB0]
    assert gate.sass.epilogue(code[7:]) == []
