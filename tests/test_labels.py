"""Labels: several positives of an anchor, and pairs that are no negatives, in every backend.

The numbers are those of the public reports each test answers.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import func

from directclr_fast import (
    DirectCLRLoss,
    dispatch,
    driver,
    fast_directclr_loss,
    info_nce,
    labels,
    last_backend,
    ops,
)
from directclr_fast.backends.cpu import _cpu
from directclr_fast.problem import Options
from directclr_fast.testing import (
    backends,
    bound,
    eager_loss,
    evaluate,
    make_views,
    relative_error,
)
from directclr_fast.world import ALONE

BACKENDS = [*backends(), "reference"]
every = pytest.mark.parametrize("backend", BACKENDS)
roles = pytest.mark.parametrize("same_label", ["positive", "ignore"])
FORMS = [(n, s) for n in ("cross", "both") for s in (True, False)]
forms = pytest.mark.parametrize("negatives,symmetric", FORMS)


def make_labels(kind: str, rows: int) -> torch.Tensor:
    """ "few" of seven, "one" for all, all "different", "some" rows alone by a negative label, or
    "copies" of every fourth."""
    draw = torch.Generator().manual_seed(rows)
    if kind == "one":
        return torch.full((rows,), 3)
    if kind == "different":
        return torch.randperm(rows, generator=draw) - rows // 2
    if kind == "copies":
        return torch.arange(rows) // 4 * 4
    few = torch.randint(7, (rows,), generator=draw)
    return few if kind == "few" else torch.where(torch.arange(rows) % 2 == 0, few, -1)


def check(rows: int, candidates: int, kind: str, views: str, *, dtype=torch.float32, **how):
    """Loss and every gradient against the masked formula in fp64, by the rule for errors."""
    r1, r2 = make_views(rows, 40, candidates=candidates, kind=views, dtype=dtype, seed=rows)
    options = {"dim": 24, "labels": make_labels(kind, candidates)} | how
    asked = {k: options.pop(k) for k in ("backend", "precision") if k in options}
    t = torch.tensor(options.pop("temperature", 0.1), dtype=torch.float64)
    upstream = torch.tensor(1.7)
    if options.get("reduction") == "none":
        upstream = torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.5
    truth = evaluate(
        eager_loss, r1.double(), r2.double(), temperature=t, upstream=upstream, **options
    )
    eager = evaluate(eager_loss, r1, r2, temperature=t.to(dtype), upstream=upstream, **options)
    ours = evaluate(
        fast_directclr_loss, r1, r2, temperature=t.to(dtype), upstream=upstream, **options, **asked
    )
    assert last_backend() == asked["backend"]
    for name, value, plain, want in zip(ours._fields, ours, eager, truth):
        error, allowed = relative_error(value, want), bound(relative_error(plain, want), dtype)
        if asked.get("precision") == "highest":
            # Entries in two parts have 23 bits; what s lacks the exponential multiplies by 1/t.
            allowed += 2**-25 / float(t)
        absolute = float((value.double() - want).norm())
        # Of one row nothing is left; dtemperature is a small sum of large terms.
        tiny = {"dtemperature": 1e-7 * float(upstream.sum() / t**2), "loss": 6e-8 / float(t)}
        assert error <= allowed or absolute <= tiny.get(name, 1e-12), (
            name, rows, candidates, kind, error, allowed,
        )  # fmt: skip


@pytest.mark.parametrize("backend", backends())
@roles
@forms
def test_every_backend_is_exact(backend, same_label, negatives, symmetric):  # N20
    how = {"same_label": same_label, "negatives": negatives, "symmetric": symmetric}
    shapes = [(1, 1), (37, 37), (130, 130)]
    if negatives == "cross":
        shapes += [(1, 9), (65, 97)]
    for (rows, candidates), kind in itertools.product(
        shapes, ("few", "one", "different", "some", "copies")
    ):
        views = "converged" if kind in ("some", "one") else "clustered"
        reduction = "none" if rows % 2 else "mean"
        check(rows, candidates, kind, views, backend=backend, reduction=reduction, **how)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the compiled extension is not here")
@pytest.mark.parametrize("isa", _cpu.available_isas() if _cpu else [])
def test_every_instruction_set_leaves_out_what_is_equal(isa):
    _cpu.force_isa(isa)
    try:
        how = {"backend": "cpu", "same_label": "ignore"}
        check(70, 83, "copies", "views", **how)
        check(70, 70, "few", "views", negatives="both", **how)
        assert _cpu.arithmetic() == "fp32"  # no digits
    finally:
        _cpu.force_isa("")


@pytest.mark.parametrize("backend", backends())
@roles
@pytest.mark.parametrize("temperature", [0.001, 0.02, 1.0])
def test_other_temperatures_are_exact(backend, same_label, temperature):
    how = {"backend": backend, "same_label": same_label, "temperature": temperature}
    check(40, 40, "few", "unrelated", negatives="both", **how)
    check(40, 52, "some", "unrelated", **how)


@roles
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])
def test_fp64_is_exact(backend, same_label):
    how = {"backend": backend, "same_label": same_label, "dtype": torch.float64}
    for kind in ("few", "one", "some"):
        check(60, 60, kind, "clustered", negatives="both", **how)
        check(60, 75, kind, "clustered", symmetric=kind != "some", **how)


@pytest.mark.parametrize("backend", backends())
@forms
def test_labels_that_all_differ_change_nothing(backend, negatives, symmetric):
    r1, r2 = make_views(70, 24, kind="converged", dtype=torch.float32)
    how = {"negatives": negatives, "symmetric": symmetric, "backend": backend}
    plain = evaluate(fast_directclr_loss, r1, r2, None, **how)
    truth = evaluate(
        fast_directclr_loss,
        r1.double(),
        r2.double(),
        None,
        negatives=negatives,
        symmetric=symmetric,
        backend="reference",
    )
    for same_label in ("positive", "ignore"):
        for kind in ("different", "unlabelled"):
            given = torch.full((70,), -5) if kind == "unlabelled" else make_labels(kind, 70)
            ours = evaluate(
                fast_directclr_loss, r1, r2, None, labels=given, same_label=same_label, **how
            )
            for a, b, c in zip(ours[:3], plain, truth):
                assert relative_error(a, c) <= bound(relative_error(b, c), torch.float32)


@pytest.mark.parametrize("backend", backends())
def test_a_positive_alone_keeps_its_digits_beside_others_that_have_several(backend):
    """Losses down to 1e-9, of which fp32 sums with the positive in them have nothing left."""
    r1, r2 = make_views(40, 24, kind="converged", dtype=torch.float32)
    r2[:30] = 2.0 * r1[:30]
    given, upstream = torch.arange(40).clamp(max=30), (torch.arange(40) < 30).double()
    how = {"labels": given, "temperature": 0.035, "reduction": "none", "upstream": upstream}
    truth = evaluate(eager_loss, r1.double(), r2.double(), None, **how)
    ours = evaluate(fast_directclr_loss, r1, r2, None, backend=backend, **how)
    assert 1e-10 < truth.loss[:30].min() < 1e-7
    for got, want in zip(ours[:3], truth):
        got, want = got[:30].double().reshape(30, -1), want[:30].reshape(30, -1)
        assert ((got - want).norm(dim=1) / want.norm(dim=1)).max() < 1e-4


@every
@roles
def test_loss_of_one_tensor_with_itself(backend, same_label):
    r, _ = make_views(33, 24, kind="clustered", dtype=torch.float32)
    given, results = make_labels("few", 33), []
    for function, x, how in (
        (fast_directclr_loss, r, {"backend": backend}), (eager_loss, r.double(), {}),
    ):  # fmt: skip
        x = x.clone().requires_grad_()
        loss = function(x, x, 20, labels=given, same_label=same_label, **how)
        results.append((loss, torch.autograd.grad(loss, x)[0]))
    for ours, truth in zip(*results):
        assert relative_error(ours, truth) < 2e-6


@every
@roles
def test_column_groups_and_statistics(backend, same_label):
    r1, r2 = make_views(30, 24, dtype=torch.float32)
    columns = torch.tensor([[0, 2, 5, 7], [1, 3, 4, 9]])
    how = {"columns": columns, "labels": make_labels("few", 30), "same_label": same_label}
    truth = evaluate(eager_loss, r1.double(), r2.double(), None, **how)
    ours = evaluate(fast_directclr_loss, r1, r2, None, backend=backend, **how)
    for a, b in zip(ours[:3], truth):
        assert relative_error(a, b) < 2e-6
    how |= {"return_stats": True, "negatives": "both"}
    loss, stats = fast_directclr_loss(r1, r2, None, backend=backend, **how)
    want, truth = fast_directclr_loss(r1.double(), r2.double(), None, backend="reference", **how)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for a, b in zip(stats, truth):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", backends())
@roles
def test_compiled_and_transformed_calls_are_the_eager_one(backend, same_label, inductor):
    views = make_views(25, 24, dtype=torch.float32)
    given = make_labels("few", 25)
    call = functools.partial(
        fast_directclr_loss, dim=20, same_label=same_label, backend=backend, negatives="both"
    )
    eager = evaluate(functools.partial(call, labels=given), *views)
    compiled = torch.compile(call, fullgraph=True)
    for a, b in zip(evaluate(functools.partial(compiled, labels=given), *views)[:3], eager):
        assert relative_error(a, b) < 1e-6
    gradient = func.grad(lambda r: call(r, views[1], labels=given))(views[0])
    assert relative_error(gradient, eager.dr1) < 1e-6
    each = func.vmap(lambda y: call(*views, labels=y))(torch.stack([given, given.flip(0)]))
    assert relative_error(each[0], eager.loss) < 1e-6 and each[0] != each[1]


@pytest.mark.parametrize("backend", backends())
@roles
def test_the_registered_op(backend, same_label):
    r1, r2 = (r.requires_grad_() for r in make_views(19, 32, dtype=torch.float32))
    options = Options(20, backend=backend, same_label=same_label, workspace_bytes=0)
    given = (r1, r2, None, None, make_labels("few", 19), True, *ops.arguments(options))
    torch.library.opcheck(ops.loss_forward, given)
    with pytest.raises(ValueError, match=r"labels: expected shape \(19,\) on cpu, got \(18,\)"):
        ops.loss_forward(*given[:4], torch.arange(18), *given[5:])


@every
@roles
def test_second_derivatives(backend, same_label):
    r1, r2 = make_views(9, 12, dtype=torch.float64 if backend != "cpu" else torch.float32)
    r1, given = r1.requires_grad_(), make_labels("few", 9)
    results = []
    for function, how in ((fast_directclr_loss, {"backend": backend}), (eager_loss, {})):
        loss = function(r1, r2, None, labels=given, same_label=same_label, **how)
        (gradient,) = torch.autograd.grad(loss, r1, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), r1)[0])
    assert relative_error(*results) < 1e-5


def test_supervised_contrastive_learning_of_two_views():  # N20
    """L_out of Khosla et al. over the 2 N rows of two views, as written there."""
    r1, r2 = make_views(12, 16, dtype=torch.float64)
    given = make_labels("few", 12)
    z, rows = F.normalize(torch.cat([r1, r2]), dim=1), torch.cat([given, given])
    logits = (z @ z.T / 0.2).masked_fill(torch.eye(24).bool(), -torch.inf)
    of_anchor = [
        -sum(
            logits[i, p] - logits[i].logsumexp(0)
            for p in range(24)
            if p != i and rows[p] == rows[i]
        )
        / (int((rows == rows[i]).sum()) - 1)
        for i in range(24)
    ]
    loss = fast_directclr_loss(r1, r2, None, 0.2, labels=given, negatives="both")
    torch.testing.assert_close(loss, torch.stack(of_anchor).mean())


def test_explicit_negatives_alone():  # N19
    """Candidates of a query: its own key and the negatives, not the other queries' keys."""
    query, keys = make_views(10, 16, dtype=torch.float64)
    negatives, _ = make_views(7, 16, dtype=torch.float64, seed=5)
    given = torch.cat([torch.zeros(10, dtype=torch.int64), torch.full((7,), -1)])
    loss = info_nce(query, torch.cat([keys, negatives]), labels=given, same_label="ignore")
    z, k, n = (F.normalize(x, dim=1) for x in (query, keys, negatives))
    logits = torch.cat([(z * k).sum(1, keepdim=True), z @ n.T], 1) / 0.1
    torch.testing.assert_close(loss, -logits.log_softmax(1)[:, 0].mean())


