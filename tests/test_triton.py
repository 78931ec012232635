"""The Triton kernels through Triton's interpreter: every option, on a machine without a GPU.

``tests/test_triton_gate.py`` compiles the same kernels for GPUs; ``tests/test_backends_gpu.py``
runs them on one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types

import numpy as np
import pytest
import test_labels as labels
import test_loss_exact as exact
import test_top1 as top1
import torch
from calls import python_calls
from gates import sanitize

from directclr_fast import dispatch, fast_directclr_loss, last_backend, ops
from directclr_fast.backends import packed
from directclr_fast.backends import triton as backend
from directclr_fast.bench import launches as bench_launches
from directclr_fast.bench import study
from directclr_fast.problem import Options, Problem
from directclr_fast.products import fp32_products
from directclr_fast.testing import bound, eager_loss, evaluate, make_views, relative_error
from directclr_fast.world import ALONE

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("with a GPU, test_backends_gpu.py runs them compiled", allow_module_level=True)

from directclr_fast.kernels import common, configs  # noqa: E402

if not common.INTERPRETED.value:
    pytest.skip("Triton was imported before the tests could set it", allow_module_level=True)

# numpy's, for log(0) and exp2 of large numbers
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("interpreted"),
]
COARSE = configs.Tile(128, 128, 64, 1, 1)  # fewer, larger steps for the interpreter


@pytest.fixture
def coarse(monkeypatch):
    monkeypatch.setattr(configs, "_INTERPRETER", COARSE)


def problem(**changes) -> Problem:
    given = {
        "rows": 64,
        "candidates": 64,
        "width": 32,
        "dim": 16,
        "dtype": torch.float32,
        "device_type": "cuda",
        "temperature": 0.1,
    }
    return Problem(**(given | changes))


def test_the_smoke_test_of_a_gpu_tells_right_from_wrong(coarse, monkeypatch, capsys):
    """Its rehearsal; on a GPU it is the first that runs."""
    monkeypatch.setattr(sanitize, "FEW", (((33, 20), ("fp16",)),))
    monkeypatch.setattr(sanitize, "TILES", ())
    monkeypatch.setattr(sys, "argv", "sanitize.py --few --check --device cpu triton".split())
    assert sanitize.main() == 0 and "ran 1 of 1" in capsys.readouterr().out
    views = make_views(33, 20)
    right = evaluate(fast_directclr_loss, *views, 20, backend="reference")
    wrong = right._replace(dr1=right.dr1 * 1.01)
    texts = sanitize.wrongs("x", wrong, right, *views, 20, 1e-3)
    assert texts == ["x: dr1 of a second run is another", "x: dr1 is off by 1.0e-02, allowed 0.001"]
    monkeypatch.setattr(sys, "argv", "sanitize.py --few --check --device cpu cuda".split())
    assert sanitize.main() == 1 and "cuda: it cannot run here" in capsys.readouterr().out


def test_the_launches_of_a_step_are_told_apart(coarse, tmp_path):
    """A rehearsal: every launch of a step is there, none of it timed."""
    words = "--device cpu --rows 33 --dim 20 --rounds 1 --schedules --backend triton cuda"
    study.main(bench_launches, [*words.split(), "--out", str(tmp_path / "launches.json")])
    step, *absent = json.loads((tmp_path / "launches.json").read_text())["cases"]
    assert step["ms"].keys() == {
        "normalize", "sums", "combine", "total", "factors", "weights", "product", "finish"
    }  # fmt: skip
    assert [case["schedule"] for case in absent] == ["cooperative", "ping-pong"]
    assert all(case["why_not"] for case in absent)


# ------------------------------------------------------------------------------ how exact


@pytest.mark.parametrize("chunk", range(4))
def test_generated_cases_match_the_reference(chunk):
    """Every option in fp32-grade precision: at most twice eager's error, and ulps of a s."""
    for seed in range(12 * chunk, 12 * (chunk + 1)):
        case = exact.generated_case(seed)
        r1, r2, upstream, options = exact.arguments_of(case, torch.float32)
        wide = dict(options)
        if isinstance(options["temperature"], torch.Tensor):
            options["temperature"] = options["temperature"].float()
            wide["temperature"] = options["temperature"].double()
        ours = evaluate(
            fast_directclr_loss, r1, r2, upstream=upstream, backend="triton",
            workspace_bytes=case["workspace"], **options,
        )  # fmt: skip
        assert last_backend() == "triton"
        truth = evaluate(fast_directclr_loss, r1.double(), r2.double(), upstream=upstream, **wide)
        eager = evaluate(eager_loss, r1, r2, upstream=upstream, **options)
        ulps = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
        slack = exact.conditioning(case, r1.double(), r2.double(), upstream)
        for name, got, want, plain in zip(ours._fields, ours, truth, eager):
            if want is None:
                continue
            size = float(want.norm())
            allowed = (2 * relative_error(plain, want) + 1e-6) * size + ulps * slack[name]
            error = float((got.double() - want).norm())
            assert error <= allowed or error < 1e-12, (error, allowed, name, case)


