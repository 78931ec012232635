"""The benchmarks: same loss before any time, ratios in one run, failures as results, comparison."""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import importlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import waiting

from directclr_fast import cli, dispatch
from directclr_fast.backends import cuda
from directclr_fast.bench import (
    adapters,
    batch,
    ceilings,
    command,
    grid,
    memory,
    pictures,
    regressions,
    report,
    stages,
    study,
    timing,
    trainer,
    variants,
)
from directclr_fast.bench.variants import ALLOWED, Case, Variant
from directclr_fast.paper.runs import Run

ROOT = Path(__file__).parent.parent
BASELINE = ROOT / "bench" / "results" / "cpu-2core-zen5" / "ci-baseline.json"
# The cases of the baseline, and a small one.
TINY = "--rows 64 1024 2048 --rounds 5 --device cpu --variants released eager torch cpu".split()
of_tiny = pytest.mark.xdist_group("bench")  # tests of one fixture, which takes long
linux = pytest.mark.skipif(not memory.supported(), reason="reads /proc")


def script(name: str):
    """A module of bench/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------ end to end


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(exit code, printed text, folder) of the command in a process of its own.

    The suite's fixtures fill fresh memory with NaN, which would be measured too.
    """
    out = tmp_path_factory.mktemp("bench")
    done = waiting.process(
        [sys.executable, "-m", "directclr_fast", "bench", *TINY, "--out", out],
        out,
        env={**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"},
    )
    return done, out


@of_tiny
def test_command_measures(tiny):
    """No verdict of these figures is on a time: that is what it was on a machine that may be busy,
    and test_cpu_backend.py counts what a step asks for instead."""
    done, out = tiny
    assert done.returncode == 0, done.stdout + done.stderr
    result = report.load([out / "bench.json"])
    assert [case["rows"] for case in result["cases"]] == [64, 1024, 2048]
    assert result["ceilings"]["copy"] > 0 and result["machine"]["torch"] == torch.__version__
    for case in result["cases"]:
        assert case["ceilings"]["products fp32"] > 0
        for name in ("released", "eager", "torch"):
            row = case["variants"][name]
            assert len(row["seconds"]) == 5 and row["error"] < 1e-5 and row["value_error"] < 1e-5
            assert row["rate"] == pytest.approx(8 * case["rows"] ** 2 * 360 / row["median"])
            assert row["of_roof"] == pytest.approx(row["rate"] / roof_of(result, case))


def roof_of(result: dict, case: dict) -> float:
    """The highest of the rates measured for fp32."""
    rates = {**result["ceilings"], **case["ceilings"]}
    return max(rate for name, rate in rates.items() if name.endswith(" fp32"))


@of_tiny
def test_nothing_but_times_is_worse_than_in_the_baseline(tiny):
    """Failures, peaks of memory and errors, against those of another machine."""
    old, new = (report.load([path]) for path in (BASELINE, tiny[1] / "bench.json"))
    changes = regressions.compare(old, new, relative=1.0, absolute=0.1)
    assert "2 cases compared" in regressions.summary(changes, old, new)
    timed = ("time / eager's", "roof / rate")
    assert not [str(c) for c in changes if c.worse and c.what not in timed]


@of_tiny
def test_command_prints_the_table_and_draws_four_figures(tiny):
    done, out = tiny
    for word in ("ceilings:", "quartiles", "N 2048, d 360 of 2048, float32", "100 %"):
        assert word in done.stdout + done.stderr
    for name in ("time", "roofline", "accuracy", *(["memory"] if memory.supported() else [])):
        assert (out / f"bench-{name}.png").stat().st_size > 5000, name


@of_tiny
@linux
def test_peaks_hold_what_a_step_must_and_eager_more(tiny):
    _, out = tiny
    rows = report.load([out / "bench.json"])["cases"][-1]["variants"]
    must = 2 * 2048 * 2048 * 4 / 2**20
    assert must < rows["torch"]["peak_mib"] < rows["eager"]["peak_mib"] < must + 300


@of_tiny
def test_tables_of_the_pages_come_from_the_files(tiny):
    tables = script("tables")
    cases = report.load([tiny[1] / "bench.json"])["cases"]
    lines = tables.loss_fp32(cases).splitlines()
    assert len(lines) == 2 + 3 and lines[-1].startswith("| 2048 | 360 | ")
    assert len({line.count("|") for line in lines}) == 1
    text = "a\n<!-- loss -->\nold\n<!-- end loss -->\nb\n<!-- x -->\nkept\n<!-- end x -->\n"
    filled = tables.fill(text, {"loss": "new"})
    assert filled == text.replace("old", "new")
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert tables.fill(text, {}) == text


# ------------------------------------------------------------------------ the same loss


CHECKED = [
    (name, negatives)
    for negatives in ("cross", "both")
    for name in ("released", "eager", "eager bf16", "released bf16", "torch", "cpu", "cpu bf16")
    if (negatives, name.split()[0]) != ("both", "released")
] + [(name, "both") for name in ("lightly", "metric-learning", "metric-learning ntxent")]


@pytest.mark.parametrize("name,negatives", CHECKED)
def test_variants_compute_the_reference_loss(name, negatives):
    case = Case(64, width=96, dim=40, negatives=negatives)
    variant = next(v for v in variants.catalogue(case) if v.name == name)
    if reasons := variant.why_not(case):
        assert variant.family == "ours" or all("not installed" in reason for reason in reasons)
        pytest.skip("; ".join(reasons))
    errors = grid.errors(case, variant.build(case), 64)
    assert max(errors.values()) < ALLOWED[variant.precision]
    if variant.precision == "fp32":
        eager = next(v for v in variants.catalogue(case) if v.name == "eager")
        of_eager = grid.errors(case, eager.build(case), 64)
        # Some roundings of a s: other people's code may add up in another order than eager's.
        floor = 4 * torch.finfo(torch.float32).eps / case.temperature
        assert max(errors.values()) <= 2 * max(of_eager.values()) + floor


def test_what_needs_another_device_or_other_negatives_says_so():
    reasons = {v.name: v.why_not(Case(64)) for v in variants.catalogue(Case(64))}
    assert "it has negatives 'both' only" in reasons["lightly"]
    for name in ("memeff", "inf_cl", "siglip"):
        assert "it needs cuda, got cpu" in reasons[name]
    assert reasons["triton"]  # interpreted, or on the CPU
    assert reasons["eager"] == reasons["torch"] == []


def test_the_gpu_backends_are_held_to_the_precision_that_they_choose():
    """Named "triton", its half-precision products are not held to fp32's tolerance and roof."""
    case = Case(4096, dtype="bfloat16", device="cuda")
    precisions = {v.name: v.precision for v in variants.catalogue(case) if v.family == "ours"}
    assert precisions["triton"] == precisions["cuda"] == "fp16" and precisions["torch"] == "fp32"
    assert "triton fp16" not in precisions and precisions["triton bf16"] == "bf16"


def test_the_roof_of_a_matrix_unit():
    """Its rate on data from L1, over the products that a precision takes; here of its emulation."""
    _cpu = pytest.importorskip("directclr_fast._cpu")
    _cpu.force_isa("portable")
    try:
        assert ceilings.tile_rates(1) == {}
        _cpu.force_isa("tiles")
        rates = ceilings.tile_rates(rounds=1)
        precisions = {v.name: v.precision for v in variants.catalogue(Case(4096))}
    finally:
        _cpu.force_isa("")
    assert all(rate > 0 for rate in rates.values())
    for kind in ("tiles", "tiles 2:1"):
        assert rates[f"{kind} tf32"] == 2 * rates[f"{kind} fp32"]
    assert ceilings.roof({**rates, "fma fp32": 1.0}, "fp32") >= rates["tiles fp32"]
    assert precisions["cpu tf32"] == "tf32" and precisions["cpu"] == "fp32"


def run_with(monkeypatch, extra: list[Variant], rows=(32,), **settings) -> dict:
    """A run of eager, torch and ``extra``, without memory."""

    def catalogue(case, precisions=None):
        return [v for v in variants.plain(case) if v.name == "eager"] + extra

    monkeypatch.setattr(variants, "catalogue", catalogue)
    monkeypatch.setattr(grid.ceilings, "measure", lambda device: {"square fp32": 1e11})
    monkeypatch.setattr(grid.ceilings, "fma_peak", lambda rounds: None)
    wanted = grid.Settings(
        rows=rows, dims=(8,), width=16, both_rows=(), device="cpu", rounds=2, memory=False
    )
    return grid.run(wanted, command=[])


def bad(name: str, function) -> Variant:
    return Variant(name, "peer", "fp32", lambda case: function)


def test_another_loss_is_never_timed(monkeypatch):
    from directclr_fast.testing import eager_loss

    def scaled(a, b):  # the right value, twice the gradient
        loss = eager_loss(a, b, 8)
        return 2 * loss - loss.detach()

    def shifted(a, b):  # the right gradient
        return eager_loss(a, b, 8) + 1

    result = run_with(monkeypatch, [bad("scaled", scaled), bad("shifted", shifted)])
    rows = result["cases"][0]["variants"]
    for name in ("scaled", "shifted"):
        assert "not the same loss" in rows[name]["failed"] and "median" not in rows[name]
    assert rows["eager"]["median"] > 0
    assert "not the same loss" in report.table(result)


def test_a_loss_that_is_wrong_at_the_full_size_loses_its_time(monkeypatch):
    from directclr_fast.testing import eager_loss

    monkeypatch.setattr(grid, "CHECKED_ROWS", 16)
    wrong = bad("wrong", lambda a, b: eager_loss(a, b, 8) * (1.1 if len(a) > 16 else 1.0))
    same = [bad(name, lambda a, b: eager_loss(a, b, 8)) for name in ("one", "two")]
    rows = run_with(monkeypatch, [wrong, *same])["cases"][0]["variants"]
    assert "at this size" in rows["wrong"]["failed"] and "median" not in rows["wrong"]
    assert rows["one"]["median"] > 0 and "failed" not in rows["eager"]


def test_out_of_memory_is_a_row_of_the_table(monkeypatch):
    from directclr_fast.testing import eager_loss

    monkeypatch.setattr(grid, "CHECKED_ROWS", 16)

    def hungry(a, b):
        if len(a) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34.00 GiB")
        return eager_loss(a, b, 8)

    def broken(a, b):
        raise KeyError("a peer's own trouble")

    result = run_with(monkeypatch, [bad("hungry", hungry), bad("broken", broken)])
    rows = result["cases"][0]["variants"]
    assert rows["hungry"]["out_of_memory"] and "34.00 GiB" in rows["hungry"]["failed"]
    assert not rows["broken"]["out_of_memory"] and "KeyError" in rows["broken"]["failed"]
    assert re.search(r"hungry +- +out of memory", report.table(result))
    json.dumps(result)


# ------------------------------------------------------------------------ timing and memory


def test_variants_take_turns_and_failures_are_recorded():
    order = []

    def dies():
        order.append("c")
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nmore")

    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": dies}
    times = timing.interleaved(calls, rounds=3, warmup=1)
    assert order == ["a", "b", "c", "b", "a", "a", "b", "a", "b"]
    assert len(times["a"]["seconds"]) == 3
    assert times["c"]["out_of_memory"] and "\n" not in times["c"]["failed"]


def test_a_budget_ends_the_rounds_after_three():
    times = timing.interleaved({"a": lambda: None}, rounds=50, budget=0.0)
    assert len(times["a"]["seconds"]) == 3


def test_ratios_are_taken_round_by_round():
    slow = timing.summary([4.0, 10.0, 9.0])
    fast = timing.summary([1.0, 5.0, 9.0])
    assert timing.ratio(slow, fast) == 2.0  # of the medians it would be 1.8
    assert timing.ratio(slow, timing.summary([2.0])) == 4.5
    assert timing.ratio({"failed": "x"}, fast) is None


@linux
def test_what_does_not_fit_is_a_result_and_the_next_one_runs(monkeypatch):
    case = Case(4096, width=360)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the limit counts stacks as well
    results = [memory.of_step(case, name, 180 * 2**20) for name in ("eager", "torch")]
    assert results[0]["out_of_memory"] and "peak_mib" not in results[0]
    assert 30 < results[1]["peak_mib"] < 180


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@linux
def test_a_process_that_the_system_ends_is_a_result():
    assert memory.isolated(die) == {"failed": "its process ended with -9", "out_of_memory": True}


@linux
def test_a_variant_that_ran_out_of_memory_is_not_tried_at_a_larger_size(monkeypatch):
    """Peaks by N above what a step must hold, or the reason."""
    asked = []

    def of_step(case, name):
        asked.append((case.rows, name))
        return {"peak_mib": 1.0} if case.rows < 64 or name == "torch" else {"failed": "boom"}

    monkeypatch.setattr(memory, "of_step", of_step)
    words = "--rows 64 32 128 --variants eager torch nobody".split()
    cases = [case for case, _ in memory.measure(study.parser(memory).parse_args(words))]
    names = ("eager", "torch")
    assert asked == [(n, v) for n in (32, 64, 128) for v in names if v == "torch" or n < 128]
    assert [case["failed"].get("eager") for case in cases] == [None, "boom", "failed at N = 64"]
    assert cases[0]["peak_mib"] == {"eager": 1.0, "torch": 1.0}
    assert cases[2]["gradients_mib"] == 2.0


# ------------------------------------------------------------------------ comparison


def made_up() -> dict:
    """A result with eager at 100 ms, ours at 25 ms, and a peer that is not there."""
    rows = {
        "eager": (0.1, "plain"),
        "cpu": (0.025, "ours"),
        "torch": (0.05, "ours"),
    }
    case = {
        "rows": 1024, "width": 2048, "dim": 360, "dtype": "float32", "device": "cpu",
        "negatives": "cross", "temperature": 0.1, "work": 3e9, "ceilings": {},
        "variants": {
            name: {
                "family": family, "precision": "fp32", "median": t, "quartiles": [t, t],
                "seconds": [t] * 5, "rate": 3e9 / t, "of_roof": 3e9 / t / 4e11, "peak_mib": 100.0,
                "error": 4e-7,
            }
            for name, (t, family) in rows.items()
        } | {"lightly": {"family": "peer", "precision": "fp32", "why_not": ["not installed"]}},
    }  # fmt: skip
    machine = {"processor": "a", "threads": 2, "torch": "2"}
    return {"format": grid.FORMAT, "machine": machine, "ceilings": {}, "cases": [case]}


def slower(result: dict, name: str, factor: float) -> dict:
    result = copy.deepcopy(result)
    row = result["cases"][0]["variants"][name]
    row["median"] *= factor
    row["seconds"] = [factor * t for t in row["seconds"]]
    row["of_roof"] /= factor
    return result


def worse(old: dict, new: dict, **options) -> list[str]:
    return [f"{c.variant} {c.what}" for c in regressions.compare(old, new, **options) if c.worse]


def test_a_machine_that_is_slower_throughout_is_no_regression():
    new = made_up()
    for name in ("eager", "cpu", "torch"):
        new = slower(new, name, 3.0)
    assert regressions.compare(made_up(), new) == []
    assert len(worse(made_up(), new, milliseconds=True)) == 3


def test_both_thresholds_must_be_passed():
    new = slower(made_up(), "cpu", 1.3)  # 0.25 of eager's time becomes 0.325
    assert worse(made_up(), new) == ["cpu time / eager's"]
    assert worse(made_up(), new, relative=0.4) == []
    assert worse(made_up(), new, absolute=0.1) == []
    assert worse(new, made_up()) == []
    (better,) = regressions.compare(new, made_up())
    assert better.worse is False and "-23 %" in str(better)


def test_without_eager_the_share_of_the_roof_is_compared():
    old, new = made_up(), slower(made_up(), "cpu", 2.0)
    for result in (old, new):
        del result["cases"][0]["variants"]["eager"]
    assert worse(old, new) == ["cpu roof / rate"]


def test_memory_errors_failures_and_absences():
    new = made_up()
    rows = new["cases"][0]["variants"]
    rows["cpu"]["peak_mib"], rows["cpu"]["error"] = 130.0, 1e-5
    failed = {"family": "ours", "precision": "fp32", "failed": "boom", "out_of_memory": False}
    rows["torch"] = failed
    assert sorted(worse(made_up(), new)) == ["cpu error", "cpu peak MiB", "torch fails now: boom"]
    assert [c.worse for c in regressions.compare(new, made_up()) if c.variant == "torch"] == [False]
    rows["torch"] = {"family": "ours", "precision": "fp32", "why_not": ["not built"]}
    rows["cpu"] = made_up()["cases"][0]["variants"]["cpu"]
    (note,) = regressions.compare(made_up(), new)
    assert note.worse is None and "not built" in str(note)
    rows["cpu"]["peak_mib"] = 115.0  # 15 %, and less than 16 MiB
    assert worse(made_up(), new) == []


def test_results_without_a_common_case_and_bad_thresholds_are_refused():
    other = made_up()
    other["cases"][0]["rows"] = 77
    with pytest.raises(ValueError, match="common case"):
        regressions.compare(made_up(), other)
    with pytest.raises(ValueError, match="relative: expected at least 0"):
        regressions.compare(made_up(), made_up(), relative=-1)


def test_exit_codes_and_messages_of_the_command(tmp_path, capsys):
    old, new, broken = (tmp_path / f"{name}.json" for name in ("old", "new", "broken"))
    old.write_text(json.dumps(made_up()))
    new.write_text(json.dumps(slower(made_up(), "cpu", 2.0)))
    broken.write_text("{}")
    compared = ["bench", "--against", str(old)]
    assert cli.main([*compared, str(old)]) == 0
    assert "0 figures worse" in capsys.readouterr().out
    assert cli.main([*compared, str(new)]) == 1
    printed = capsys.readouterr()
    assert "WORSE: N 1024" in printed.out and "got 1 worse" in printed.err
    assert cli.main([*compared, str(new), "--relative", "1.5"]) == 0
    for wrong, expected in (
        ([*compared, str(broken)], "expected a result file of format"),
        (["bench", str(new)], "expected --against FILE"),
        (["bench", "--against", str(tmp_path / "none.json")], "No such file"),
        (["bench", "--rows", "1", "--out", str(tmp_path)], "rows: expected at least 2, got 1"),
        (
            ["bench", "--device", "tpu", "--out", str(tmp_path)],
            "device: expected one of auto, cpu, cuda",
        ),
        (["bench", "--list", "--variants", "nobody"], "variants: expected names of"),
    ):
        assert cli.main(wrong) == 2
        assert expected in capsys.readouterr().err
    assert cli.main(["bench", "--list", "--device", "cpu"]) == 0
    assert re.search(r"memeff .*it needs cuda", capsys.readouterr().out)


def test_files_of_two_machines_are_not_mixed(tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    other = made_up()
    other["machine"]["processor"] = "b"
    for path, result in zip(paths, (made_up(), other)):
        path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="results of one machine"):
        report.load(paths)


# ------------------------------------------------------------------------ scripts


def make(
    *words: str, file: Path = ROOT / "bench" / "Makefile", **variables: str
) -> subprocess.CompletedProcess:
    """make with these words, in the file's folder; not as a part of a make around the suite."""
    if shutil.which("make") is None or shutil.which("timeout") is None:
        pytest.skip("needs make and timeout")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", "-C", file.parent, "-f", file.name, *words, f"PYTHON={sys.executable}"],
        capture_output=True, text=True, env=environment | variables,
    )  # fmt: skip


