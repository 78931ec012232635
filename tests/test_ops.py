"""The registered ops: schema, fake, autograd, and compiled graphs equal to eager calls."""

from __future__ import annotations

import pytest
import torch

from directclr_fast import DirectCLRLoss, fast_directclr_loss, ops
from directclr_fast.problem import Options
from directclr_fast.testing import backends, evaluate, make_views, relative_error

BACKENDS = backends()
DEFAULTS = Options(dim=20)
COLUMNS = torch.tensor([[1, 2, 30], [3, 0, 4]])


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Every test traces and compiles anew: the recompile limit counts over a process, and graphs
    cached on disk know nothing of changes in this package's code."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tensor_temperature", [False, True])
@pytest.mark.parametrize(
    "columns,changes",
    [
        (None, {}),
        (None, {"symmetric": False, "workspace_bytes": 0}),
        (COLUMNS, {"negatives": "both", "reduction": "none", "return_stats": True}),
    ],
    ids=["slice", "one-direction", "groups-both"],
)
def test_opcheck(backend, tensor_temperature, columns, changes):
    r1, r2 = (r.requires_grad_() for r in make_views(19, 32, dtype=torch.float32))
    t = torch.tensor(0.1, requires_grad=True) if tensor_temperature else None
    options = DEFAULTS.replace(backend=backend, **changes)
    if backend == "cpu":
        # The tail of its kept tiles is never written, and opcheck compares all of an output.
        options = options.replace(workspace_bytes=0)
    torch.library.opcheck(ops.loss_forward, (r1, r2, columns, t, True, *ops.arguments(options)))


def test_opcheck_of_the_backward_op():
    r1, r2 = make_views(19, 32, dtype=torch.float32)
    options = DEFAULTS.replace(workspace_bytes=0)
    _, *saved, _, _ = ops.loss_forward(r1, r2, None, None, True, *ops.arguments(options))
    arguments = (torch.ones(()), *saved, None, None, 32, torch.float32, True, True, False)
    torch.library.opcheck(ops.loss_backward, (*arguments, *ops.arguments(options)))


@pytest.mark.parametrize("candidates", [19, 25])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("stats", [False, True])
def test_fake_outputs_have_the_real_shapes(candidates, reduction, stats):
    r1, r2 = make_views(19, 32, candidates=candidates, dtype=torch.bfloat16)
    options = DEFAULTS.replace(
        reduction=reduction, symmetric=reduction == "mean", return_stats=stats
    )
    real = ops.loss_forward(r1, r2, None, None, True, *ops.arguments(options))
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.loss_forward(
            mode.from_tensor(r1), mode.from_tensor(r2), None, None, True, *ops.arguments(options)
        )
    for a, b in zip(real, fake):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert not a.numel() or a.stride() == b.stride()


CASES = {
    "slice": {"dim": 20},
    "both": {"dim": 20, "negatives": "both"},
    "sum": {"dim": 20, "reduction": "sum", "symmetric": False},
    "rows": {"dim": 20, "reduction": "none"},
    "groups": {"dim": None, "columns": COLUMNS},
    "reference": {"dim": 20, "backend": "reference"},
    "same": {"dim": 20, "negatives": "same"},
}


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_eager(case):
    options = CASES[case]
    r1, r2 = make_views(33, 32, dtype=torch.float32)
    r1, r2 = 0.1 * r1, 0.1 * r2
    compiled = torch.compile(fast_directclr_loss, fullgraph=True)
    # Compiled as a formula, it takes the C++ compiler ten times as long as a call of the op does.
    formula = case in ("reference", "same")
    temperatures = (0.1, torch.tensor(0.1))[: 1 if formula else 2]
    for temperature in temperatures:
        eager = evaluate(fast_directclr_loss, r1, r2, temperature=temperature, **options)
        ours = evaluate(compiled, r1, r2, temperature=temperature, **options)
        for a, b in zip(ours, eager):
            if b is not None:
                assert relative_error(a, b) < (1e-5 if formula else 1e-7)


@pytest.mark.usefixtures("inductor")
def test_compiled_step_with_statistics_and_module():
    r1, r2 = make_views(33, 32, dtype=torch.float32)
    module = DirectCLRLoss(20, learnable_temperature=True, return_stats=True)

    def step(x, y):
        loss, stats = module(x * 2, y * 3)
        return loss + 0 * stats.row_lse.sum() + 0 * stats.positives.sum()

    eager = step(r1, r2)
    eager.backward()
    want = module.log_temperature.grad.clone()
    module.log_temperature.grad = None
    ours = torch.compile(step, fullgraph=True)(r1, r2)
    ours.backward()
    # The compiler's own exp gives another temperature in the last place, and 1 / 0.1 as much more.
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=0)
    torch.testing.assert_close(module.log_temperature.grad, want, rtol=1e-5, atol=0)


def test_dynamic_batch_compiles_once():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(fast_directclr_loss, fullgraph=True, dynamic=True, backend=counter)
    for rows in (33, 47, 64):
        r1, r2 = make_views(rows, 32, dtype=torch.float32)
        ours = compiled(r1, r2, 20)
        torch.testing.assert_close(ours, fast_directclr_loss(r1, r2, 20))
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------ as strict as eager


