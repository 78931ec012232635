"""What PyTorch may do around the loss: inputs of any origin, transforms, checkpoints, switches.

The numbers are those of the public reports each test answers.
"""

from __future__ import annotations

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from directclr_fast import DirectCLRLoss, fast_directclr_loss
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


def losses(backend, negatives="cross", reduction="mean"):
    """(ours, the plain formula) as functions of two views and a temperature."""
    options = {"negatives": negatives, "reduction": reduction}
    return (
        lambda a, b, t=0.1: fast_directclr_loss(a, b, 20, t, backend=backend, **options),
        lambda a, b, t=0.1: eager_loss(a, b, 20, t, **options),
    )


def same(ours, truth, limit=1e-5):
    """Whether every tensor of one tuple is near that of the other, which is in fp64."""
    ours, truth = (v if isinstance(v, tuple) else (v,) for v in (ours, truth))
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a, b) < limit


def wide(*values):
    return tuple(value.double() for value in values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", ["cross", "both"])
def test_func_grad(backend, negatives, views):
    """A1: torch.func.grad, vjp and value_and_grad, with and without statistics."""
    ours, formula = losses(backend, negatives)
    inputs = (*views, torch.tensor(0.2))
    want = func.grad(formula, (0, 1, 2))(*wide(*inputs))
    same(func.grad(ours, (0, 1, 2))(*inputs), want)
    same(func.grad(ours, 1)(*inputs), want[1])
    value, pull = func.vjp(ours, *inputs)
    same(value, formula(*wide(*inputs)))
    same(pull(torch.tensor(-1.5)), tuple(-1.5 * w for w in want))

    def with_statistics(a):
        loss, stats = fast_directclr_loss(a, views[1], 20, 0.2, return_stats=True, backend=backend)
        return loss, stats.row_lse

    gradient, lse = func.grad(with_statistics, has_aux=True)(views[0])
    loss, stats = fast_directclr_loss(*views, 20, 0.2, return_stats=True, backend=backend)
    same(lse, stats.row_lse, 1e-6)
    assert gradient.shape == views[0].shape and not loss.requires_grad


def test_functional_call(views):
    """A1: of a module with a learned, bounded temperature."""
    criterion = DirectCLRLoss(20, 0.2, learnable_temperature=True, temperature_min=0.01)
    parameters = dict(criterion.named_parameters())
    gradient = func.grad(lambda p: func.functional_call(criterion, p, views))(parameters)
    criterion(*views).backward()
    assert gradient["log_temperature"].shape == (1,)
    same(gradient["log_temperature"], criterion.log_temperature.grad, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend, views):
    """A2: over views, over one of them, over temperatures, over gradients."""
    ours, formula = losses(backend)
    generator = torch.Generator().manual_seed(1)
    many = views[0] + torch.randn(3, *views[0].shape, generator=generator)
    want = torch.stack([formula(a, views[1].double()) for a in many.double()])
    same(func.vmap(ours, (0, None))(many, views[1]), want)
    same(func.vmap(ours, (2, None))(many.movedim(0, 2), views[1]), want)
    temperatures = torch.tensor([0.1, 0.3])
    want = torch.stack([formula(*wide(*views), t) for t in temperatures.double()])
    same(func.vmap(ours, (None, None, 0))(*views, temperatures), want)
    gradients = func.vmap(func.grad(ours, (0, 1)), (0, None))(many, views[1])
    for i, one in enumerate(many):
        want = func.grad(formula, (0, 1))(*wide(one, views[1]))
        same((gradients[0][i], gradients[1][i]), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jacobians_and_second_derivatives(backend):
    """A1, A2: jacrev of per-row losses, grad of grad, hessian (forward over reverse)."""
    r1, r2 = make_views(5, 7, dtype=torch.float32)
    ours = lambda a, reduction="mean": fast_directclr_loss(  # noqa: E731
        a, r2, 4, 0.5, reduction=reduction, backend=backend
    )
    formula = lambda a, reduction="mean": eager_loss(  # noqa: E731
        a, r2.double(), 4, 0.5, reduction=reduction
    )
    x = r1.double()
    same(func.jacrev(lambda a: ours(a, "none"))(r1), func.jacrev(lambda a: formula(a, "none"))(x))
    for twice in (func.hessian, lambda f: func.jacrev(func.jacrev(f))):
        same(twice(ours)(r1), twice(formula)(x), 1e-4)

    def penalty(f):
        return func.grad(lambda a: func.grad(f)(a).square().sum())

    same(penalty(ours)(r1), penalty(formula)(x), 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_forward_mode(backend, reduction, views):
    """A2: jvp of the reduced loss by torch.func and by dual numbers; per row, a sentence."""
    ours, formula = losses(backend, reduction=reduction)
    inputs = (*views, torch.tensor(0.2))
    tangents = tuple(torch.full_like(v, 0.3) * (1 + i) for i, v in enumerate(inputs))
    if reduction == "none" and backend != "reference":
        with pytest.raises(NotImplementedError, match="forward-mode AD: expected reduction"):
            func.jvp(ours, inputs, tangents)
        return
    want = func.jvp(formula, wide(*inputs), wide(*tangents))
    same(func.jvp(ours, inputs, tangents), want)
    with forward_ad.dual_level():
        dual = ours(forward_ad.make_dual(views[0], tangents[0]), *inputs[1:])
        tangent = forward_ad.unpack_dual(dual).tangent
    one = func.jvp(lambda a: formula(a, *wide(*inputs[1:])), wide(views[0]), wide(tangents[0]))[1]
    same(tangent, one)


def test_transforms_over_half_precision_and_autocast(views):
    """A1: gradients in the input dtype; autocast rounds nothing inside, second derivative too.
    A processor with a matrix unit may round first derivatives where nobody asks for "highest"."""
    exact = {"precision": "highest"}
    half = tuple(r.bfloat16() for r in views)
    gradient = func.grad(lambda a: fast_directclr_loss(a, half[1], 20, **exact))(half[0])
    assert gradient.dtype == torch.bfloat16
    same(gradient, evaluate(fast_directclr_loss, *half, 20, **exact).dr1, 1e-6)

    def penalty(a):
        return func.grad(lambda a: fast_directclr_loss(a, views[1], 20, **exact))(a).square().sum()

    outside = func.grad(penalty)(views[0])
    with torch.autocast("cpu", torch.bfloat16):
        same(func.grad(penalty)(views[0]), outside, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(backend, reentrant, views):
    """A7: both kinds, a view without gradient among the inputs."""
    want = evaluate(eager_loss, *views, 20)
    r1, r2 = (r.clone().requires_grad_() for r in views)
    step = lambda a, b: fast_directclr_loss(a * 1.0, b, 20, backend=backend)  # noqa: E731
    checkpoint(step, r1, views[1], use_reentrant=reentrant).backward()
    same(r1.grad, want.dr1)
    checkpoint(step, r1.detach().requires_grad_(), r2, use_reentrant=reentrant).backward()
    same(r2.grad, want.dr2)


TRANSFORMS = {
    "grad": lambda f, b: func.grad(lambda a: f(a, b)),
    "vmap": lambda f, b: lambda a: func.vmap(f, (0, None))(torch.stack([a, a + b]), b),
    "jvp": lambda f, b: lambda a: func.jvp(lambda a: f(a, b), (a,), (b,)),
    "jacrev": lambda f, b: func.jacrev(lambda a: f(a, b)),
}


def survives_a_break(make, a, b) -> bool:
    """Whether this PyTorch compiles the transform of any function that breaks the graph: 2.11
    makes zeros of jacrev, 2.13 does not."""

    def broken(a, b):
        torch._dynamo.graph_break()
        return (a * b).sum()

    eager, compiled = make(broken, b)(a), torch.compile(make(broken, b))(a)
    pairs = zip(eager, compiled) if isinstance(eager, tuple) else [(eager, compiled)]
    return all(torch.allclose(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_transforms(name, views):
    """A3: right outside the graph; where it must be whole, a sentence; the formula in it."""
    make, (a, b) = TRANSFORMS[name], views
    ours, formula = losses("auto")
    want = make(formula, b.double())(a.double())
    torch._dynamo.reset()
    if survives_a_break(make, a, b):
        same(torch.compile(make(ours, b))(a), want)
    same(make(torch.compile(ours), b)(a), want)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="torch.func or forward-mode AD inside a compiled graph"):
        torch.compile(make(ours, b), fullgraph=True)(a)
    torch._dynamo.reset()
    same(torch.compile(make(losses("reference")[0], b), fullgraph=True)(a), want)


def test_compiled_call_of_dual_numbers(views):
    """A3: forward-mode AD is not dropped."""
    a, b = views
    ours, formula = losses("auto")
    torch._dynamo.reset()
    compiled = torch.compile(ours)
    compiled(a, b)
    want = func.jvp(lambda a: formula(a, b.double()), wide(a), wide(b))[1]
    with forward_ad.dual_level():
        out = compiled(forward_ad.make_dual(a, b), b)
        same(forward_ad.unpack_dual(out).tangent, want)
