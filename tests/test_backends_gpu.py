"""The Triton and Hopper backends on a GPU: what only one can tell. Skipped, with its reason,
elsewhere."""

from __future__ import annotations

import pytest
import torch
from gates import sanitize

from directclr_fast import dispatch, fast_directclr_loss, last_backend
from directclr_fast.testing import eager_loss, evaluate, make_views, problem, relative_error

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

# Against fp64, on rows as make_views draws them; DESIGN's table per precision with a margin of 2.
# "highest": what tensor cores cut off behind a sum grows with d.
ALLOWED = {"fp16": 1e-3, "bf16": 8e-3, "tf32": 2e-3, "highest": 2e-5, "fp8": 6e-2}
gpu = "cuda"


backend = "triton"  # of the calls below; a name and not a fixture's value, for torch.compile


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def each_backend(request):
    global backend
    asked = problem(dtype=torch.float16, device_type=gpu)
    reasons = dispatch.load(request.param).why_not(asked)
    if reasons:
        pytest.skip(reasons[0])
    backend = request.param


def supported(precision: str) -> bool:
    if backend == "cuda" and precision == "tf32":
        return False
    return precision != "fp8" or torch.cuda.get_device_capability() >= (8, 9)


def loss_of(r1, r2, *args, **options):
    """The loss by the backend under test."""
    return fast_directclr_loss(r1, r2, *args, backend=backend, **options)


def views(rows, width, kind="views", dtype=torch.float32, **more):
    return make_views(rows, width, kind=kind, dtype=dtype, device=gpu, **more)


def truth_of(r1, r2, dim, **options):
    return evaluate(eager_loss, r1.double(), r2.double(), dim, **options)


def ours(r1, r2, dim, **options):
    result = evaluate(loss_of, r1, r2, dim, **options)
    assert last_backend() == backend
    return result


@pytest.mark.parametrize("precision", ALLOWED)
@pytest.mark.parametrize("rows,width,dim", sanitize.TESTED)
def test_every_shape_and_precision(rows, width, dim, precision):
    if not supported(precision):
        pytest.skip("not of this backend or GPU")
    r1, r2 = views(rows, width)
    result = ours(r1, r2, dim, precision=precision)
    for got, want in zip(result[:3], truth_of(r1, r2, dim)):
        absolute = float((got.double() - want).norm())
        # One row, or one column, leaves gradients that are all rounding.
        assert relative_error(got, want) < ALLOWED[precision] or absolute < 1e-6


