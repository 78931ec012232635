"""Every Triton kernel that ships, compiled for GPUs that are not there (gates/triton_kernels.py).

What the record holds for the installed Triton is read from it; the rest, all of it with a Triton
that was never judged, is compiled here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "gates" / "triton_kernels.py"
MATRIX = {
    "sm_80": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}
# In a process of its own: the kernels of this one are interpreted.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
RECHECKED = 3


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """(process, rows) of one run over all architectures."""
    folder = tmp_path_factory.mktemp("gate")
    command = [sys.executable, str(SCRIPT), "--json", str(folder / "rows.json")]
    done = subprocess.run(
        [*command, "--recheck", str(RECHECKED)],
        env=ENVIRONMENT | {"TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert (folder / "rows.json").exists(), done.stderr[-3000:]
    print(done.stdout.splitlines()[-1])
    return done, json.loads((folder / "rows.json").read_text())


@pytest.mark.slow
@pytest.mark.xdist_group("triton_gate")
@pytest.mark.parametrize("arch", MATRIX)
def test_kernels_compile_without_spills_and_with_matrix_instructions(gate, arch):
    """The script finds a spill, too much shared memory, or a missing instruction."""
    rows = [row for row in gate[1] if row["arch"] == arch]
    assert [(row["what"], row["problems"]) for row in rows if row["problems"]] == []
    kernels = {row["kernel"] for row in rows}
    assert kernels == {
        "_normalize_kernel", "_positives_kernel", "_sums_kernel", "_fold_kernel",
        "_combine_kernel", "_total_kernel", "_factors_kernel", "_weights_kernel",
        "_product_kernel", "_finish_kernel", "_add_positives_kernel",
    }  # fmt: skip
    halves = [row for row in rows if row["kernel"] == "_sums_kernel" and "fp16" in row["what"]]
    assert halves and all(MATRIX[arch] in row["matrix"] for row in halves)


@pytest.mark.slow
@pytest.mark.xdist_group("triton_gate")
def test_the_record_is_what_the_compiler_makes(gate):
    """Some kernels are compiled again in every run of the suite, and compared with the record."""
    done, rows = gate
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sum(row["compiled"] for row in rows) >= RECHECKED


def run(code: str) -> None:
    """Python code in a process of its own, in the folder of the gates' folder."""
    command, folder = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, env=ENVIRONMENT, cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_the_gate_sees_a_spill_and_a_missing_instruction():
    code = """
from gates import triton_kernels as gate
entry = gate.Launch("sums", "_sums_kernel", ("*fp16", "*fp16"), (True, True),
                    (("PRECISION", "ieee"),), 8, 3)
good = dict(spills=0, stack=0, shared=1000, matrix=["HGMMA"])
assert gate._problems(good, entry, "sm_90") == []
assert "spills" in gate._problems(good | dict(spills=2), entry, "sm_90")[0]
assert "shared" in gate._problems(good | dict(shared=2**18), entry, "sm_90")[0]
assert "HGMMA" in gate._problems(good | dict(matrix=["HMMA"]), entry, "sm_90")[0]
assert "compile" in gate._problems(dict(error="does not compile"), entry, "sm_90")[0]
other = gate.Launch(entry.module, entry.kernel, entry.types, entry.known, entry.constants, 4, 3)
assert len({entry.key("sm_90"), entry.key("sm_80"), other.key("sm_90")}) == 3
told = [1000, 90, 0, 2, ["HGMMA"]]
row, = gate.judged([(entry, "sm_90")], {entry.key("sm_90"): told}, 1, False, 0)
assert "spills" in row["problems"][0] and not row["compiled"]
"""
    run(code)


def test_the_gate_compiles_what_the_jit_compiles(tmp_path):
    """The JIT's own request of each launch, found in the cache that the JIT filled."""
    code = f"""
import os, pathlib
cache = pathlib.Path({str(tmp_path)!r})
os.environ["TRITON_CACHE_DIR"] = str(cache)
from gates import triton_kernels as gate
calls, few = [dict(precision="fp16")], ("_normalize_kernel", "_product_kernel", "_finish_kernel")
asked = gate.recorded("sm_90", calls)
entries = [entry for entry in asked if entry.kernel in few]
assert {{entry.kernel for entry in entries}} == set(few)

def jit(kernel, grid, args, options):
    if kernel.fn.__name__ in few:
        gate.warm(kernel, grid, args, options)

gate.common.launch.recorder = jit
gate._call(gate.Triton("sm_90"), **calls[0])
binaries = lambda: sorted(cache.glob("*/*.cubin"))
cached = binaries()
assert len(cached) == len(entries)
assert all("error" not in gate.compiled((entry, "sm_90")) for entry in entries)
assert binaries() == cached
# Every architecture has its own request: pointers within 2 GiB are told to AMD's compiler alone.
for arch, told in (("sm_90", False), ("gfx942", True)):
    entry = gate.recorded(arch, calls)[0]
    assert ("pointer_range" in str(entry.known)) == told, (arch, entry.known)
"""
    run(code)


def test_the_key_follows_the_code_and_not_the_words():
    code = """
from gates import triton_kernels as gate
def key(text):
    gate.ROOT.text = text
    gate.definitions.cache_clear(), gate.code_of.cache_clear()
    return gate.code_of("products", "_product_kernel")

class Folder:
    def __truediv__(self, name): return self
    def read_text(self): return self.text

text = (gate.ROOT / "kernels/products.py").read_text()
gate.ROOT = Folder()
before = key(text)
assert before.count("FunctionDef") == 2 and key("# words\\n" + text) == before
assert key(text.replace('\"\"\"', '\"\"\"Other words. ', 1)) == before
assert key(text.replace("def _library_adds", "def _adds")) == before  # nothing the kernel reaches
assert key(text.replace("acc += tl.load", "acc -= tl.load")) != before
"""
    run(code)