@pytest.mark.parametrize(
    "target,count", [("cpu", 15), ("gpu", 16), ("first", 4), ("second", 4), ("third", 5)]
)
def test_every_piece_of_a_suite_is_a_command_that_parses(target, count):
    """The sizes, names and flags are good; nothing is measured."""
    done = make("-n", "-B", target, "GPU=results/none")
    assert done.returncode == 0, done.stderr
    pieces = re.findall(r"timeout -k 9 \d+ (.*?) 2>&1 \| tee", done.stdout)
    assert len(pieces) == count
    for piece in pieces:
        words = shlex.split(piece)
        if "directclr_fast" in words:
            arguments = cli._parser().parse_args(words[words.index("directclr_fast") + 1 :])
            if words[words.index("directclr_fast") + 1] == "bench":
                wanted = command.asked(arguments)
                wanted = dataclasses.replace(wanted, dtype=wanted.dtype or "bfloat16")
                assert all(wanted.catalogue(case) for case in wanted.cases())
        for word in (word for word in words if word.startswith("directclr_fast.bench.")):
            study.parser(importlib.import_module(word)).parse_args(words[words.index(word) + 1 :])
        for word in re.findall(r"\.\./(?!build)[\w/]+\.py", piece):
            assert (ROOT / "bench" / word).exists(), word


