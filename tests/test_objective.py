"""The training modes against their losses written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from directclr_fast.train.objective import EMBEDDING, GROUPS, MODES, Objective, default_dim

WIDTH = 48


def views(n=12, width=WIDTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    r1 = torch.rand(n, width, generator=generator, dtype=torch.float64)
    r2 = r1 + 0.3 * torch.rand(n, width, generator=generator, dtype=torch.float64)
    return r1.requires_grad_(), r2.requires_grad_()


def released(z1, z2, temperature=0.1):
    """Both directions of the release's infoNCE, halved."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    logits, target = z1 @ z2.T / temperature, torch.arange(len(z1))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def build(mode, **options):
    torch.manual_seed(0)
    return Objective(mode, WIDTH, **options).double()


def by_hand(mode, objective, r1, r2, temperature=0.1):
    if mode == "baseline":
        return released(r1, r2, temperature)
    if mode == "directclr":
        return released(r1[:, :8], r2[:, :8], temperature)
    if mode == "group":
        parts = objective.columns
        return sum(released(r1[:, p], r2[:, p], temperature) for p in parts)
    layers = [m.weight for m in objective.projector.modules() if isinstance(m, nn.Linear)]
    if mode == "single":
        return released(r1 @ layers[0].T, r2 @ layers[0].T, temperature)

    norm = objective.projector[1]

    def embed(r):
        h = r @ layers[0].T
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
        return (h * norm.weight + norm.bias).clamp_min(0) @ layers[1].T

    return released(embed(r1), embed(r2), temperature)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_loss_is_the_one_by_hand(mode, backend):
    objective = build(mode, dim=8, temperature=0.2, backend=backend)
    for weight in objective.parameters():
        nn.init.normal_(weight)
    r1, r2 = views()
    loss = objective(r1, r2)
    want = by_hand(mode, objective, r1, r2, 0.2)
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    weights = tuple(objective.parameters())
    got = torch.autograd.grad(loss, (r1, r2, *weights))
    want = torch.autograd.grad(want, (r1, r2, *weights))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)
    assert len(weights) == {"single": 1, "simclr": 4}.get(mode, 0)


def test_negatives_of_both_views():
    r1, r2 = views()
    loss = build("directclr", dim=8, negatives="both")(r1, r2)
    z = F.normalize(torch.cat((r1, r2))[:, :8], dim=1)
    logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    n = len(r1)
    want = F.cross_entropy(logits, torch.arange(2 * n).roll(n))
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)


def test_directclr_is_the_fixed_diagonal_projector():
    r1, r2 = views()
    diagonal = torch.diag((torch.arange(WIDTH) < 10).double())
    loss = build("directclr", dim=10)(r1, r2)
    torch.testing.assert_close(loss, released(r1 @ diagonal, r2 @ diagonal), rtol=1e-12, atol=0)


def test_the_rest_of_r_gets_no_gradient():
    objective = build("directclr", dim=10)
    r1, r2 = views()
    objective(r1, r2).backward()
    for r in (r1, r2):
        assert (r.grad[:, 10:] == 0).all() and (r.grad[:, :10] != 0).all()
    embedding = objective.embed(r1)
    assert torch.equal(embedding, r1[:, :10]) and objective.sub_vector == slice(0, 10)


def test_group_permutation_is_a_function_of_the_seed():
    torch.manual_seed(1)
    first = Objective("group", WIDTH, seed=5)
    torch.manual_seed(2)
    again = Objective("group", WIDTH, seed=5)
    other = Objective("group", WIDTH, seed=6)
    assert first.columns.shape == (GROUPS, WIDTH // GROUPS)
    assert torch.equal(first.columns.flatten().sort().values, torch.arange(WIDTH))
    assert torch.equal(first.columns, again.columns)
    assert not torch.equal(first.columns, other.columns)
    other.load_state_dict(first.state_dict())
    assert torch.equal(first.columns, other.columns)
    r1, r2 = views()
    assert torch.equal(first(r1, r2), other(r1, r2))
    assert first.embed(r1).shape == r1.shape


@pytest.mark.parametrize(("mode", "names"), [
    ("baseline", 0), ("directclr", 0), ("group", 1), ("single", 1), ("simclr", 7),
])  # fmt: skip
def test_what_the_checkpoint_holds(mode, names):
    objective = build(mode)
    assert len(objective.state_dict()) == names
    width = {"single": EMBEDDING, "simclr": EMBEDDING, "directclr": 8}.get(mode, WIDTH)
    assert objective.embed(views()[0]).shape == (12, width)


def test_default_dim():
    assert default_dim(2048) == 360 and default_dim(512) == 90 and default_dim(1) == 1
    assert Objective("directclr", 256).dim == 45
    assert Objective("baseline", 256, dim=300).dim is None  # the other modes do not read it


@pytest.mark.parametrize(
    ("mode", "width", "options", "text"),
    [
        ("byol", 16, {}, "mode: expected one of baseline, directclr, .*, got 'byol'"),
        ("directclr", 16, {"dim": 17}, r"dim: expected 1 to 16 \(the encoder's width\), got 17"),
        ("directclr", 16, {"dim": 0}, "dim: expected 1 to 16 .*, got 0"),
        ("group", 20, {}, "mode: expected an encoder width divisible by 8 for 'group', got 20"),
    ],
)
def test_errors(mode, width, options, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        Objective(mode, width, **options)
