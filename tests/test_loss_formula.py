"""The loss against formulas written independently of it: the released one, NT-Xent, Eq. 2."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from directclr_fast import DirectCLRLoss, fast_directclr_loss, info_nce
from directclr_fast.problem import Problem
from directclr_fast.reference import loss, row_weights
from directclr_fast.testing import evaluate, make_views, relative_error

BACKENDS = ["reference", "torch"]


def released_info_nce(anchors, others, temperature=0.1):
    """One direction: softmax over the other view's rows, the target is the same row."""
    anchors = F.normalize(anchors, dim=1)
    others = F.normalize(others, dim=1)
    logits = anchors @ others.T / temperature
    return F.cross_entropy(logits, torch.arange(len(anchors)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows,width,dim", [(1, 5, 3), (37, 48, 20), (64, 2048, 360)])
def test_released_formula(backend, rows, width, dim):
    def released(r1, r2, temperature):
        z1, z2 = r1[:, :dim], r2[:, :dim]
        forward = released_info_nce(z1, z2, temperature)
        return forward / 2 + released_info_nce(z2, z1, temperature) / 2

    r1, r2 = make_views(rows, width, dtype=torch.float64)
    ours = evaluate(fast_directclr_loss, r1, r2, dim, backend=backend)
    theirs = evaluate(released, r1, r2)
    for got, want in zip(ours[:3], theirs):
        assert float((got - want).norm()) <= 1e-13 * max(1.0, float(want.norm()))
    assert (ours.dr1[:, dim:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_released_group_mode(backend):
    columns = torch.randperm(64, generator=torch.Generator().manual_seed(1)).view(8, 8)

    def released(r1, r2, temperature):
        return sum(
            released_info_nce(r1[:, c], r2[:, c], temperature) / 2
            + released_info_nce(r2[:, c], r1[:, c], temperature) / 2
            for c in columns
        )

    r1, r2 = make_views(33, 64, dtype=torch.float64)
    ours = evaluate(fast_directclr_loss, r1, r2, None, columns=columns, backend=backend)
    theirs = evaluate(released, r1, r2)
    assert all(relative_error(a, b) < 1e-13 for a, b in zip(ours[:3], theirs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_info_nce_is_one_direction_on_all_columns(backend):
    z1, z2 = make_views(40, 24, dtype=torch.float64)
    ours = evaluate(info_nce, z1, z2, backend=backend)
    theirs = evaluate(released_info_nce, z1, z2)
    assert all(relative_error(a, b) < 1e-13 for a, b in zip(ours[:3], theirs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nt_xent_written_with_loops(backend):
    r1, r2 = make_views(6, 9, dtype=torch.float64)
    z = torch.cat([F.normalize(r1, dim=1), F.normalize(r2, dim=1)])
    total = 0.0
    for i in range(12):
        others = [k for k in range(12) if k != i]
        logits = torch.stack([z[i] @ z[k] / 0.2 for k in others])
        total += torch.logsumexp(logits, 0) - z[i] @ z[(i + 6) % 12] / 0.2
    ours = fast_directclr_loss(r1, r2, None, 0.2, negatives="both", backend=backend)
    torch.testing.assert_close(ours, total / 12, rtol=1e-13, atol=0)


def test_nt_xent_of_lightly():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    r1, r2 = make_views(64, 32, dtype=torch.float32)
    theirs = lightly.NTXentLoss(temperature=0.3)(r1, r2)
    ours = fast_directclr_loss(r1, r2, None, 0.3, negatives="both")
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


def test_directclr_of_lightly():
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    if not hasattr(lightly, "DirectCLRLoss"):
        pytest.skip("this lightly has no DirectCLRLoss")
    r1, r2 = make_views(48, 64, dtype=torch.float32)
    theirs = lightly.DirectCLRLoss(loss_dim=32, temperature=0.1)(r1, r2)
    ours = fast_directclr_loss(r1, r2, 32, negatives="both")
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


def test_equation_2_written_with_loops():
    x1, x2 = (0.3 * r for r in make_views(7, 5, kind="unrelated", dtype=torch.float64))

    def one_direction(x, other):
        terms = []
        for i in range(len(x)):
            positive = torch.exp(-((x[i] - other[i]) ** 2).sum() / 2)
            rest = sum(torch.exp(-((x[i] - x[j]) ** 2).sum() / 2) for j in range(len(x)) if j != i)
            terms.append(-torch.log(positive / (rest + positive)))
        return torch.stack(terms).mean()

    ours = fast_directclr_loss(x1, x2, None, negatives="same", symmetric=False)
    torch.testing.assert_close(ours, one_direction(x1, x2), rtol=1e-13, atol=0)
    ours = fast_directclr_loss(x1, x2, None, negatives="same")
    both = (one_direction(x1, x2) + one_direction(x2, x1)) / 2
    torch.testing.assert_close(ours, both, rtol=1e-13, atol=0)


def test_statistics_give_the_loss():
    r1, r2 = make_views(23, 16, dtype=torch.float64)
    for negatives in ("cross", "both"):
        per_row, stats = fast_directclr_loss(
            r1, r2, 12, negatives=negatives, reduction="none", return_stats=True
        )
        again = (stats.row_lse + stats.col_lse) / 2 - stats.positives
        torch.testing.assert_close(again, per_row, rtol=1e-12, atol=1e-12)
        assert not any(value.requires_grad for value in stats)
    z1, z2 = F.normalize(r1[:, :12], dim=1), F.normalize(r2[:, :12], dim=1)
    _, stats = fast_directclr_loss(r1, r2, 12, symmetric=False, return_stats=True)
    assert stats.col_lse is None
    torch.testing.assert_close(stats.row_lse, torch.logsumexp(z1 @ z2.T * 10, 1))
    torch.testing.assert_close(stats.positives, (z1 * z2).sum(1) * 10)


def test_extra_candidates_are_negatives_only():
    """r2 longer than r1: each row of r1 has its positive, the further rows of r2 have none."""
    r1, r2 = make_views(11, 8, candidates=29, dtype=torch.float64)
    z1, z2 = F.normalize(r1, dim=1), F.normalize(r2, dim=1)
    logits = z1 @ z2.T / 0.1
    target = torch.arange(11)
    rows = F.cross_entropy(logits, target)
    columns = F.cross_entropy(logits.T[:11], target)
    ours = fast_directclr_loss(r1, r2, None)
    torch.testing.assert_close(ours, (rows + columns) / 2, rtol=1e-13, atol=0)


def problem(**options) -> Problem:
    given = {"rows": 6, "candidates": 6, "width": 8, "dim": 5, "device_type": "cpu"} | options
    return Problem(dtype=torch.float64, temperature=None, **given)


def gradients(problem, r1, r2, dloss, columns, temperature):
    """(dr1, dr2, dtemperature) by the closed form in the docstring of ``reference``."""
    x1, x2 = (
        r[None, :, : problem.dim] if columns is None else r[:, columns].movedim(0, 1)
        for r in (r1, r2)
    )
    a = 1.0 / temperature
    _, row_lse, col_lse, *_ = loss(problem, r1, r2, columns, temperature)
    z1, z2 = (F.normalize(x, dim=-1) for x in (x1, x2))
    own = slice(problem.row_offset, problem.row_offset + problem.rows)
    w = row_weights(problem, dloss).expand(problem.groups, -1)
    v = torch.zeros(problem.groups, problem.candidates, dtype=x1.dtype)
    if problem.symmetric:
        w = 0.5 * w
        v[:, own] = w
    else:
        col_lse = torch.zeros_like(v)
    s = z1 @ z2.mT
    g = w[..., None] * torch.exp(a * s - row_lse[..., None])
    g += v[:, None, :] * torch.exp(a * s - col_lse[:, None, :])
    torch.diagonal(g, problem.row_offset, -2, -1).sub_(w + v[:, own])
    dz1, dz2, da = a * (g @ z2), a * (g.mT @ z1), (g * s).sum()
    if problem.negatives == "both":
        for z, dz, weight, lse in ((z1, dz1, w, row_lse), (z2, dz2, v, col_lse)):
            s = z @ z.mT
            h = weight[..., None] * torch.exp(a * s - lse[..., None])
            torch.diagonal(h, 0, -2, -1).zero_()
            dz += a * ((h + h.mT) @ z)
            da += (h * s).sum()

    def through_normalisation(r, x, z, dz):
        norm = x.norm(dim=-1, keepdim=True)
        dot = torch.where(norm >= problem.eps, (z * dz).sum(-1, keepdim=True), 0.0)
        dx = (dz - z * dot) / norm.clamp_min(problem.eps)
        index = torch.arange(problem.dim) if columns is None else columns.flatten()
        return torch.zeros_like(r).index_add_(1, index, dx.movedim(0, 1).flatten(1))

    dr1, dr2 = through_normalisation(r1, x1, z1, dz1), through_normalisation(r2, x2, z2, dz2)
    return dr1, dr2, -a * a * da


@pytest.mark.parametrize("negatives", ["cross", "both"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_closed_form_gradients_of_the_reference(negatives, symmetric, reduction):
    asked = problem(negatives=negatives, symmetric=symmetric, reduction=reduction)
    r1, r2 = make_views(6, 8, dtype=torch.float64)
    r1[2, :5] = 0.0
    t = torch.tensor(0.2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    shape = (6,) if reduction == "none" else ()
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    inputs = [value.clone().requires_grad_() for value in (r1, r2, t)]
    value = loss(asked, inputs[0], inputs[1], None, inputs[2])[0]
    truth = torch.autograd.grad(value, inputs, upstream)
    closed = gradients(asked, r1, r2, upstream, None, t)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(closed, truth))


def test_closed_form_with_groups_offset_and_extra_candidates():
    columns = torch.tensor([[0, 3, 5], [7, 1, 3]])
    asked = problem(candidates=11, dim=3, groups=2, gathered=True, row_offset=4, negatives="cross")
    r1, r2 = make_views(6, 8, candidates=11, dtype=torch.float64)
    t = torch.tensor(0.2, dtype=torch.float64)
    inputs = [value.clone().requires_grad_() for value in (r1, r2, t)]
    value = loss(asked, inputs[0], inputs[1], columns, inputs[2])[0]
    truth = torch.autograd.grad(value, inputs)
    closed = gradients(asked, r1, r2, torch.ones((), dtype=torch.float64), columns, t)
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(closed, truth))


@pytest.mark.parametrize("negatives", ["cross", "both", "same"])
def test_gradcheck_of_the_reference(negatives):
    r1, r2 = make_views(4, 6, dtype=torch.float64)
    r1, r2 = 0.5 * r1.requires_grad_(), 0.5 * r2.requires_grad_()
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def function(a, b, t):
        t = 1.0 if negatives == "same" else t
        return fast_directclr_loss(a, b, 4, t, negatives=negatives, backend="reference")

    inputs = (r1.detach().requires_grad_(), r2.detach().requires_grad_(), t)
    if negatives == "same":
        inputs = inputs[:2]
        assert torch.autograd.gradcheck(lambda a, b: function(a, b, None), inputs)
    else:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_module_is_the_function():
    r1, r2 = make_views(20, 32, dtype=torch.float32)
    module = DirectCLRLoss(16, 0.2, negatives="both")
    torch.testing.assert_close(
        module(r1, r2), fast_directclr_loss(r1, r2, 16, 0.2, negatives="both"), rtol=0, atol=0
    )
    grouped = DirectCLRLoss(columns=[[0, 1, 2], [7, 8, 9]])
    torch.testing.assert_close(
        grouped(r1, r2), fast_directclr_loss(r1, r2, columns=[[0, 1, 2], [7, 8, 9]])
    )
    assert not list(module.parameters()) and not grouped.state_dict()


def test_learnable_temperature_stays_positive_and_learns():
    r1, r2 = make_views(32, 16, dtype=torch.float32)
    module = DirectCLRLoss(None, 0.5, learnable_temperature=True)
    assert module.temperature.item() == pytest.approx(0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    first = module(r1, r2)
    for _ in range(20):
        optimizer.zero_grad()
        module(r1, r2).backward()
        optimizer.step()
    assert 0 < module.temperature.item() < 0.5
    assert module(r1, r2).item() < first.item()