@pytest.mark.parametrize("rows,dim", [(17, 360), (65, 33)])
@pytest.mark.parametrize("same", [False, True], ids=["views", "one-tensor"])
def test_equal_rows_stay_equal(rows, dim, same):
    r1, r2 = make_views(rows, dim, kind="ties")
    # Every third of the options, which has each temperature, both negatives and both directions;
    # the four cases take all of them.
    start = (rows == 65) + same
    exact.assert_ties_are_kept("triton", r1, r1 if same else r2, exact.TIE_OPTIONS[start::3])


@pytest.mark.parametrize("name", top1.CASES)
def test_top1_agrees_with_the_reference(name):
    top1.check_against_the_reference(name, backend="triton", precision="highest")


def test_top1_over_strips(coarse, monkeypatch):
    """Column maxima of several strips, in both forms of the sums."""
    monkeypatch.setattr(packed, "PARTIAL_BYTES", 1)
    for name in ("ties", "cold", "both"):
        top1.check_against_the_reference(name, backend="triton", precision="highest")


@pytest.mark.parametrize("same_label", ["positive", "ignore"])
@pytest.mark.parametrize("negatives,symmetric", labels.FORMS)
def test_labels(negatives, symmetric, same_label):
    how = {"negatives": negatives, "symmetric": symmetric, "same_label": same_label}
    how |= {"backend": "triton", "precision": "highest"}
    more = 0 if negatives == "both" else 13
    labels.check(37, 37 + more, "few", "clustered", **how)
    labels.check(70, 70 + more, "copies", "views", temperature=0.01, reduction="none", **how)
    labels.check(33, 33 + more, "one", "views", **how)


@pytest.mark.parametrize("same_label", ["positive", "ignore"])
def test_labels_of_rounded_rows(coarse, same_label):
    r1, r2 = make_views(160, 200, kind="clustered", dtype=torch.float32)
    how = {"labels": labels.make_labels("few", 160), "same_label": same_label}
    truth = evaluate(eager_loss, r1.double(), r2.double(), None, **how)
    people = evaluate(autocast_loss, r1, r2, None, **how)
    for precision in ("fp16", "bf16"):
        ours = evaluate(
            fast_directclr_loss, r1, r2, None, backend="triton", precision=precision, **how
        )
        for got, want, theirs in zip(ours[1:3], truth[1:3], people[1:3]):
            assert relative_error(got, want) <= 2 * relative_error(theirs, want)


def test_unit_rows_are_what_was_packed():
    r = make_views(9, 40, dtype=torch.float32)[0]
    for precision in ("fp16", "bf16", "highest", "fp8"):
        asked = problem(rows=9, candidates=9, dim=33, width=40, precision=precision)
        z, _ = backend.BACKEND.normalize(asked, r, None)
        error = backend.BACKEND.unit_rows(asked, z) - torch.nn.functional.normalize(r[:, :33])
        assert z.shape[1] > 33 and error.abs().max() < (1e-5 if precision == "bf16" else 2e-7)