def both_ways(expected, match, *args, compiler="aot_eager", **options):
    """The call raises alike, eager and compiled."""
    compiled = torch.compile(fast_directclr_loss, backend=compiler)
    for function in (fast_directclr_loss, compiled):
        with pytest.raises(expected, match=match):
            function(*args, **options)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(
    "columns,match",
    [
        ([0, 3, 40], "from 0 to 31, got 40"),
        ([0, -1], "from 0 to 31, got -1"),
        ([2**40], "from 0 to 31"),
        ([3, 1, 3], "at most once in a group, got 3 twice"),
    ],
)
def test_compiled_columns_are_checked(backend, columns, match):  # A21
    r1, r2 = make_views(9, 32, dtype=torch.float32)
    both_ways(ValueError, match, r1, r2, columns=torch.tensor(columns), backend=backend)


def test_compiled_module_checks_its_buffer():  # A21
    module, r = DirectCLRLoss(columns=[0, 7], temperature=1.0), torch.eye(2, 3)
    for function in (module, torch.compile(module, fullgraph=True)):
        with pytest.raises(ValueError, match="from 0 to 2, got 7"):
            function(r, r)


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_changed_after_the_forward_pass_write_nothing_outside(backend):
    r1, r2 = make_views(9, 32, dtype=torch.float32)
    index = torch.tensor([[0, 3, 5]])
    options = DEFAULTS.replace(backend=backend)
    _, *saved, _, _ = ops.loss_forward(r1, r2, index, None, True, *ops.arguments(options))
    index[0, 1] = 2**30
    arguments = (torch.ones(()), *saved, index, None, 32, torch.float32, True, True, False)
    with pytest.raises((ValueError, IndexError, RuntimeError), match="columns|index"):
        ops.loss_backward(*arguments, *ops.arguments(options))


@pytest.mark.parametrize(
    "options,error,match",
    [
        ({"temperature": -1.0}, ValueError, "temperature: expected a positive"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature: expected a positive"),
        ({"temperature": torch.tensor(float("nan"))}, ValueError, "temperature: expected a pos"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature: .* of one element"),
        ({"dim": 33}, ValueError, "dim: expected 1 to 32"),
        ({"negatives": "none"}, ValueError, "negatives: expected one of"),
        ({"eps": 0.0}, ValueError, "eps: expected"),
        ({"workspace_bytes": -1}, ValueError, "workspace_bytes: expected"),
        ({"columns": torch.tensor([1, 2]).int()}, TypeError, "columns: expected int64"),
        ({"symmetric": 1}, TypeError, "symmetric: expected True or False"),
        ({"backend": "cpu", "precision": "fp8"}, NotImplementedError, "cannot run this call"),
    ],
)  # fmt: skip
def test_compiled_calls_refuse_what_eager_ones_do(options, error, match):
    both_ways(error, match, *make_views(9, 32), **({"dim": None} | options))


@pytest.mark.parametrize("other", ["rows", "width", "dtype", "dim"])
def test_compiled_views_must_match(other):
    r1 = torch.randn(9, 32)
    r2 = {
        "rows": torch.randn(8, 32),
        "width": torch.randn(9, 31),
        "dtype": torch.randn(9, 32).double(),
        "dim": torch.randn(9, 32, 1),
    }[other]
    both_ways((TypeError, ValueError), "r2: expected", r1, r2, None)


def test_the_op_itself_refuses_views_that_do_not_match():
    r1, short, narrow = torch.randn(9, 32), torch.randn(8, 32), torch.randn(9, 31)
    for r2 in (short, narrow, r1.double()):
        with pytest.raises(ValueError, match="r2: expected dtype, device and width of r1"):
            ops.loss_forward(r1, r2, None, None, True, *ops.arguments(DEFAULTS))
    with pytest.raises(ValueError, match="dim: expected 1 to 32, got 33"):
        ops.loss_forward(r1, r1, None, None, True, *ops.arguments(DEFAULTS.replace(dim=33)))


@pytest.mark.parametrize(
    "compiler,donated,inside",
    [
        ("aot_eager", True, False), ("aot_eager", False, True), ("aot_eager", True, True),
        ("inductor", True, True), ("inductor", False, False),
    ],
)  # fmt: skip
def test_a_second_derivative_of_a_compiled_graph_raises(compiler, donated, inside):  # A4
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    b = torch.tensor([[1.0, 0.5], [0.2, 1.0]])

    def loss(x):
        return 2 * fast_directclr_loss(2 * x if inside else x, b, None, 1.0)

    with torch._functorch.config.patch(donated_buffer=donated):
        value = torch.compile(loss, backend=compiler)(a)
        with pytest.raises((NotImplementedError, RuntimeError), match="create_graph"):
            torch.autograd.grad(value, a, create_graph=True)
    with torch._functorch.config.patch(donated_buffer=False):
        torch._dynamo.reset()
        value = torch.compile(loss, backend=compiler)(a)
        first, second = (torch.autograd.grad(value, a, retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(first, torch.autograd.grad(loss(a), a)[0])
        assert torch.equal(first, second)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_negative_views(compiler):  # A18
    z = torch.tensor([[1 + 1j, 2 - 1j], [2j, 1 + 1j]])
    a, b = z.conj().imag, torch.tensor([[-1.0, 1.0], [-2.0, -1.0]])
    assert a.is_neg()
    loss = torch.compile(fast_directclr_loss, backend=compiler, fullgraph=True)(a, b, None, 1.0)
    assert float(loss) == pytest.approx(0.408600, abs=1e-5)