@every
def test_a_copy_of_the_positive_is_no_negative(backend):
    """Rows 3 and 8 show the same thing: with their labels equal, neither pushes the other away."""
    r1, r2 = make_views(12, 16, dtype=torch.float32)
    r1[8], r2[8] = r1[3], r2[3]
    given = torch.arange(12)
    given[8] = 3
    rows = [i for i in range(12) if i != 8]
    how = {"dim": None, "reduction": "none", "backend": backend}
    with_copy = fast_directclr_loss(r1, r2, labels=given, same_label="ignore", **how)
    without = fast_directclr_loss(r1[rows], r2[rows], **how)
    torch.testing.assert_close(with_copy[3], without[3], rtol=1e-6, atol=0)
    assert fast_directclr_loss(r1, r2, **how)[3] > without[3] + 0.1


@pytest.mark.parametrize("backend", backends())
def test_a_sum_taken_off_afterwards_would_not_do(backend):
    """Beside copies of the positive fp32 has no room for the others' share of a row's sum."""
    r1, r2 = make_views(120, 36, kind="converged", dtype=torch.float32)
    given = torch.arange(120) // 3 * 3
    r1, r2 = r1[given] + 0.01 * r1, r2[given] + 0.01 * r2
    same = given[:, None] == given

    def exponentials(dtype):
        return torch.exp(
            F.normalize(r1.to(dtype), dim=1) @ F.normalize(r2.to(dtype), dim=1).T / 0.03
        )

    e = exponentials(torch.float64)
    others, rounded = (e * ~same).sum(1), exponentials(torch.float32)
    assert relative_error(rounded.sum(1) - (rounded * same).sum(1), others) > 0.1
    how = {"labels": given, "same_label": "ignore", "symmetric": False, "reduction": "none"}
    loss = fast_directclr_loss(r1, r2, None, 0.03, backend=backend, **how)
    assert relative_error(loss, torch.log1p(others / e.diagonal())) < 1e-5