# Of the gradient against fp64, N = 160, d = 200; eager under bf16 autocast makes 2e-3 to 5e-2.
# None: the rule for fp32, twice eager's own.
ALLOWED = {"fp16": 5e-4, "bf16": 4e-3, "tf32": None, "highest": None, "fp8": 3e-2}


def autocast_loss(r1, r2, dim, **options):
    with torch.autocast("cpu", torch.bfloat16):
        return eager_loss(r1, r2, dim, **options).float()


@pytest.mark.parametrize("kind", ["unrelated", "views", "converged", "clustered"])
@pytest.mark.parametrize("precision", ALLOWED)
def test_each_precision_keeps_its_error(coarse, precision, kind):
    r1, r2 = make_views(160, 240, kind=kind, dtype=torch.float32)
    truth = evaluate(eager_loss, r1.double(), r2.double(), 200)
    people = evaluate(autocast_loss, r1, r2, 200)
    plain = evaluate(eager_loss, r1, r2, 200)
    ours = evaluate(fast_directclr_loss, r1, r2, 200, backend="triton", precision=precision)
    for got, want, theirs, eager in zip(ours[1:3], truth[1:3], people[1:3], plain[1:3]):
        error = relative_error(got, want)
        fp32 = bound(relative_error(eager, want), torch.float32)
        assert error < (ALLOWED[precision] or fp32)
        assert error <= 2 * relative_error(theirs, want)


@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_highest_on_rows_near_one_hot(coarse, temperature):
    r1, r2 = exact.near_one_hot(256, 360)
    options = {"dim": None, "temperature": temperature}
    truth = evaluate(eager_loss, r1.double(), r2.double(), **options)
    eager = evaluate(eager_loss, r1, r2, **options)
    ours = evaluate(fast_directclr_loss, r1, r2, backend="triton", **options)
    for got, want, plain in zip(ours[:3], truth, eager):
        assert relative_error(got, want) <= bound(relative_error(plain, want), torch.float32)


@pytest.mark.parametrize("precision,allowed", [("fp16", 1e-3), ("bf16", 8e-3), ("fp8", None)])
def test_a_positive_with_probability_099(coarse, precision, allowed):
    """p - 1 cancels: where the positive is not exact, this is where the gradient is lost."""
    r1, _ = make_views(256, 360, kind="unrelated", dtype=torch.float32)
    # Cosine c between the views: p = 0.99 where exp(10 c) is 99 times the other rows' sum.
    noise = torch.randn(r1.shape, generator=torch.Generator().manual_seed(1))
    noise -= (noise * r1).sum(1, True) / (r1 * r1).sum(1, True) * r1
    tangent = noise / noise.norm(dim=1, keepdim=True) * r1.norm(dim=1, keepdim=True)
    r2 = r1 + 0.16 * tangent
    truth = evaluate(eager_loss, r1.double(), r2.double(), None)
    assert 0.98 < float(torch.exp(-truth.loss)) < 0.995
    people = evaluate(autocast_loss, r1, r2, None)
    ours = evaluate(fast_directclr_loss, r1, r2, None, backend="triton", precision=precision)
    bound = relative_error(people.dr1, truth.dr1) if allowed is None else allowed
    assert relative_error(ours.dr1, truth.dr1) < bound
    assert relative_error(ours.dr2, truth.dr2) < bound


@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_converged_pairs(temperature):
    exact.test_a_converged_pair_keeps_its_relative_accuracy("triton", temperature)


@pytest.mark.parametrize("temperature", [0.001, 0.1, 10.0])
def test_hard_rows(temperature):
    exact.test_hard_rows_stay_finite_and_right("triton", temperature)


