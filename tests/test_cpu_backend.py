"""The native CPU backend through the public loss: its options, precisions, threads and workers."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import waiting
from test_loss_exact import (
    CASES_PER_CHUNK,
    TIE_OPTIONS,
    TIE_SHAPES,
    arguments_of,
    assert_ties_are_kept,
    conditioning,
    generated_case,
)

from directclr_fast import dispatch, doctor, fast_directclr_loss, last_backend, ops
from directclr_fast.problem import Options
from directclr_fast.testing import bound, eager_loss, evaluate, make_views, problem, relative_error
from directclr_fast.world import ALONE

_cpu = pytest.importorskip(
    "directclr_fast._cpu", reason="the compiled CPU kernels are not installed"
)


# Of the two emulations of tiles one will do here: test_native_kernels.py has both.
@pytest.fixture(params=[isa for isa in _cpu.available_isas() if isa != "tiles_avx512"])
def isa(request):
    _cpu.force_isa(request.param)
    yield request.param
    _cpu.force_isa("")


@pytest.mark.parametrize("chunk", range(2))
def test_generated_cases_match_the_reference(isa, chunk):
    """Every option of the public loss in fp32: at most twice eager's error, and ulps of a s."""
    for seed in range(chunk * CASES_PER_CHUNK, (chunk + 1) * CASES_PER_CHUNK):
        case = generated_case(seed)
        r1, r2, upstream, options = arguments_of(case, torch.float32)
        wide = dict(options)
        if isinstance(options["temperature"], torch.Tensor):
            options["temperature"] = options["temperature"].float()
            wide["temperature"] = options["temperature"].double()
        ours = evaluate(
            fast_directclr_loss,
            r1,
            r2,
            upstream=upstream,
            backend="cpu",
            workspace_bytes=case["workspace"],
            **options,
        )
        assert last_backend() == "cpu"
        truth = evaluate(fast_directclr_loss, r1.double(), r2.double(), upstream=upstream, **wide)
        eager = evaluate(eager_loss, r1, r2, upstream=upstream, **options)
        ulps = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
        slack = conditioning(case, r1.double(), r2.double(), upstream)
        for name, got, want, of_eager in zip(ours._fields, ours, truth, eager):
            if want is None:
                continue
            size = float(want.norm())
            allowed = (2 * relative_error(of_eager, want) + 1e-6) * size + ulps * slack[name]
            error = float((got.double() - want).norm())
            assert error <= allowed or error < 1e-12, (error, allowed, name, case)


@pytest.mark.parametrize("rows,dim", [*TIE_SHAPES, (40, 1100)])
@pytest.mark.parametrize("same", [False, True], ids=["views", "one-tensor"])
def test_equal_rows_stay_equal(isa, rows, dim, same):
    r1, r2 = make_views(rows, dim, kind="ties")
    # Emulated tiles are slow, and their blocks no others with more options.
    options = TIE_OPTIONS[2::5] if isa == "tiles" else TIE_OPTIONS
    assert_ties_are_kept("cpu", r1, r1 if same else r2, options)


# ---------------------------------------------------------------- no fraction left in fp32 (N12)


@pytest.mark.parametrize("kind", ["views", "antipodal", "ties"])
@pytest.mark.parametrize("negatives", ["cross", "both"])
def test_the_lowest_temperature(isa, kind, negatives):
    """At 2^-21 every logit is a whole number, left-out entries still lie below all others."""
    r1, r2 = make_views(40, 24, kind=kind, dtype=torch.float32)
    options = {"temperature": 2.0**-21, "negatives": negatives}
    truth = evaluate(eager_loss, r1.double(), r2.double(), None, **options)
    eager = evaluate(eager_loss, r1, r2, None, **options)
    ours = evaluate(fast_directclr_loss, r1, r2, None, backend="cpu", **options)
    for got, of_eager, want in zip(ours[:3], eager, truth):
        allowed = bound(relative_error(of_eager, want), torch.float32)
        assert relative_error(got, want) <= allowed
    # All logits the lowest there are: that of view 1 against its opposite, the positive among them.
    same = r1[:1].repeat(40, 1)
    if negatives == "cross":
        loss = fast_directclr_loss(same, -same, None, backend="cpu", **options)
        assert float(loss) == pytest.approx(math.log(40), rel=1e-6)


