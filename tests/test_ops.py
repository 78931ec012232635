"""The registered ops: schema, fake, autograd, and compiled graphs equal to eager calls."""

from __future__ import annotations

import pytest
import torch

from directclr_fast import DirectCLRLoss, fast_directclr_loss, ops
from directclr_fast.testing import backends, evaluate, make_views, relative_error

BACKENDS = backends()
DEFAULTS = ops.Options(0.1, 20, "cross", True, "mean", 0, "auto", "auto", -1, 1e-12)
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
        (COLUMNS, {"negatives": "both", "reduction": "none"}),
    ],
    ids=["slice", "one-direction", "groups-both"],
)
def test_opcheck(backend, tensor_temperature, columns, changes):
    r1, r2 = (r.requires_grad_() for r in make_views(19, 32, dtype=torch.float32))
    t = torch.tensor(0.1, requires_grad=True) if tensor_temperature else None
    options = DEFAULTS._replace(backend=backend, **changes)
    if backend == "cpu":
        # The tail of its kept tiles is never written, and opcheck compares all of an output.
        options = options._replace(workspace_bytes=0)
    torch.library.opcheck(ops.loss_forward, (r1, r2, columns, t, True, *options))


def test_opcheck_of_the_backward_op():
    r1, r2 = make_views(19, 32, dtype=torch.float32)
    options = DEFAULTS._replace(workspace_bytes=0)
    _, *saved = ops.loss_forward(r1, r2, None, None, True, *options)
    arguments = (torch.ones(()), *saved, None, None, 32, torch.float32, True, True, False)
    torch.library.opcheck(ops.loss_backward, (*arguments, *options))


@pytest.mark.parametrize("candidates", [19, 25])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fake_outputs_have_the_real_shapes(candidates, reduction):
    r1, r2 = make_views(19, 32, candidates=candidates, dtype=torch.bfloat16)
    options = DEFAULTS._replace(reduction=reduction)
    real = ops.loss_forward(r1, r2, None, None, True, *options)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.loss_forward(
            mode.from_tensor(r1), mode.from_tensor(r2), None, None, True, *options
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
    temperatures = (0.1,) if case == "same" else (0.1, torch.tensor(0.1))
    for temperature in temperatures:
        eager = evaluate(fast_directclr_loss, r1, r2, temperature=temperature, **options)
        ours = evaluate(compiled, r1, r2, temperature=temperature, **options)
        for a, b in zip(ours, eager):
            if b is not None:
                assert relative_error(a, b) < (1e-5 if case in ("reference", "same") else 1e-7)


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