@pytest.mark.parametrize("eps", [0.5, 0.002])
@pytest.mark.parametrize("negatives", ["cross", "both"])
def test_rows_shorter_than_eps(negatives, eps, monkeypatch):
    """With numbers as a GPU gets them, in fp32: 1 / 0.002 is not the reciprocal of what comes."""

    def as_on_a_gpu(kernel, grid, args, options):
        kernel[grid](*(np.float32(x).item() if type(x) is float else x for x in args), **options)

    monkeypatch.setattr(common.launch, "recorder", as_on_a_gpu)
    exact.test_rows_shorter_than_eps_are_divided_by_it("triton", negatives, eps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf(bad):
    exact.test_nan_and_inf_reach_the_loss("triton", bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("negatives", ["cross", "both"])
def test_half_inputs_are_at_most_as_wrong_as_eager(dtype, negatives):
    r1, r2 = make_views(65, 90, kind="views", dtype=dtype)
    options = {"dim": 67, "negatives": negatives}
    truth = evaluate(eager_loss, r1.double(), r2.double(), **options)
    eager = evaluate(eager_loss, r1, r2, **options)
    ours = evaluate(fast_directclr_loss, r1, r2, backend="triton", **options)
    assert ours.dr1.dtype == dtype
    for got, want, plain in zip(ours[:3], truth, eager):
        assert relative_error(got, want) <= 2 * relative_error(plain, want) + 1e-3


# ------------------------------------------------------------------------------ one result


def runs_of(r1, r2, **options):
    upstream = torch.tensor(0.7)
    options = {"dim": 40, "backend": "triton", "precision": "fp16"} | options
    return evaluate(fast_directclr_loss, r1, r2, upstream=upstream, **options)


@pytest.mark.parametrize(
    "negatives,temperature",
    [("cross", 0.005), ("cross", torch.tensor(0.1)), ("both", 0.1)],
    ids=str,
)
def test_repeat_runs_are_bitwise_equal(negatives, temperature):
    r1, r2 = make_views(70, 48, dtype=torch.float32)
    first, second = (
        runs_of(r1, r2, negatives=negatives, temperature=temperature) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second) if a is not None)


@pytest.fixture
def changed(monkeypatch):
    """Sets fields of the interpreter's tile."""

    def change(**changes):
        tile = dataclasses.replace(configs._INTERPRETER, **changes)
        monkeypatch.setattr(configs, "_INTERPRETER", tile)

    return change


@pytest.mark.parametrize("changes", [{"tma": True}, {"flatten": True, "warps": 8}, {"group": 1}])
@pytest.mark.parametrize(
    "more",
    [{}, {"precision": "highest"}, {"negatives": "both", "temperature": 0.005}],
    ids=str,
)
def test_descriptors_flattening_and_grouping_change_no_bit(changed, launches, changes, more):
    r1, r2 = make_views(70, 48, candidates=70 if "negatives" in more else 75, dtype=torch.float32)
    plain = runs_of(r1, r2, **more)
    tiles = launches.grids.pop("_weights_kernel")
    changed(**changes)
    other = runs_of(r1, r2, **more)
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], other))
    # Flattened, as many programs as the device holds take one tile after another.
    programs = 4 if "flatten" in changes else tiles
    assert tiles > 4 and launches.grids["_weights_kernel"] == programs


@pytest.mark.parametrize("fold", [2, 4])
@pytest.mark.parametrize("rows", [70, 96])
def test_sums_of_several_candidates_first(changed, fold, rows):
    r1, r2 = make_views(rows, 48, candidates=rows + 37, dtype=torch.float32)
    plain = runs_of(r1, r2)
    changed(fold=fold)
    for a, b in zip(plain[:3], runs_of(r1, r2)):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(
    "negatives,symmetric,temperature",
    [
        ("cross", True, 0.1), ("cross", False, 0.005), ("cross", True, 0.005),
        ("both", True, 0.005), ("both", False, 0.1),
    ],
)  # fmt: skip
def test_strips_and_superblocks_give_the_same_result(
    monkeypatch, negatives, symmetric, temperature
):
    r1, r2 = make_views(100, 48, dtype=torch.float32)
    options = {"negatives": negatives, "symmetric": symmetric, "temperature": temperature}
    whole = runs_of(r1, r2, precision="highest", **options)
    monkeypatch.setattr(packed, "PARTIAL_BYTES", 1)
    cut = runs_of(r1, r2, precision="highest", workspace_bytes=4 * 32 * 32, **options)
    for a, b in zip(whole[:3], cut):
        assert relative_error(a, b) < 2e-6