def test_each_of_the_three_calls_ends_within_nine_minutes():
    for target in ("first", "second", "third"):
        done = make("-n", "-B", target, "GPU=results/none")
        assert sum(map(int, re.findall(r"timeout -k 9 (\d+) ", done.stdout))) <= 540, target
    asked = make("-n", "-B", "first", "GPU=results/none", "LIMIT=7").stdout
    assert re.findall(r"timeout -k 9 (\d+) ", asked) == ["7"] * 4


def test_each_piece_packs_what_there_is_where_something_may_come_back():
    """Also one that fails: the machine may be gone before the last has ended."""
    away = "tar czf /away/results.tgz -C results none"
    assert make("-n", "-B", "first", "GPU=results/none", OUT="/away").stdout.count(away) == 2 * 4
    assert "tar" not in make("-n", "-B", "first", "GPU=results/none").stdout


def gpu_case(rows, dim, precision="fp16", **times) -> dict:
    """A case as a GPU's file has it; milliseconds of each variant."""
    variants = {
        name.replace("_", " "): {"precision": precision, "median": ms / 1e3, "rate": 4e14,
                                 "seconds": [ms / 1e3], "of_roof": 0.5, "error": 1e-4}
        for name, ms in times.items()
    }  # fmt: skip
    case = {"rows": rows, "dim": dim, "dtype": "bfloat16", "negatives": "cross", "device": "cuda"}
    return case | {"variants": variants}