@roles
def test_memory_is_linear(same_label):
    """No buffer of a step has as many elements as S, not even as its labels' comparison."""
    rows, largest = 3000, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for value in torch.utils._pytree.tree_leaves(out):
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.untyped_storage().nbytes())
            return out

    r1, r2 = make_views(rows, 16, dtype=torch.float32)
    given, backend = make_labels("few", rows), dispatch.load("torch")
    options = Options(dim=16, workspace_bytes=2**20, same_label=same_label, backend="torch")
    problem = ops.problem_of(options, r1, r2, None, given)
    step = backend, problem, ALONE
    with Watch():
        _, states, _ = driver.forward(*step, r1, r2, None, 10.0, given)
        driver.backward(*step, torch.ones(()), states, None, 10.0, (True, True, False), given)
    assert 0 < largest <= rows * labels.COLUMNS * 8


@every
@roles
def test_repeat_runs_are_bitwise_equal(backend, same_label):
    r1, r2 = make_views(700, 80, dtype=torch.float32)
    how = {"labels": make_labels("some", 700), "same_label": same_label, "backend": backend}
    once, again = (evaluate(fast_directclr_loss, r1, r2, None, **how) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once[:3], again))


def test_the_module_takes_labels():
    r1, r2 = make_views(14, 16, dtype=torch.float32)
    given = make_labels("few", 14)
    criterion = DirectCLRLoss(None, same_label="ignore")
    want = fast_directclr_loss(r1, r2, None, labels=given, same_label="ignore")
    assert torch.equal(criterion(r1, r2, given), want)
    assert torch.equal(criterion(r1, r2, labels=given.int()), want)
    with pytest.raises(TypeError, match="expected keywords of the loss, got 'labels'"):
        DirectCLRLoss(labels=given)


@pytest.mark.parametrize(
    "given,how,error,match",
    [
        ([1, 2, 3], {}, TypeError, "labels: expected a tensor of integers, got list"),
        (torch.rand(5), {}, TypeError, "labels: expected a tensor of integers, got float32"),
        (torch.ones(5).bool(), {}, TypeError, "labels: expected a tensor of integers, got bool"),
        (torch.arange(4), {}, ValueError, r"labels: expected shape \(5,\), one for each row of r2"),
        (torch.ones(5, 1).long(), {}, ValueError, r"labels: expected shape \(5,\)"),
        (torch.arange(5), {"negatives": "same"}, ValueError, "labels: expected None"),
        (torch.arange(5), {"same_label": "negative"}, ValueError, "same_label: expected one of"),
    ],
)
def test_what_is_no_label_is_refused(given, how, error, match):
    r1, r2 = make_views(5, 8)
    for function in (fast_directclr_loss, torch.compile(fast_directclr_loss, backend="eager")):
        with pytest.raises(error, match=match):
            function(r1, r2, None, labels=given, **how)