def test_a_row_beyond_two_to_the_31_elements(tmp_path):
    """Addresses are formed in int64: rows a sparse file apart, 4 GiB into it and beyond."""
    stride, rows = 2**30 + 8, 3
    try:
        with open(tmp_path / "rows", "wb") as file:
            file.truncate(2 * (stride * rows))
            holds = os.fstat(file.fileno()).st_blocks * 512
    except OSError as error:
        pytest.skip(f"this file system has no sparse file of 6 GiB: {error}")
    if holds > 2**20:
        pytest.skip("this file system has no sparse files")
    memory = np.memmap(tmp_path / "rows", dtype=np.float16, mode="r+", shape=(rows * stride,))
    far = torch.as_strided(torch.from_numpy(memory), (rows, 20), (stride, 1))
    r1, r2 = make_views(rows, 20, dtype=torch.float16)
    far.copy_(r1)
    near = runs_of(r1, r2, dim=16)
    ours = runs_of(far, r2, dim=16)
    assert all(torch.equal(a, b) for a, b in zip(near[:3], ours))


# ------------------------------------------------------------------------------ as a citizen


def test_the_same_tensor_twice_and_one_side_without_gradient():
    r1, r2 = (r.requires_grad_() for r in make_views(20, 24, dtype=torch.float32))
    both = torch.autograd.grad(fast_directclr_loss(r1, r1, 20, backend="triton"), r1)[0]
    wide = r1.detach().double().requires_grad_()
    want = torch.autograd.grad(eager_loss(wide, wide, 20), wide)[0]
    assert float((both.double() - want).norm()) < 1e-6 * float(want.norm()) + 1e-8
    full = torch.autograd.grad(fast_directclr_loss(r1, r2, 20, backend="triton"), (r1, r2))
    one = torch.autograd.grad(fast_directclr_loss(r1.detach(), r2, 20, backend="triton"), r2)[0]
    other = torch.autograd.grad(fast_directclr_loss(r1, r2.detach(), 20, backend="triton"), r1)[0]
    assert torch.equal(full[0], other) and torch.equal(full[1], one)
    t = torch.tensor(0.1, requires_grad=True)
    plain = [r.detach() for r in (r1, r2)]
    alone = torch.autograd.grad(fast_directclr_loss(*plain, 20, t, backend="triton"), t)[0]
    wide = [r.double() for r in plain]
    t64 = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(eager_loss(*wide, 20, t64), t64)[0]
    assert relative_error(alone, want) < 1e-5


@pytest.mark.parametrize(
    "columns,changes",
    [
        (None, {}),
        (None, {"precision": "fp8", "symmetric": False}),
        (torch.tensor([[1, 2, 30], [3, 0, 4]]), {"negatives": "both", "reduction": "none"}),
    ],
    ids=["slice", "fp8-one-direction", "groups-both"],
)
def test_opcheck(columns, changes):
    r1, r2 = (r.requires_grad_() for r in make_views(19, 32, dtype=torch.float32))
    arguments = ops.arguments(Options(dim=20, backend="triton").replace(**changes))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        ops.loss_forward, (r1, r2, columns, None, None, True, *arguments), test_utils=tests
    )