def test_a_gpu_s_results_fill_the_page_and_say_where_cuda_is_faster(tmp_path, monkeypatch):
    tables = script("tables")
    cases = [
        gpu_case(4096, 128, eager=9, triton=2, cuda=3),
        gpu_case(32768, 128, eager=90, triton=20, cuda=15),
        gpu_case(4096, 360, eager=9, compiled=6, triton=2, cuda=1),
        gpu_case(32768, 360, eager=90, triton=20, cuda=10),
        gpu_case(4096, 768, triton=20),
    ]
    for page, name in zip(tables.PAGES, ("gpu-short", "gpu-loss")):
        text = (ROOT / page).read_text()
        assert "\nTHE TABLE\n" in tables.fill(text, {name: "THE TABLE"})
        assert tables.fill(text, {}) == text
    head, _, *lines = tables.loss_gpu(cases).splitlines()
    assert len(lines) == 9 and "x memeff" in head
    assert (
        "| 4096 | 360 | bfloat16 | cross | cuda | fp16 | 1 | 400 | 50 % | 9.00 | 6.00 | - |"
        in (lines[5])
    )
    shapes = tables.faster(cases)
    assert shapes == [("fp16", 128, 32768), ("fp16", 360, 4096)]
    assert tables.faster(cases[:1]) == tables.faster(cases[-1:]) == []
    module = tmp_path / "cuda.py"
    module.write_text(tables.CUDA.read_text())
    # fp32 rows: a file says what is multiplied, the dispatch asks by the option's name.
    exact = Case(16384, 360, 360, dtype="float32", device="cuda")
    runs_in = variants._precision("cuda", exact, "auto")
    (shape,) = tables.faster([gpu_case(16384, 360, runs_in, triton=2, cuda=1)])
    monkeypatch.setattr(cuda, "FASTER", (shape,))
    assert cuda.BACKEND.why_not_unasked(exact.problem()) is None
    for written in (shapes, shapes[:1], []):
        tables.write_faster(written, "h100", module)
        (value,) = (
            node.value
            for node in ast.parse(module.read_text()).body
            if isinstance(node, ast.AnnAssign) and node.target.id == "FASTER"
        )
        assert ast.literal_eval(value) == tuple(written)
    assert module.read_text() == tables.CUDA.read_text()


