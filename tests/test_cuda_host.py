"""The Hopper backend on a machine without a GPU: the kernels' own functions run on the CPU.

``csrc/cuda/stages_host.cu`` builds the module ``_cuda`` with the epilogues, the row functions and
the binding that ship, warps in lock-step and tiles in order; only TMA, wgmma and the launches are
not there. ``tests/test_cuda_gate.py`` builds those for sm_90a and reads the binaries.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import test_loss_exact as exact
import torch
from calls import python_calls
from directclr_fast.kernels import library as products
from directclr_fast.kernels.layout import Layout

from directclr_fast import dispatch, fast_directclr_loss, last_backend, ops
from directclr_fast.backends import cuda as backend
from directclr_fast.backends import hopper, packed
from directclr_fast.backends.base import Weights
from directclr_fast.problem import Options, Problem
from directclr_fast.testing import KINDS, bound, eager_loss, evaluate, make_views, relative_error
from directclr_fast.world import ALONE

CSRC = Path(__file__).parents[1] / "csrc"
_spec = importlib.util.spec_from_file_location("directclr_fast_build", CSRC / "build.py")
_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_build)

if _build.CUDA.nvcc() is None:
    pytest.skip("no nvcc", allow_module_level=True)


pytestmark = pytest.mark.xdist_group("cuda host")  # one build for all


def commands(output: Path, fragments: bool) -> list[list[str]]:
    """Builds ``_cuda`` with the kernels' functions run on the CPU (csrc/cuda/stages_host.cu);
    ``fragments`` adds a check against CUTLASS's own description of the accumulators."""
    cuda = _build.CUDA
    base = [cuda.compiler(), *cuda.flags, "-diag-suppress", "20011,20014"]
    base += _build._python_headers()
    if fragments:
        base += ["-DDIRECTCLR_CHECK_FRAGMENT", "-isystem", str(cuda.cutlass())]
    built, objects = [], []
    # Compiling takes longer than all that is run: little of what runs often is optimized, a little.
    for name, level in ("stages_host.cu", "-O1"), ("bindings.cpp", "-O0"):
        source = CSRC / "cuda" / name
        objects.append(str(output.with_suffix(f".{source.stem}.o")))
        built.append([*base, level, "-c", str(source), "-o", objects[-1]])
    link = cuda.link_command()[:-1]  # tests call into its C functions
    return [*built, [*link, *objects, "-o", str(output)]]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The module built for the CPU, and, with CUTLASS's headers, its check of the accumulators."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    output = tmp_path_factory.mktemp("cuda_host") / f"_cuda{suffix}"
    for command in commands(output, _build.CUDA.cutlass() is not None):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def module(library):
    spec = importlib.util.spec_from_file_location("_cuda", library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def chained(a, b):
    """a b as a tensor core adds: 16 exact products, what does not fit behind the sum cut off."""
    total = torch.zeros(a.shape[0], b.shape[1])
    a, b = a.double(), b.double()
    for k in range(0, a.shape[1], 16):
        exact = total + a[:, k : k + 16] @ b[k : k + 16]
        total = exact.float()
        total = torch.where(total.abs() > exact.abs(), total.nextafter(torch.zeros(())), total)
    return total


@pytest.fixture(autouse=True)
def on_the_cpu(module, monkeypatch):
    """Backend "cuda" takes CPU tensors, and the library's product is added as on a GPU."""
    monkeypatch.setattr(hopper, "_cuda", module)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    stream = module.Stream(handle=0, device=0, multiprocessors=132)
    monkeypatch.setattr(hopper, "_stream", lambda tensor: stream)

    def multiply(dz, a, b, add, alpha=1.0):
        product = chained(a, b)
        dz.copy_(dz + alpha * product if add else product)

    monkeypatch.setattr(products, "multiply", multiply)
    plain = backend.BACKEND.why_not

    def why_not(problem):
        reasons = plain(problem)
        return [r for r in reasons if "runs on NVIDIA GPUs" not in r]

    monkeypatch.setattr(backend.BACKEND, "why_not", why_not)


def problem(**changes) -> Problem:
    given = {
        "rows": 64, "candidates": 64, "width": 32, "dim": 16, "dtype": torch.float16,
        "device_type": "cuda", "temperature": 0.1,
    }  # fmt: skip
    return Problem(**(given | changes))


def runs_of(r1, r2, **options):
    upstream = torch.tensor(0.7)
    options = {"dim": 40, "backend": "cuda", "precision": "fp16"} | options
    result = evaluate(fast_directclr_loss, r1, r2, upstream=upstream, **options)
    assert last_backend() == options["backend"]
    return result


# ------------------------------------------------------------------------------ against cutlass


def test_accumulators_lie_where_cutlass_says(library):
    if _build.CUDA.cutlass() is None:
        pytest.skip("CUTLASS's headers are not installed")
    assert ctypes.CDLL(str(library)).host_fragment_mismatches() == 0


def test_offsets_beyond_two_to_the_31_elements(library):
    offset = ctypes.CDLL(str(library)).host_row_offset
    offset.argtypes, offset.restype = [ctypes.c_int64, ctypes.c_int64], ctypes.c_int64
    assert offset(10**7, 768) == 768 * 10**7 > 2**32


# ------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("dim", [20, 300])  # either schedule
@pytest.mark.parametrize("negatives", ["cross", "both"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_top1_is_that_of_the_rounded_rows(monkeypatch, negatives, symmetric, dim):
    """Strips, ties and ragged edges; operands of fp16, so the reference takes rows so rounded."""
    monkeypatch.setattr(packed, "PARTIAL_BYTES", 1)
    r1, r2 = make_views(300, 320, kind="ties", dtype=torch.float32)
    given = {"negatives": negatives, "symmetric": symmetric, "return_stats": True}
    _, stats = fast_directclr_loss(r1, r2, dim, backend="cuda", precision="fp16", **given)
    z1, z2 = (torch.nn.functional.normalize(r[:, :dim], dim=1).half().double() for r in (r1, r2))
    off = ~torch.eye(300, dtype=torch.bool)
    own = (z1 * z2).sum(1)
    for got, a, b in ((stats.row_top1, z1, z2), (stats.col_top1, z2, z1)):
        if got is None:
            continue
        largest = (a @ b.T)[off].view(300, 299).amax(1)
        if negatives == "both":
            largest = torch.maximum(largest, (a @ a.T)[off].view(300, 299).amax(1))
        sure = (own - largest).abs() > 1e-6
        assert torch.equal(got[sure], own[sure] > largest[sure])
        assert got[~sure].all()  # equal rows, not only nearly so


# ------------------------------------------------------------------------------ how exact

ALLOWED = {"fp16": 5e-4, "bf16": 4e-3, "fp8": 3e-2}  # of the gradient; eager bf16: 2e-3 to 5e-2


def autocast_loss(r1, r2, dim, **options):
    with torch.autocast("cpu", torch.bfloat16):
        return eager_loss(r1, r2, dim, **options).float()


@pytest.mark.parametrize("kind", ["unrelated", "views", "converged", "clustered"])
@pytest.mark.parametrize(
    "precision,dim", [("fp16", 360), ("fp16", 130), ("bf16", 360), ("fp8", 360)]
)
def test_each_precision_keeps_its_error(precision, dim, kind):
    """Both schedules: rows of up to 256 columns take tiles of 64 rows, longer ones of 128."""
    r1, r2 = make_views(300, 400, kind=kind, dtype=torch.float32)
    truth = evaluate(eager_loss, r1.double(), r2.double(), dim)
    people = evaluate(autocast_loss, r1, r2, dim)
    ours = evaluate(fast_directclr_loss, r1, r2, dim, backend="cuda", precision=precision)
    for got, want, theirs in zip(ours[1:3], truth[1:3], people[1:3]):
        error = relative_error(got, want)
        assert error < ALLOWED[precision]
        assert error <= 2 * relative_error(theirs, want)


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k != "duplicate"] + ["one-tensor", "near one-hot"]
)
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_highest_errs_at_most_twice_as_eager(monkeypatch, kind, temperature):
    """With sums cut off as tensor cores do, over parts of the rows in turn."""
    monkeypatch.setattr(products, "CHAIN", 64)
    rows, dim = 160, 200
    if kind == "near one-hot":
        r1, r2 = exact.near_one_hot(rows, dim)
    else:
        r1, r2 = make_views(rows, dim, kind="ties" if kind == "one-tensor" else kind)
    r2 = r1 if kind == "one-tensor" else r2
    options = {"dim": None, "temperature": temperature}
    truth = evaluate(eager_loss, r1.double(), r2.double(), **options)
    eager = evaluate(eager_loss, r1, r2, **options)
    ours = evaluate(fast_directclr_loss, r1, r2, backend="cuda", **options)
    for name, of in (("ours", ours), ("eager", eager)):
        errors = [relative_error(got, want) for got, want in zip(of[1:3], truth[1:3])]
        print(f"{kind}, temperature {temperature}, {name}: {max(errors):.1e}")
    assert relative_error(ours.loss, truth.loss) < 1e-5 or float(truth.loss) < 1e-12
    for got, want, plain in zip(ours[1:3], truth[1:3], eager[1:3]):
        allowed = bound(relative_error(plain, want), torch.float32)
        all_rounding = float((got.double() - want).norm()) < 1e-9
        assert relative_error(got, want) <= allowed or all_rounding


@pytest.mark.parametrize("precision,allowed", [("fp16", 1e-3), ("bf16", 8e-3)])
def test_a_positive_with_probability_099(precision, allowed):
    r1, _ = make_views(256, 360, kind="unrelated", dtype=torch.float32)
    noise = torch.randn(r1.shape, generator=torch.Generator().manual_seed(1))
    noise -= (noise * r1).sum(1, True) / (r1 * r1).sum(1, True) * r1
    r2 = r1 + 0.16 * noise / noise.norm(dim=1, keepdim=True) * r1.norm(dim=1, keepdim=True)
    truth = evaluate(eager_loss, r1.double(), r2.double(), None)
    assert 0.98 < float(torch.exp(-truth.loss)) < 0.995
    ours = evaluate(fast_directclr_loss, r1, r2, None, backend="cuda", precision=precision)
    assert relative_error(ours.dr1, truth.dr1) < allowed
    assert relative_error(ours.dr2, truth.dr2) < allowed


CASES = {
    "plain": {},
    "one-row": {"rows": 1},
    "ragged": {"rows": 129, "candidates": 257},
    "prime": {"rows": 61, "candidates": 521},
    "wide": {"rows": 70, "dim": 300},
    "one-direction": {"symmetric": False, "candidates": 90},
    "both": {"negatives": "both", "rows": 140},
    "both-tiles": {"negatives": "both", "rows": 300},  # more than one wide
    "both-one-direction": {"negatives": "both", "symmetric": False},
    "cold": {"temperature": 0.005},
    "cold-both": {"temperature": 0.005, "negatives": "both"},
    "tensor": {"temperature": torch.tensor(0.1)},
    "tensor-cold-one-direction": {"temperature": torch.tensor(0.01), "symmetric": False},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "bf16": {"precision": "bf16", "rows": 90},
    "fp8": {"precision": "fp8", "rows": 90},
    "highest": {"precision": "highest", "rows": 129, "candidates": 257},
    "highest-both": {"precision": "highest", "negatives": "both", "rows": 140},
    "highest-cold-workspace": {
        "precision": "highest", "temperature": 0.005, "rows": 300, "workspace_bytes": 4 * 256 * 256,
    },
    "highest-tensor-none": {
        "precision": "highest", "temperature": torch.tensor(0.1), "reduction": "none",
        "symmetric": False,
    },
    "groups": {"columns": torch.tensor([[3, 1, 40], [0, 7, 2]])},
    "gathered": {"columns": torch.tensor([3, 1, 40, 17, 18])},
    "workspace": {"rows": 300, "workspace_bytes": 2 * 256 * 256},
    "half-input": {"dtype": torch.float16},
    "bf16-input": {"dtype": torch.bfloat16},
    "odd-strides": {"strided": True},
}  # fmt: skip


def arguments(case: dict):
    case = dict(case)
    rows, dtype = case.pop("rows", 64), case.pop("dtype", torch.float32)
    candidates = case.pop("candidates", rows)
    r1, r2 = make_views(rows, 320, candidates=candidates, kind="views", dtype=dtype)
    if case.pop("strided", False):
        r1, r2 = (r.repeat(1, 2)[:, 1::2][:, :319] for r in (r1, r2))
    if "columns" in case:
        case["dim"] = None
    return r1, r2, case


@pytest.mark.parametrize("name", CASES)
def test_every_option_agrees_with_the_triton_kernels(name, interpreted):
    """They round the same operands, and were held against the reference themselves."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton's kernels are compiled here")
    r1, r2, options = arguments(CASES[name])
    generator = torch.Generator().manual_seed(2)
    shape = (len(r1),) if options.get("reduction") == "none" else ()
    upstream = torch.randn(shape, generator=generator)
    options = {"dim": 40, "precision": "fp16"} | options
    if options["dim"] is None:
        del options["dim"]
    ours = evaluate(fast_directclr_loss, r1, r2, upstream=upstream, backend="cuda", **options)
    theirs = evaluate(fast_directclr_loss, r1, r2, upstream=upstream, backend="triton", **options)
    for got, want in zip(ours, theirs):
        if want is None:
            continue
        # Of the host's sums the ends are cut off.
        floor = 1e-3 if got.dtype in (torch.float16, torch.bfloat16) else 1e-4
        # fp16 rounds a stored weight either way where the exponentials differ in the last place.
        assert relative_error(got, want) < floor, name


def test_converged_pairs():
    """p = 1 - 5e-5 and 1e-4 between the views: the gradient keeps its relative accuracy. (Beyond
    p = 1 - 2^-28 fp16 weights underflow; that is what precision "highest" is for.)"""
    r1 = torch.eye(4, 8)[:2] * 3
    r2 = r1 + 1e-4 * torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    ours = evaluate(fast_directclr_loss, r1, r2, 8, backend="cuda", precision="fp16")
    wide = evaluate(fast_directclr_loss, r1.double(), r2.double(), 8)
    assert relative_error(ours.loss, wide.loss) < 1e-6
    assert relative_error(ours.dr1, wide.dr1) < 2e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_nan_and_inf_reach_the_loss(bad, temperature):
    r1, r2 = make_views(20, 64, dtype=torch.float32)
    r1[3, 5] = bad
    loss = fast_directclr_loss(r1, r2, 40, temperature, backend="cuda", precision="fp16")
    assert not loss.isfinite()


@pytest.mark.parametrize("temperature", [0.001, 0.1, 10.0])
def test_antipodal_and_zero_rows_stay_finite(temperature):
    r1, r2 = make_views(20, 64, dtype=torch.float32)
    r2[0] = -r1[0]
    r1[1], r2[2], r1[4] = 0.0, 0.0, 1e-30 * r1[4]
    for rows in (slice(0, 1), slice(0, 20)):
        options = {"temperature": temperature, "precision": "fp16", "backend": "cuda"}
        results = evaluate(fast_directclr_loss, r1[rows], r2[rows], 40, **options)
        assert all(v.isfinite().all() for v in results if v is not None)


# ------------------------------------------------------------------------------ one result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("negatives", ["cross", "both"])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_strips_and_superblocks_give_the_same_result(
    monkeypatch, negatives, symmetric, temperature
):
    r1, r2 = make_views(300, 48, dtype=torch.float32)
    options = {"negatives": negatives, "symmetric": symmetric, "temperature": temperature}
    whole = runs_of(r1, r2, **options)
    monkeypatch.setattr(packed, "PARTIAL_BYTES", 1)
    cut = runs_of(r1, r2, workspace_bytes=2 * 256 * 256, **options)
    for a, b in zip(whole[:3], cut):
        assert relative_error(a, b) < 1e-5


def test_the_same_tensor_twice_and_one_side_without_gradient():
    options = {"backend": "cuda", "precision": "fp16"}
    r1, r2 = (r.requires_grad_() for r in make_views(20, 24, dtype=torch.float32))
    both = torch.autograd.grad(fast_directclr_loss(r1, r1, 20, **options), r1)[0]
    wide = r1.detach().double().requires_grad_()
    want = torch.autograd.grad(eager_loss(wide, wide, 20), wide)[0]
    assert float((both.double() - want).norm()) < 1e-3 * float(want.norm()) + 1e-6
    full = torch.autograd.grad(fast_directclr_loss(r1, r2, 20, **options), (r1, r2))
    one = torch.autograd.grad(fast_directclr_loss(r1.detach(), r2, 20, **options), r2)[0]
    other = torch.autograd.grad(fast_directclr_loss(r1, r2.detach(), 20, **options), r1)[0]
    assert torch.equal(full[0], other) and torch.equal(full[1], one)


@pytest.mark.usefixtures("inductor")
def test_compiled_equals_eager():
    torch._dynamo.reset()
    r1, r2 = make_views(33, 32, dtype=torch.float32)
    compiled = torch.compile(fast_directclr_loss, fullgraph=True)
    options = {"backend": "cuda", "precision": "fp16"}
    with torch._inductor.config.patch(force_disable_caches=True):
        ours = evaluate(compiled, r1, r2, 20, **options)
    eager = evaluate(fast_directclr_loss, r1, r2, 20, **options)
    for a, b in zip(ours[:3], eager):
        assert relative_error(a, b) < 1e-7


class _Counting:
    """The module, noting the names of the stages it is asked for."""

    def __init__(self, module):
        self.module, self.names = module, []

    def __getattr__(self, name):
        value = getattr(self.module, name)
        if isinstance(value, type) or name in ("combine_blocks", "tile_height", "built_with"):
            return value
        self.names.append(name)
        return value


@pytest.mark.parametrize("temperature", [0.1, torch.tensor(0.1)], ids=str)
def test_four_launches_forward_and_five_backward(monkeypatch, temperature):
    counting = _Counting(hopper._cuda)
    monkeypatch.setattr(hopper, "_cuda", counting)
    products, plain = [], hopper.product
    monkeypatch.setattr(
        hopper, "product", lambda *a, **k: (products.append("product"), plain(*a, **k))
    )
    r1, r2 = (r.requires_grad_() for r in make_views(64, 48, dtype=torch.float32))
    loss = fast_directclr_loss(r1, r2, 40, temperature, backend="cuda", precision="fp16")
    assert counting.names == ["normalize", "sums", "combine", "total"]
    del counting.names[:]
    loss.backward()
    assert counting.names == ["factors", "weights", "finish"] and len(products) == 2


@pytest.mark.parametrize("negatives,most", [("cross", 160), ("both", 410)])
def test_a_step_makes_few_python_calls(negatives, most):
    """Of functions of this package; below N of about 5,000 a GPU waits for them."""
    r1, r2 = (r.requires_grad_() for r in make_views(64, 48, dtype=torch.float32))
    options = {"negatives": negatives, "backend": "cuda", "precision": "fp16"}
    calls = python_calls(lambda: fast_directclr_loss(r1, r2, 40, **options).backward())
    assert 0.8 * most < calls.total() <= most, calls.most_common(12)


# ------------------------------------------------------------------------------ launch plans


@pytest.fixture(scope="module")
def tiles_of(library):
    """The tiles of a launch of m x n entries, in their order: (count, [(row, column) ...])."""
    function = ctypes.CDLL(str(library)).host_tiles
    function.restype = ctypes.c_int64
    function.argtypes = [ctypes.c_int] * 3 + [ctypes.c_bool, ctypes.c_void_p, ctypes.c_int64]

    def tiles(m: int, n: int, height: int, upper: bool, room: int = 0):
        places = np.zeros((room, 2), dtype=np.int32)
        count = function(m, n, height, upper, places.ctypes.data, room)
        return count, [tuple(tile) for tile in places.tolist()]

    return tiles


@pytest.mark.parametrize("height", [64, 128])
@pytest.mark.parametrize("upper", [False, True])
def test_the_order_has_every_tile_that_counts_once(tiles_of, height, upper):
    for m, n in (
        (1, 1),
        (1, 9000),
        (256, 256),
        (257, 300),
        (2100, 2100),
        (5000, 5000),
        (700, 5000),
    ):
        count, tiles = tiles_of(m, n, height, upper, 8192)
        tiles = tiles[:count]
        assert len(set(tiles)) == count, (m, n)
        rows, columns = -(-m // (2 * height)) * 2, -(-n // 256)
        wanted = {
            (row, column)
            for row in range(0, rows, 2)
            for column in range(columns)
            if not upper or min(n, (column + 1) * 256) - 1 > row * height
        }
        wanted |= {(row + 1, column) for row, column in wanted}
        alone = {t for t in set(tiles) - wanted if t[1] * 256 + 1 == n}  # of a last entry, itself
        assert set(tiles) - alone == wanted, (m, n)
        # Neighbours in the order share operands: 8 clusters of rows before the next column.
        if not upper and rows >= 16:
            assert tiles[:32:2] == [(2 * i, 0) for i in range(8)] + [(2 * i, 1) for i in range(8)]


def trouble(calls, depth: int, stages: int) -> str | None:
    """What goes wrong in some order of the steps of a cluster: two blocks that load blocks of
    columns for each other into ``stages``, each with two warpgroups, which multiply ``depth`` of
    them a tile and call barriers as ``calls`` says: for the leader and the follower, the two of
    each tile, positive to wait at, negative to arrive at, 0 for none."""
    tiles = len(calls[0])
    programs = []
    for begin_and_end in calls:
        steps = []
        for tile, (begin, end) in enumerate(begin_and_end):
            blocks = range(tile * depth, (tile + 1) * depth)
            steps += [("use", block) for block in blocks]
            steps += [("release", blocks[-1]), ("meet", begin), ("in", tile), ("meet", end)]
        programs.append(steps)

    def released(group: int, at: int) -> int:
        """Blocks that a group has released; the last one used is held until the next is."""
        tile, step = divmod(at, depth + 4)
        return tile * depth + (max(step - 1, 0) if step <= depth else depth)

    # (loads issued by each block; steps done by each group; by group, whether it waits; by block,
    # barriers at which one of its groups has arrived, with which).
    start = ((0, 0), (0,) * 4, (False,) * 4, (frozenset(), frozenset()))
    seen, left = {start}, [start]
    while left:
        loads, at, waits, met = left.pop()
        following = []
        for block in range(2):
            room = loads[block] - stages < min(released(g, at[g]) for g in range(4))
            if loads[block] < tiles * depth and room:
                more = tuple(n + (b == block) for b, n in enumerate(loads))
                following.append((more, at, waits, met))
        for g in range(4):
            block, follows = divmod(g, 2)
            steps, other = programs[follows], g ^ 1
            if at[g] == len(steps) or waits[g]:
                continue
            kind, which = steps[at[g]]
            if kind == "use" and which >= min(loads):
                continue
            done, waiting, now = list(at), list(waits), list(met)
            done[g] += 1
            if kind == "in":
                their = programs[1 - follows][at[other]][0] if at[other] < len(steps) else None
                if their == "in" and (at[g] - at[other]) // (depth + 4) % 2 == 0:
                    return f"one buffer is used by both groups, {at}"
            if kind == "meet" and which:
                name = abs(which)
                if (name, g) in met[block]:
                    return f"barrier {name} is arrived at twice, {at}"
                if (name, other) in met[block]:
                    now[block] -= {(name, other)}
                    if waits[other] and programs[1 - follows][at[other]] == ("meet", name):
                        waiting[other], done[other] = False, done[other] + 1
                else:
                    now[block] |= {(name, g)}
                    if which > 0:
                        waiting[g], done[g] = True, at[g]
            following.append((loads, tuple(done), tuple(waiting), tuple(now)))
        if not following and any(n < len(programs[g % 2]) for g, n in enumerate(at)):
            return f"nobody can go on, {at}"
        left += [state for state in following if state not in seen]
        seen.update(following)
    return None


@pytest.fixture(scope="module")
def turns(library):
    """Calls at barriers of the source that ships: for the leader and the follower, by tile."""
    function = ctypes.CDLL(str(library)).host_turns
    function.argtypes = [ctypes.c_bool, ctypes.c_int, ctypes.c_void_p]
    order = np.zeros((2, 4, 2), dtype=np.int32)
    for group in range(2):
        function(group == 0, order.shape[1], order[group].ctypes.data)
    return order.tolist()


@pytest.mark.parametrize("depth,stages", [(1, 4), (1, 2), (2, 3)])
def test_warpgroups_that_take_turns_never_wait_for_ever(turns, depth, stages):
    assert trouble(turns, depth, stages) is None


def test_the_walk_sees_a_broken_order(turns):
    """Without the follower's word that a buffer is read, with one barrier for all tiles, with a
    follower that does not wait."""
    leader, follower = turns
    silent = [[begin, 0] for begin, _ in follower]
    assert "nobody" in trouble([leader, silent], 1, 4)
    careless = [[0, end] for _, end in leader]
    assert "one buffer" in trouble([careless, silent], 1, 4)
    one = {0: 0, 1: 1, 2: 1, 3: 3, 4: 3}
    alike = [[[one[begin], -one[-end]] for begin, end in group] for group in turns]
    assert "twice" in trouble(alike, 1, 4)
    eager = [[0, end] for _, end in follower]
    assert "twice" in trouble([leader, eager], 1, 4)


class _Launches:
    """Kernels that note what they are asked for."""

    lines = staticmethod(hopper.lines)

    def __init__(self):
        self.sums_of, self.weights_of = [], []

    def device(self, tensor):
        return contextlib.nullcontext()

    def sums(self, layout, z1, z2, strip, *_, upper, **__):
        first = strip.start if upper else 0
        self.sums_of.append((strip.stop - strip.start, len(z2) - first, upper))

    def weights(
        self, layout, z1, z2, factors, scale, offset, rows, columns, out, tile, mirror=False
    ):
        self.weights_of.append((rows.stop - rows.start, columns.stop - columns.start, mirror))

    def fold(self, *_):
        pass

    product = add_positives = lambda self, *_, **__: None


def needed(n: int, tile, upper: bool) -> int:
    """Tiles of n x n entries with one that counts: for ``upper`` a column beyond its row."""
    rows, columns = -(-n // tile.rows), -(-n // tile.columns)
    if not upper:
        return rows * columns
    return sum(columns - (row * tile.rows + 1) // tile.columns for row in range(rows))


@pytest.mark.parametrize("dim", [128, 360])  # either schedule
@pytest.mark.parametrize("negatives", ["cross", "both"])
@pytest.mark.parametrize("n", [1536, 2100, 5000, 32768, 1048576])
def test_at_most_five_percent_of_the_tiles_are_wasted(monkeypatch, tiles_of, n, negatives, dim):
    """But for an odd last tile row, whose cluster has a second tile: a row of tiles a launch."""
    launches, made = _Launches(), backend.Cuda()
    monkeypatch.setattr(made, "kernels", launches)
    asked = problem(rows=n, candidates=n, dim=dim, width=dim, negatives=negatives, precision="fp16")
    packing = made._layout(asked)
    tile = made._tile("sums", packing, torch.device("meta"))
    z = torch.empty((n, packing.row), dtype=packing.dtype, device="meta")
    dz, w = (torch.empty((n, k), dtype=torch.float64, device="meta") for k in (packing.pitch, 1))
    factors = packed._factors(Weights(w, w, w, w, w), True, packing.unit)[0]
    made.sums(asked, z, z, 10.0, None)
    made._tile_products(asked, packing, z, z, 10.0, factors, 0, (True, True))
    wanted = needed(n, tile, False)
    if negatives == "both":
        wanted += 2 * needed(n, tile, True)
        for _ in range(2):
            made.self_sums(asked, z, 10.0)
            made.add_self_products(asked, z, 10.0, w[:, 0], w[:, 0], dz)
    for of_pass in (launches.sums_of, launches.weights_of):
        run = odd = 0
        for (rows, columns, upper), times in Counter(of_pass).items():
            run += times * tiles_of(rows, columns, tile.rows, upper)[0]
            odd += times * (-(-rows // tile.rows) % 2) * -(-columns // tile.columns)
        assert wanted <= run <= min(1.05 * wanted + odd, 1.06 * wanted)


@pytest.mark.parametrize("dim", [40, 300])  # either schedule
@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("precision", ["fp16", "highest"])
def test_a_mirrored_half_has_the_bits_of_a_computed_one(precision, dim, bounded):
    for n in (200, 256, 300, 780) if precision == "fp16" else (300,):
        packing = Layout(precision, dim)
        view = packed._unit_rows(packing, make_views(n, 320, dtype=torch.float32)[0])
        hopper.normalize(packing, [view], None, None, 0, 1e-12)
        w = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        factors, _ = packed._factors(Weights(w, w, w, w, w), bounded, packing.unit)
        made = []
        for mirror in (False, True):
            out = torch.full((1024 * 1024,), torch.nan, dtype=packing.dtype)
            every, tile = slice(0, n), hopper.tile(packing)
            given = (packing, view[1], view[1], factors, 10.0, 0, every, every, out, tile, mirror)
            made.append(hopper.weights(*given).clone())
        parts = made[1].chunk(packing.parts, 1)
        assert not any(part[:, n:].any() for part in parts)
        if precision == "fp16":
            assert torch.equal(*made) and torch.equal(parts[0][:, :n], parts[0][:, :n].T)
            continue
        # lo hi' and hi lo' change places below the diagonal, and with them the last place of a sum:
        # what is computed is nearly the same, and what is a mirror image is the same.
        hi = [whole.chunk(2, 1)[0].float() for whole in made]
        torch.testing.assert_close(*hi, rtol=1e-3, atol=0)
        assert all(torch.equal(part[256:, :256], part[:256, 256:n].T) for part in parts)


# ------------------------------------------------------------------------------ choices


def test_reasons():
    assert backend.BACKEND.why_not(problem()) == []
    assert backend.BACKEND.why_not(problem(dtype=torch.float32)) == []
    assert "fp16, bf16 or fp8" in backend.BACKEND.why_not(problem(precision="tf32"))[0]
    assert "float64" in backend.BACKEND.why_not(problem(dtype=torch.float64))[0]
    assert "negatives 'same'" in backend.BACKEND.why_not(problem(negatives="same"))[0]
    ignored = problem(labelled=True, same_label="ignore")
    assert "positives only" in backend.BACKEND.why_not(ignored)[0]


def test_it_is_chosen_only_where_a_measurement_says_so(monkeypatch):
    assert dispatch.choose(problem()).backend == "triton"
    monkeypatch.setattr(backend, "FASTER", (("fp16", 16, 64),))
    assert dispatch.choose(problem()).backend == "cuda"
    assert dispatch.choose(problem(rows=63, candidates=63)).backend == "triton"
    assert dispatch.choose(problem(precision="bf16")).backend == "triton"


def test_a_failed_launch_is_one_sentence(module):
    """dtype codes are the binding's own; the text names the stage and the device."""
    rows = module.Input(data=0, dtype=7, rows=4, width=1, row_stride=1, col_stride=1)
    layout = module.Layout(bf16=False, fp8=False, d=8, pitch=64, row=128, fp8_scale=1.0)
    arguments = module.NormalizeArguments(
        r1=rows, r2=rows, index=0, z1=0, z2=0, rnorm1=0, rnorm2=0, positives=0, offset=0, eps=1e-12,
        both=True,
    )  # fmt: skip
    stream = module.Stream(handle=0, device=3, multiprocessors=132)
    with pytest.raises(RuntimeError, match=r"^cuda backend: dtype: expected .* \(device 3\)$"):
        module.normalize(layout, arguments, stream)


def test_a_struct_of_arguments_wants_each_of_its_fields_once(module):
    with pytest.raises(TypeError, match="^Exponent: the field operands is missing$"):
        module.Exponent(scale=0, value=1.0)
    with pytest.raises(TypeError, match="^Exponent: expected 3 fields, got 4$"):
        module.Exponent(scale=0, value=1.0, operands=1.0, other=0)


def test_without_the_extension_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(hopper, "_cuda", None)
    monkeypatch.setattr(hopper, "missing", "no module")
    reason = backend.BACKEND.why_not(problem())[0]
    assert reason.startswith("the compiled extension is not installed (no module)")


def test_a_column_outside_the_row_reads_nan_and_is_not_written(monkeypatch):  # A21
    """Where the index is on the device nobody waits to check it."""
    memory, gradient = torch.full((40, 64), 7.0), torch.full((40, 64), 7.0)
    r, dr = memory[8:32, 16:48], gradient[8:32, 16:48]
    r.copy_(make_views(24, 32)[0])
    monkeypatch.setattr(backend.Cuda, "gradient_buffer", lambda *_: dr)
    options = Options(precision="fp16", backend="cuda")
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