@pytest.mark.parametrize("kind", ["unrelated", "views", "converged", "clustered"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_no_worse_than_eager_autocast(precision, kind):
    if not supported(precision):
        pytest.skip("not of this backend or GPU")
    r1, r2 = views(2048, 360, kind)

    def autocast(a, b, dim, **options):
        with torch.autocast("cuda", torch.bfloat16):
            return eager_loss(a, b, dim, **options).float()

    truth = truth_of(r1, r2, 360)
    people = evaluate(autocast, r1, r2, 360)
    result = ours(r1, r2, 360, precision=precision)
    factor = 2.0 if precision == "fp8" else 1.0
    for got, want, theirs in zip(result[1:3], truth[1:3], people[1:3]):
        assert relative_error(got, want) <= factor * relative_error(theirs, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("negatives", ["cross", "both"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_options_at_most_twice_as_wrong_as_eager(negatives, symmetric, dtype):
    r1, r2 = views(700, 512, dtype=dtype)
    columns = torch.stack([torch.randperm(512)[:100] for _ in range(3)]).to(gpu)
    floor = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for more in (
        {"dim": 360},
        # Colder, the negatives of these rows end below what P holds in half precision (7e-12).
        {"dim": 360, "temperature": 0.05},
        {"dim": 360, "temperature": torch.tensor(0.07, device=gpu)},
        {"dim": 360, "reduction": "none"},
        {"dim": None, "columns": columns},
    ):
        options = {"negatives": negatives, "symmetric": symmetric} | more
        dim = options.pop("dim")
        wide = dict(options)
        if isinstance(options.get("temperature"), torch.Tensor):
            wide["temperature"] = options["temperature"].double()
        want = truth_of(r1, r2, dim, **wide)
        of_eager = evaluate(eager_loss, r1, r2, dim, **options)
        for got, true, eager in zip(ours(r1, r2, dim, **options), want, of_eager):
            if true is not None:
                assert relative_error(got, true) <= 2 * relative_error(eager, true) + floor, more


def test_superblocks_and_strips_agree_with_one_of_each(monkeypatch):
    from directclr_fast.backends import packed

    r1, r2 = views(3000, 512)
    whole = ours(r1, r2, 360, precision="fp16")
    monkeypatch.setattr(packed, "PARTIAL_BYTES", 2**20)
    cut = ours(r1, r2, 360, precision="fp16", workspace_bytes=2**20)
    for a, b in zip(whole[:3], cut):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("negatives", ["cross", "both"])
def test_a_thousand_repeats_are_bitwise_equal(negatives):
    r1, r2 = (r.requires_grad_() for r in views(1111, 512))

    def run():
        loss = loss_of(r1, r2, 360, negatives=negatives, precision="fp16")
        return loss, *torch.autograd.grad(loss, (r1, r2))

    first = run()
    same = torch.ones((), dtype=torch.bool, device=gpu)
    for _ in range(1000):
        for a, b in zip(first, run()):
            same &= (a == b).all()
    assert bool(same)


@pytest.mark.parametrize("temperature", ["number", "tensor"])
def test_nothing_waits_for_the_device(temperature):
    r1, r2 = (r.requires_grad_() for r in views(512, 512))
    t = 0.1 if temperature == "number" else torch.tensor(0.1, device=gpu, requires_grad=True)
    loss_of(r1, r2, 360, t).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(r1, r2, 360, t).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


OWN = ("normalize", "sums", "combine", "total", "factors", "weights", "finish", "device_kernel")


def test_launch_counts_seen_by_the_profiler():
    """Four launches forward; backward three of ours and the library's, which may split one."""
    r1, r2 = (r.requires_grad_() for r in views(4096, 2048))
    torch.utils.deterministic.fill_uninitialized_memory = False  # a launch for each torch.empty
    loss_of(r1, r2, 360, precision="fp16").backward()

    def kernels(function) -> list[str]:
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            function()
            torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return [e.name for e in events if not e.name.startswith("Mem")]

    one = torch.ones((), device=gpu)
    loss = None

    def forward():
        nonlocal loss
        loss = loss_of(r1, r2, 360, precision="fp16")

    there = kernels(forward)
    assert len(there) == 4, there
    back = kernels(lambda: torch.autograd.grad(loss, (r1, r2), one))
    ours = [name for name in back if any(word in name for word in OWN)]
    assert len(ours) == 3 and 2 <= len(back) - 3 <= 4, back


def test_graph_capture_and_replay():
    r1, r2 = (r.requires_grad_() for r in views(777, 512))

    def step():
        loss = loss_of(r1, r2, 360, precision="fp16")
        return loss, *torch.autograd.grad(loss, (r1, r2))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    fresh = views(777, 512, seed=5)
    with torch.no_grad():
        r1.copy_(fresh[0]), r2.copy_(fresh[1])
    graph.replay()
    replayed = [value.clone() for value in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step()))


def test_streams_other_than_the_default():
    r1, r2 = views(900, 512)
    want = ours(r1, r2, 360, precision="fp16")
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(ours(r1, r2, 360, precision="fp16"))
    torch.cuda.synchronize()
    for one in results:
        assert all(torch.equal(a, b) for a, b in zip(want[:3], one))


def test_compiled_equals_eager():
    torch._dynamo.reset()
    r1, r2 = views(700, 512)
    compiled = torch.compile(loss_of, fullgraph=True)
    a = evaluate(compiled, r1, r2, 360, precision="fp16")
    b = evaluate(loss_of, r1, r2, 360, precision="fp16")
    assert all(relative_error(x, y) < 1e-6 for x, y in zip(a[:3], b))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """1.2 million rows of 2048: row offsets beyond int32 in r, z, dz and the gradient."""
    rows, width, dim = 1_200_000, 2048, 32
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    generator = torch.Generator(gpu).manual_seed(0)
    r1 = torch.empty(rows, width, dtype=torch.bfloat16, device=gpu)
    r1.normal_(generator=generator)
    r2 = r1[-2048:].clone()  # the last rows, with their own candidates
    r1.requires_grad_()
    loss = loss_of(r1[-2048:], r2, dim)
    (grad,) = torch.autograd.grad(loss, r1)
    near = r1.detach()[-2048:].clone().requires_grad_()
    want = loss_of(near, r2, dim)
    (expected,) = torch.autograd.grad(want, near)
    assert torch.equal(loss, want) and torch.equal(grad[-2048:], expected)
    assert not grad[:-2048].any()
    # And all of them as one side.
    few = r1.detach()[:1024].clone().requires_grad_()
    all_rows = r1.detach().requires_grad_()
    loss = loss_of(few, all_rows, dim)
    d_few, d_all = torch.autograd.grad(loss, (few, all_rows))
    assert loss.isfinite() and d_few.isfinite().all() and d_all[-5:, :dim].abs().sum() >= 0
    z = torch.nn.functional.normalize(r1.detach()[:, :dim].float(), dim=1)
    s = torch.nn.functional.normalize(few.detach()[:, :dim].float(), dim=1) @ z.T / 0.1
    row = torch.logsumexp(s.double(), 1)
    col = torch.logsumexp(s[:, :1024].double(), 0)
    expected = ((row + col) / 2 - s.diagonal().double()).mean()
    assert abs(float(loss) - float(expected)) < 1e-3 * abs(float(expected))
