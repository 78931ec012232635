"""What PyTorch may do around the loss: inputs of any origin, transforms, checkpoints, switches.

The numbers are those of the public reports each test answers.
"""

from __future__ import annotations

import pytest
import torch

from directclr_fast import fast_directclr_loss
from directclr_fast.products import fp32_products, may_round
from directclr_fast.testing import backends, eager_loss, evaluate, make_views, relative_error

BACKENDS = [*backends(), "reference"]
SWITCHES = {
    "all": lambda: torch.backends,
    "cuda": lambda: torch.backends.cuda.matmul,
    "cpu": lambda: torch.backends.mkldnn.matmul,
}


@pytest.fixture
def views():
    return make_views(24, 32, dtype=torch.float32)


@pytest.fixture
def switches():
    """torch's switches for fp32 products, as they were, whatever a test turns."""

    def untouched():
        torch.set_float32_matmul_precision("highest")
        for switch in SWITCHES.values():
            switch().fp32_precision = "none"

    untouched()
    yield
    untouched()


@pytest.mark.parametrize("which,value", [
    ("all", "tf32"), ("all", "ieee"), ("all", "bf16"), ("cuda", "tf32"), ("cuda", "ieee"),
    ("cpu", "tf32"), ("cpu", "bf16"), ("cpu", "ieee"),
])  # fmt: skip
def test_the_newer_precision_switches_break_no_call(which, value, views, switches):
    truth = evaluate(eager_loss, *(r.double() for r in views), 20)
    SWITCHES[which]().fp32_precision = value
    for backend in BACKENDS:
        for precision in ("auto", "highest"):
            ours = evaluate(fast_directclr_loss, *views, 20, backend=backend, precision=precision)
            assert relative_error(ours.dr1, truth.dr1) < (1e-5 if precision == "highest" else 3e-2)
    assert SWITCHES[which]().fp32_precision == value
    assert may_round("cpu") == (which != "cuda" and value != "ieee")
    assert may_round("cuda") == (which != "cpu" and value == "tf32")


def test_a_switch_is_put_back_as_it_was(switches):
    for value in ("tf32", "ieee"):
        torch.backends.fp32_precision = value
        with fp32_products("cpu", "ieee"):
            assert not may_round("cpu")
        assert may_round("cpu") == (value == "tf32")  # it follows the other one again
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with fp32_products("cpu", "ieee"):
        assert not may_round("cpu")
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("medium")
    with fp32_products("cpu", "ieee"):
        assert not may_round("cpu")
    assert may_round("cpu") and torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("origin", ["inference", "overwritten"])
def test_a_view_without_gradient_is_not_kept_for_backward(backend, side, origin, views):
    """A5, A6: a frozen tower in inference mode; a queue overwritten before the backward pass."""
    want = evaluate(eager_loss, *views, 20)[1 + (1 - side)]
    inputs = [r.clone() for r in views]
    inputs[1 - side].requires_grad_()
    if origin == "inference":
        with torch.inference_mode():
            inputs[side] = views[side].clone()
    loss = fast_directclr_loss(*inputs, 20, backend=backend)
    if origin == "overwritten":
        inputs[side][3:9] = 0.0
    (ours,) = torch.autograd.grad(loss, inputs[1 - side])
    assert relative_error(ours, want) < 1e-5


def test_a_view_with_gradient_may_not_change_before_backward(views):
    """As in the formula, which keeps it."""
    r1, r2 = (r.clone().requires_grad_() for r in views)
    bank = r2 * 1.0
    loss = fast_directclr_loss(r1, bank, 20)
    with torch.no_grad():
        bank[3:9] = 0.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def gradient_penalty(loss, x):
    """d/dx of |dloss/dx|^2."""
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inference", [False, True])
def test_second_derivatives_beside_a_view_without_gradient(backend, inference, views):
    """A5, A6: right, and where the bank is no longer what it was, a sentence."""
    r1 = views[0].clone().requires_grad_()
    with torch.inference_mode(inference):
        bank = views[1].clone()
    ours = gradient_penalty(fast_directclr_loss(r1, bank, 20, backend=backend), r1)
    x = views[0].double().requires_grad_()
    want = gradient_penalty(eager_loss(x, views[1].double(), 20), x)
    assert relative_error(ours, want) < 1e-4
    if inference or backend == "reference":
        return
    loss = fast_directclr_loss(r1, bank, 20, backend=backend)
    bank[3:9] = 0.0
    with pytest.raises(RuntimeError, match=r"r2: .* modified by an inplace .* version 1, expected"):
        gradient_penalty(loss, r1)


def test_a_view_without_gradient_is_let_go_after_backward(views):
    """As saved tensors are, although the loss lives on."""
    import weakref

    r1, bank = views[0].clone().requires_grad_(), views[1].clone()
    loss = fast_directclr_loss(r1, bank, 20)
    loss.backward(retain_graph=True)
    seen = weakref.ref(bank)
    del bank
    assert seen() is not None
    loss.backward()
    assert seen() is None


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtypes", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float16),
    (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float64),
], ids=str)  # fmt: skip
def test_dtypes_may_differ_under_autocast(dtypes, compiled, views):
    """N16: a student in bf16, a teacher or queue in fp32."""
    r1, r2 = (r.to(dtype) for r, dtype in zip(views, dtypes))
    wide = torch.promote_types(*dtypes)
    function = torch.compile(fast_directclr_loss, fullgraph=True) if compiled else None
    with torch.autocast("cpu", torch.bfloat16):
        ours = evaluate(function or fast_directclr_loss, r1, r2, 20)
        want = evaluate(fast_directclr_loss, r1.to(wide), r2.to(wide), 20)
    assert ours.dr1.dtype == dtypes[0] and ours.dr2.dtype == dtypes[1]
    assert relative_error(ours.loss, want.loss) < 1e-6
    assert relative_error(ours.dr1, want.dr1.to(dtypes[0])) < 1e-6
    assert relative_error(ours.dr2, want.dr2.to(dtypes[1])) < 1e-6
    with pytest.raises(TypeError, match="r2: expected .* like r1, got"):
        fast_directclr_loss(r1, r2, 20)
    with torch.autocast("cpu", enabled=False), pytest.raises(TypeError, match="like r1, got"):
        fast_directclr_loss(r1, r2, 20)