@pytest.mark.parametrize("temperature", [4e-7, 1e-8, 1e-10])
def test_below_it_another_backend_is_right_or_a_sentence_says_so(temperature):
    r1, r2 = make_views(8, 16, dtype=torch.float32)
    options = {"temperature": temperature}
    truth = evaluate(eager_loss, r1.double(), r2.double(), None, **options)
    ours = evaluate(fast_directclr_loss, r1, r2, None, **options)
    assert last_backend() == "torch"
    for got, want in zip(ours[:3], truth):
        assert relative_error(got, want) < 1e-6
    with pytest.raises(NotImplementedError, match=r"cpu: it takes a temperature from 2\^-21 on"):
        fast_directclr_loss(r1, r2, None, backend="cpu", **options)
    learned = torch.tensor(temperature, requires_grad=True)
    with pytest.raises(ValueError, match=r"^temperature: the cpu backend takes one from 2\^-21 on"):
        fast_directclr_loss(r1, r2, None, temperature=learned)


@pytest.mark.parametrize("rows,dim", [(4097, 16), (65, 2047), (129, 2048)])
def test_edges_of_large_sizes(rows, dim):
    r1, r2 = make_views(rows, 2048, dtype=torch.float32)
    ours = evaluate(fast_directclr_loss, r1, r2, dim, backend="cpu")
    eager = evaluate(eager_loss, r1, r2, dim)
    truth = evaluate(eager_loss, r1.double(), r2.double(), dim)
    for got, of_eager, want in zip(ours[:3], eager, truth):
        assert relative_error(got, want) <= 2 * relative_error(of_eager, want) + 1e-6


@pytest.mark.skipif(not _cpu.has_bf16(), reason="this processor has no bf16 dot product")
@pytest.mark.parametrize("kind", ["unrelated", "views", "converged", "clustered"])
def test_bf16_products_err_less_than_eager_autocast(kind):
    """The exact positive keeps p - 1 right where bf16 operands would ruin a converged model."""
    r1, r2 = make_views(600, 360, kind=kind, dtype=torch.float32)

    def autocast(a, b, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return eager_loss(a, b, None, **options).float()

    truth = evaluate(eager_loss, r1.double(), r2.double(), None)
    ours = evaluate(fast_directclr_loss, r1, r2, None, precision="bf16")
    people = evaluate(autocast, r1, r2)
    assert relative_error(ours.dr1, truth.dr1) < 3e-3
    assert relative_error(ours.dr1, truth.dr1) < relative_error(people.dr1, truth.dr1)
    # A loss is one number, and eager's may be right by chance. Rounding z to 8 bits moves each s by
    # 2^-9 / sqrt(d), a log-sum over others by a times that at most, and the mean over rows by less.
    allowed = 2.0**-9 / 360**0.5 / 0.1
    assert abs(float(ours.loss - truth.loss)) < allowed


@pytest.mark.parametrize("negatives", ["cross", "both"])
def test_any_workspace_gives_the_same_bits(isa, negatives):
    r1, r2 = make_views(300, 48, dtype=torch.float32)
    runs = [
        evaluate(fast_directclr_loss, r1, r2, 40, negatives=negatives, workspace_bytes=workspace)
        for workspace in (0, 30_000, 200_000, 2**24)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], run))


def test_a_larger_workspace_keeps_more_and_never_more_than_asked():
    backend = dispatch.load("cpu")

    def kept_bytes(workspace):
        sizes = {"rows": 500, "candidates": 700, "width": 64, "dim": 64}
        asked = problem(**sizes, workspace_bytes=workspace, differentiable=True)
        return 4 * backend.kept_shape(asked)[0]

    sizes = [kept_bytes(workspace) for workspace in (0, 10**5, 5 * 10**5, 10**7)]
    assert sizes == [0, 10**5, 5 * 10**5, 4 * 563 * 763]
    for rows, candidates in ((1, 1), (8, 48), (64, 64), (65, 97), (500, 700)):
        assert 4 * (rows + 63) * (candidates + 63) >= _cpu.workspace_bytes(rows, candidates)