@pytest.mark.usefixtures("inductor")
def test_compiled_equals_eager():
    torch._dynamo.reset()
    r1, r2 = make_views(33, 32, dtype=torch.float32)
    compiled = torch.compile(fast_directclr_loss, fullgraph=True)
    with torch._inductor.config.patch(force_disable_caches=True):
        ours = evaluate(compiled, r1, r2, 20, backend="triton")
    eager = evaluate(fast_directclr_loss, r1, r2, 20, backend="triton")
    for a, b in zip(ours[:3], eager):
        assert relative_error(a, b) < 1e-7


class Launches(list):
    def __init__(self) -> None:
        self.grids = {}


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched, in order; everything else still runs. ``grids``: the most
    programs that a launch of each had."""
    from torch.utils._python_dispatch import _disable_current_modes

    names = Launches()
    plain = common.Launcher.__call__

    def counted(self, kernel, grid, *args, **options):
        names.append(kernel.fn.__name__)
        names.grids[names[-1]] = max(grid[0], names.grids.get(names[-1], 0))
        with _disable_current_modes():  # what the interpreter does is not counted
            return plain(self, kernel, grid, *args, **options)

    monkeypatch.setattr(common.Launcher, "__call__", counted)
    return names


def test_a_step_makes_few_python_calls(monkeypatch):
    """Beside Triton's own; below N of about 5,000 a GPU waits for them."""
    r1, r2 = (r.requires_grad_() for r in make_views(64, 48))
    monkeypatch.setattr(common.launch, "recorder", lambda *launch: None)
    calls = python_calls(lambda: fast_directclr_loss(r1, r2, 40, backend="triton").backward())
    assert 120 < calls.total() <= 185, calls.most_common(12)