def test_pieces_come_in_the_order_that_is_written(tmp_path):
    """What may fail first comes first: kernels, tests and sanitizers before any time."""
    out = make("-n", "gpu", f"GPU={tmp_path}").stdout
    logs = re.findall(r"\| tee \S+/logs/([\w-]+)\.log \|\|", out)
    order = ["build", "doctor", "test_backends_gpu", "memcheck", "racecheck", "loss-360", "both"]
    assert [name for name in logs if name in order] == order
    assert logs[-2:] == ["trainer-resnet18", "trainer-small"]


def test_a_suite_skips_what_is_there_and_runs_again_what_failed(tmp_path):
    file, folder = tmp_path / "Makefile", tmp_path / "out"

    def run(*words: str, bad: str) -> tuple[int, str]:
        lines = [
            f"include {ROOT}/bench/Makefile",
            f"all: {folder}/bad.json {folder}/good.json {folder}/logs/hello.log",
            f"{folder}/bad.json: ; $(call piece,bash -c '{bad}')",
            f"{folder}/good.json: ; $(call piece,bash -c 'echo 1 >> $@')",
            f"{folder}/logs/hello.log: ; $(call piece,echo hello)",
        ]
        file.write_text("\n".join(lines) + "\n")
        done = make(*(words or ["all"]), "-k", file=file)
        return done.returncode, done.stdout

    code, text = run(bad="echo half > $@; exit 3")
    assert code == 2 and "bad.json: failed (3)" in text and "good.json: done" in text
    assert (folder / "bad.json.partial").exists() and not (folder / "bad.json").exists()
    code, text = run(f"{folder}/bad.json", "LIMIT=1", bad="echo half > $@; sleep 60")
    assert code == 2 and "bad.json: failed (124)" in text
    code, text = run(bad="echo whole > $@")
    assert code == 0 and "good.json" not in text and "hello" not in text
    assert (folder / "good.json").read_text() == "1\n"
    assert (folder / "bad.json").read_text() == "whole\n"
    assert run("-B", f"{folder}/good.json", bad="exit 1")[0] == 0
    assert (folder / "good.json").read_text() == "1\n1\n"