class Asked:
    """The extension, noting each call of a stage: its name and threads."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        function = getattr(_cpu, name)
        if name not in ("forward", "backward", "normalize", "sums", "products", "finish"):
            return function

        def noted(*arguments):
            self.calls.append((name, arguments[-1]))
            return function(*arguments)

        return noted


def test_a_step_is_two_native_calls_on_all_threads_of_the_widest_body(monkeypatch):
    """Of each stage one where the driver asks for them, as for groups of columns. It is what the
    time hangs on, by counts: those of a machine that may be busy are no verdict."""
    from directclr_fast.backends import cpu

    asked = Asked()
    monkeypatch.setattr(cpu, "_cpu", asked)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    r1, r2 = (r.requires_grad_() for r in make_views(64, 48, dtype=torch.float32))
    fast_directclr_loss(r1, r2, 40).backward()
    assert asked.calls == [("forward", 3), ("backward", 3)]
    del asked.calls[:]
    groups = torch.arange(40).reshape(2, 20)
    fast_directclr_loss(r1, r2, columns=groups).backward()
    stages = ("normalize", "normalize", "sums") * 2 + ("products", "finish", "finish") * 2
    assert asked.calls == [(s, 3) for s in stages]
    assert _cpu.isa() == (os.environ.get("DIRECTCLR_FAST_ISA") or _cpu.available_isas()[0])
    # The tiles of S are kept whole where they fit, and then are not made anew.
    whole = problem(rows=1024, candidates=1024, width=48, dim=40, differentiable=True)
    assert 4 * cpu.BACKEND.kept_shape(whole)[0] >= _cpu.workspace_bytes(1024, 1024)


def test_a_step_makes_few_python_calls():
    """What a small batch costs, by counts of this package's functions: torch's own differ between
    versions. They were 174 when the driver asked for every stage."""
    r1, r2 = (r.requires_grad_() for r in make_views(64, 48, dtype=torch.float32))

    def step():
        fast_directclr_loss(r1, r2, 40).backward()

    calls, ours = Counter(), str(Path(dispatch.__file__).parent)

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(ours):
            calls[frame.f_code.co_name] += 1

    step()
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    assert 30 < calls.total() <= 58, calls.most_common(12)


@pytest.mark.skipif("avx512_bf16" not in _cpu.available_isas(), reason="no bf16 dot product here")
def test_the_bf16_dot_product_is_the_best_body_s_only_where_it_is_faster():
    amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    assert (_cpu.available_isas()[0] == "avx512_bf16") == amd


def test_thread_counts_agree_and_each_repeats_its_bits():
    r1, r2 = make_views(700, 64, dtype=torch.float32)
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs = [evaluate(fast_directclr_loss, r1, r2, 40, backend="cpu") for _ in range(2)]
            assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], runs[1]))
            results[threads] = runs[0]
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        for a, b in zip(results[1][:3], results[threads]):
            assert relative_error(a, b) < 1e-6


class GradientOfRows(torch.utils.data.Dataset):
    """Each item is a gradient computed inside the worker, by both passes of the backend; autograd's
    own threads do not survive a fork."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        r1, r2 = make_views(400, 64, dtype=torch.float32, seed=index)
        asked = ops.problem_of(Options(dim=40, backend="cpu"), r1, r2, None)
        _, states, _ = ops.forward_body(asked, ALONE, r1, r2, None, None)
        need = (True, True, False)
        upstream = torch.ones(())
        return ops.backward_body(asked, ALONE, upstream, states, None, None, need)[0]


def test_inside_data_loader_workers_forked_after_use():
    here = [GradientOfRows()[index] for index in range(4)]
    loader = torch.utils.data.DataLoader(
        GradientOfRows(), batch_size=None, num_workers=2, multiprocessing_context="fork",
        timeout=waiting.STILL,
    )  # fmt: skip
    for got, want in zip(loader, here):
        assert relative_error(got, want) < 1e-6