def test_four_launches_forward_and_five_backward(launches, monkeypatch):
    """And no other operation on a device tensor of a size worth a launch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Computing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.__name__.partition(".")[0]
            if name not in FREE:
                others.append(name)
            return function(*args, **(kwargs or {}))

    # Views, allocation and bookkeeping: no kernel on a GPU.
    FREE = {"empty", "empty_like", "new_empty", "slice", "select", "unsqueeze", "view", "detach",
            "as_strided", "alias", "_unsafe_view", "empty_strided", "t", "transpose"}  # fmt: skip
    others: list[str] = []
    r1, r2 = (r.requires_grad_() for r in make_views(64, 48, dtype=torch.float32))
    torch.utils.deterministic.fill_uninitialized_memory = False
    # A listener would be shown the registered op, and nothing of what is inside.
    monkeypatch.setattr("directclr_fast.ops.dispatched", lambda *tensors: False)
    with Computing():
        loss = fast_directclr_loss(r1, r2, 40, backend="triton", precision="fp16")
    assert launches == ["_normalize_kernel", "_sums_kernel", "_combine_kernel", "_total_kernel"]
    assert others == []
    del launches[:]
    with torch.autograd.set_multithreading_enabled(False), Computing():
        torch.autograd.grad(loss, (r1, r2), torch.ones(()))
    assert launches == [
        "_factors_kernel", "_weights_kernel", "_product_kernel", "_product_kernel",
        "_finish_kernel",
    ]  # fmt: skip
    assert set(others) <= {"ones"}


# ------------------------------------------------------------------------------ choices


def test_automatic_choice_never_takes_interpreted_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "PRIORITY", ("triton", "torch"))  # nothing faster was built
    assert backend.BACKEND.why_not(problem(device_type="cpu")) == []
    assert dispatch.choose(problem(device_type="cpu")).backend == "torch"


def test_gpu_tensors_take_triton():
    assert dispatch.choose(problem()).backend == "triton"
    assert dispatch.choose(problem(dtype=torch.float64)).backend == "torch"
    assert "negatives 'same'" in backend.BACKEND.why_not(problem(negatives="same"))[0]


def test_tf32_on_an_amd_chip_without_it_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for chip, fits in (("gfx942:sramecc+", True), ("gfx950", False)):
        told = types.SimpleNamespace(gcnArchName=chip)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)  # noqa: B023
        assert fits == (backend.BACKEND.why_not(problem(precision="tf32")) == [])
        assert backend.BACKEND.why_not(problem(precision="highest")) == []


def test_automatic_precision_rounds_only_where_eager_would():
    assert backend.BACKEND.precision(problem()) == "highest"
    assert backend.BACKEND.precision(problem(autocast=True)) == "fp16"
    assert backend.BACKEND.precision(problem(dtype=torch.bfloat16)) == "fp16"
    assert backend.BACKEND.precision(problem(precision="tf32", autocast=True)) == "tf32"


def test_autocast_and_the_process_setting_reach_the_backend():
    seen = []
    plain = backend.BACKEND.precision

    def noted(problem):
        seen.append(plain(problem))
        return seen[-1]

    r1, r2 = make_views(8, 16, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.BACKEND, "precision", noted)
        fast_directclr_loss(r1, r2, 8, backend="triton")
        with torch.autocast("cpu", torch.bfloat16):
            fast_directclr_loss(r1, r2, 8, backend="triton")
        assert seen[0] == "highest" and seen[-1] == "fp16"
        with fp32_products("cpu", "tf32"):
            fast_directclr_loss(r1, r2, 8, backend="triton")
            assert seen[-1] == "fp16"
            # A graph made under one setting finishes under another.
            r1.requires_grad_()
            loss = fast_directclr_loss(r1, r2, 8, backend="triton")
        patch.undo()
        assert torch.autograd.grad(loss, r1)[0].isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (63, 65), (4096, 4096), (131072, 1000), (500, 10**6)])
@pytest.mark.parametrize("workspace", [None, 0, 10**6, 2**31])
def test_superblocks_fit_the_workspace(size, workspace):
    stages = backend.Triton("sm_90")
    asked = problem(rows=size[0], candidates=size[1], precision="fp16", workspace_bytes=workspace)
    layout = stages._layout(asked)
    tile = stages._tile("weights", layout, torch.device("cpu"))
    rows, columns = stages._superblock(asked, layout, tile)
    assert rows % tile.rows == 0 and columns % tile.columns == 0
    limit = stages.workspace(asked)
    assert 2 * rows * columns <= max(limit, 2 * tile.rows * tile.columns)


@pytest.mark.parametrize("arch", configs.SHARED_BYTES)
def test_product_tiles_divide_the_padding_of_weight_tiles(arch):
    """``products`` reads P in its own tiles without a mask along the padding."""
    for itemsize in (2, 4, configs.HI_LO):
        for crowded in (False, True):
            outer = configs.tile("weights", arch, itemsize, crowded)
            inner = configs.tile("products", arch, itemsize)
            assert outer.rows % inner.rows == 0 and outer.columns % inner.rows == 0
            assert outer.rows % inner.inner == 0 and outer.columns % inner.inner == 0
            assert 64 % configs.tile("sums", arch, itemsize, crowded).inner == 0


def test_a_column_outside_the_row_reads_nan_and_is_not_written(monkeypatch):  # A21
    """Where the index is on the device nobody waits to check it."""
    memory, gradient = torch.full((40, 64), 7.0), torch.full((40, 64), 7.0)
    r, dr = memory[8:32, 16:48], gradient[8:32, 16:48]
    r.copy_(make_views(24, 32)[0])
    monkeypatch.setattr(backend.Triton, "gradient_buffer", lambda *_: dr)
    options = Options(backend="triton")
    for bad in (32, 40, -1, 2**40):
        index = torch.tensor([[3, bad, 5]])
        problem = ops.problem_of(options, r, r, index)
        loss, states, _ = ops.forward_body(problem, ALONE, r, r, index, None)
        assert loss.isnan()
        need = (True, False, False)
        ops.backward_body(problem, ALONE, torch.ones(()), states, index, None, need)
        assert dr[:, [3, 5]].isnan().all()
        dr.fill_(7.0)
        assert (gradient == 7.0).all()