def test_a_study_leaves_what_it_measured_before_it_failed(tmp_path, capsys):
    """One case and its text at a time; the file says how it was made."""
    out = tmp_path / "new" / "made-up.json"

    def measure(arguments):
        for rows in arguments.rows:
            if rows > 2:
                raise MemoryError
            yield {"rows": rows}, f"N {rows}"

    made_up = types.ModuleType("made_up", "Words.")
    made_up.__spec__ = importlib.machinery.ModuleSpec("made.up", None)
    made_up.measure, made_up.FLAGS = measure, {"--rows": {"type": int, "nargs": "+"}}
    with pytest.raises(MemoryError):
        study.main(made_up, ["--rows", "1", "2", "3", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["cases"] == [{"rows": 1}, {"rows": 2}]
    assert result["command"][:3] == ["made.up", "--rows", "1"]
    assert result["settings"] == {"rows": [1, 2, 3]} and "processor" in result["machine"]
    assert capsys.readouterr().out == "N 1\nN 2\n"


def test_stages_run_on_as_many_threads_as_the_case_says(tmp_path, monkeypatch, one_thread):
    backend, seen, out = dispatch.load("cpu"), [], tmp_path / "stages.json"
    sums = backend.sums

    def counting(*args):
        seen.append(torch.get_num_threads())
        return sums(*args)

    monkeypatch.setattr(backend, "sums", counting)
    flags = ["--n", "32", "--d", "8", "--width", "8", "--threads", "1", "3", "--rounds", "1"]
    study.main(stages, [*flags, "--out", str(out)])
    assert [case["threads"] for case in json.loads(out.read_text())["cases"]] == [1, 3]
    assert sorted(set(seen)) == [1, 3]


def test_trainer_bench_measures_step_encoder_and_both_losses(tmp_path, capsys):
    out = tmp_path / "trainer.json"
    flags = ["--rows", "64", "--rounds", "2", "--amp", "none", "bf16"]
    study.main(trainer, [*flags, "--out", str(out)])
    cases = json.loads(out.read_text())["cases"]
    assert [case["amp"] for case in cases] == ["none", "bf16"]
    for case in cases:
        assert len(case["variants"]) == 6
        for loss in ("fast", "reference"):
            assert case[loss]["share_of_loss"] > 0 and case[loss]["images_per_second"] > 0
    assert "of the bare encoder's" in capsys.readouterr().out


@linux
def test_batch_sizes_on_the_same_images(tmp_path, capsys, monkeypatch, one_thread):
    """Each run is kept and not made again; one that memory does not hold is a row."""
    pytest.importorskip("sklearn")
    out = tmp_path / "batch.json"
    words = "--rows 32 64 --images 192 --seeds 1 --data digits --amp none --chunk 32".split()

    def here(known, done, jobs, settings, folder, on_step, on_result, how):
        for run in known(done):
            done[run.name] = how(run, settings, folder, lambda record: None)

    made, execute = [], batch.runs.execute

    def counted(run: Run, settings: dict, folder: Path, on_step):
        made.append((run, settings))
        if run.loss == "reference" and run.batch_size == 64:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return execute(run, settings, folder, on_step)

    monkeypatch.setattr(batch.runs, "side_by_side", here)
    monkeypatch.setattr(batch.runs, "execute", counted)
    study.main(batch, [*words, "--out", str(out)])
    assert [(run.loss, run.batch_size, how["steps"]) for run, how in made] == [
        ("fast", 32, 6), ("fast", 64, 3), ("reference", 32, 6), ("reference", 64, 3)
    ]  # fmt: skip
    assert [how.get("chunk_size") for _, how in made] == [None, 32, None, 32]
    assert made[1][0].learning_rate / made[0][0].learning_rate == pytest.approx(2**0.5)
    cases = json.loads(out.read_text())["cases"]
    for case in cases[:3]:
        assert case["accuracy"]["linear"] > 0.3 and case["cpu_seconds_per_image"] > 0
        assert case["peak_mib"] > 1
    assert cases[3]["out_of_memory"] and "accuracy" not in cases[3]
    text = capsys.readouterr().out
    assert "| 64 | reference | 0 | no memory, or diverged |" in text
    assert (tmp_path / "batch.png").stat().st_size > 1000
    study.main(batch, [*words, "--jobs", "0", "--out", str(tmp_path / "batch.json")])
    assert len(made) == 4 and json.loads(out.read_text())["cases"] == cases
    with pytest.raises(ValueError, match="images: expected a multiple of every N, got 100"):
        study.main(batch, [*words, "--images", "100", "--out", str(out)])
    with pytest.raises(ValueError, match="chunk: expected .* as in the runs in .*, got 64"):
        study.main(batch, [*words, "--chunk", "64", "--out", str(out)])


def test_pictures_are_decoded_cut_and_seen_beside_another_version(tmp_path, capsys):
    pytest.importorskip("skimage")
    words = "--quality 50 --size 32 --batch 4 --rounds 1 --against".split()
    study.main(pictures, [*words, str(ROOT), "--out", str(tmp_path / "pictures.json")])
    (case,) = json.loads((tmp_path / "pictures.json").read_text())["cases"]
    assert case["files"] == 8 and all("median" in v for v in case["variants"].values())
    assert {"both views", "both views, before", "both views, torchvision"} <= {*case["variants"]}
    assert [*case["ahead"]] == ["1", "2", "4"] and case["both views, times before"] > 0
    assert "of the fastest plain decoder" in capsys.readouterr().out


def test_adapters_beside_their_originals(monkeypatch):
    """A stand-in for its own original: both sides measured, equal, with a peak of their own."""
    ours = adapters.OURS + "lightly"
    asked = argparse.Namespace(dim=24, rounds=2)
    case, text = adapters._pair("NTXentLoss", {"original": ours, "ours": ours}, 40, asked)
    for side in ("original", "ours"):
        assert case[side]["gradient_error"] < 1e-5 and case[side]["value_error"] < 1e-6
        assert len(case[side]["seconds"]) == 2 and 0 < case[side]["peak_mib"] < 500
    monkeypatch.setattr(adapters, "PAIRS", {"NTXentLoss": ("no_such_library", "lightly", None)})
    assert [case for case, _ in adapters.measure(asked)] == [
        {"name": "NTXentLoss", "absent": "no_such_library"}
    ]