def test_threads_are_those_of_the_process():
    """torch's OpenMP pool, whose spinning workers would otherwise share the cores with ours."""
    if not torch.backends.openmp.is_available():
        pytest.skip("this torch has no OpenMP")
    if not _cpu.uses_openmp():
        pytest.skip("torch's OpenMP here is not GNU's")
    assert _cpu.uses_openmp()


def test_fp64_and_missing_precisions_are_passed_on():
    r1, r2 = make_views(20, 16, dtype=torch.float64)
    fast_directclr_loss(r1, r2, 8)
    assert last_backend() == "torch"
    with pytest.raises(NotImplementedError, match="cpu: precision 'fp16'"):
        fast_directclr_loss(r1.float(), r2.float(), 8, precision="fp16")
    _cpu.force_isa("portable")
    for precision in ("bf16", "tf32"):
        with pytest.raises(NotImplementedError, match=f"cpu: precision '{precision}': .* portable"):
            fast_directclr_loss(r1.float(), r2.float(), 8, precision=precision)
    _cpu.force_isa("")


# What "auto" asks of each call: (inputs, autocast, torch's fp32 products) and what they become on
# tiles. Elsewhere it is fp32 whatever is asked, with the same bits.
AUTO = {
    "plain": ((torch.float32, None, "highest"), "int8x6"),
    "bf16 inputs": ((torch.bfloat16, None, "highest"), "bf16"),
    "fp16 inputs": ((torch.float16, None, "highest"), "int8x3"),
    "autocast": ((torch.float32, torch.bfloat16, "highest"), "bf16"),
    "fp16 autocast": ((torch.float32, torch.float16, "highest"), "int8x6"),
    "high": ((torch.float32, None, "high"), "int8x3"),
    "medium": ((torch.float32, None, "medium"), "bf16"),
}


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_auto_rounds_where_eager_would_and_the_matrix_unit_is_faster(isa, name, compiled):
    (dtype, autocast, setting), products = AUTO[name]
    r1, r2 = make_views(300, 200, dtype=dtype)
    on_tiles = isa in ("amx", "tiles")
    if compiled and (not on_tiles or name not in ("plain", "autocast", "high")):
        return  # a compiled call asks as an eager one does
    function = torch.compile(fast_directclr_loss, backend="aot_eager") if compiled else None

    def step(precision):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = function or fast_directclr_loss
            return evaluate(loss, r1, r2, None, precision=precision, backend="cpu")

    exact = step("highest")
    assert _cpu.arithmetic() == ("int8x6" if on_tiles else "fp32")
    try:
        torch.set_float32_matmul_precision(setting)
        auto = step("auto")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert _cpu.arithmetic() == (products if on_tiles else "fp32")
    same = [torch.equal(a, b) for a, b in zip(auto[:3], exact)]
    assert all(same) == (not on_tiles or products == "int8x6")
    for a, b in zip(auto[:3], exact):
        assert relative_error(a, b) < (2e-3 if dtype == torch.float32 else 8e-3)


def test_doctor_names_the_instruction_set(isa):
    r1, r2 = make_views(300, 200, dtype=torch.float32)
    fast_directclr_loss(r1, r2, None, backend="cpu")
    details = doctor.report()["backends"]["cpu"]["details"]
    assert details["instruction set"] == isa
    assert details["last products"] == ("int8x6" if isa in ("amx", "tiles") else "fp32")


def test_a_matrix_unit_is_used_or_doctor_says_why_not():
    usable = "amx" in _cpu.available_isas()
    assert usable == (_cpu.matrix_unit() == "AMX, in use")
    assert doctor.report()["backends"]["cpu"]["details"]["matrix unit"] == _cpu.matrix_unit()
    flags = Path("/proc/cpuinfo")
    if flags.exists() and "amx_int8" not in flags.read_text():
        assert not usable and _cpu.matrix_unit().endswith(("has no AMX", "Linux, x86-64"))
    # What was tested as emulation is nobody's default.
    assert not _cpu.available_isas()[0].startswith("tiles")
