"""The training modes against their losses written by hand."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_train_run import assert_same, log_of, state_of, train
from torch import nn

from directclr_fast.train.config import MODES
from directclr_fast.train.loop import load_model
from directclr_fast.train.objective import EMBEDDING, GROUPS, Objective, default_dim

pytestmark = pytest.mark.usefixtures("one_thread")
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
    if mode == "diagonal":
        weight = objective.projector.weight[0]
        return released(r1 * weight, r2 * weight, temperature)
    if mode in ("orthogonal", "lowrank"):
        linear = objective.projector.linear.weight.T if mode == "orthogonal" else None
        weight = objective.projector.weight if linear is None else linear
        return released(r1 @ weight, r2 @ weight, temperature)
    if mode == "random":
        twin = build(mode, dim=8)
        twin.draw.draws = objective.draw.draws - 1
        taken = twin.draw()
        assert taken.shape == (8,)
        return released(r1[:, taken], r2[:, taken], temperature)
    if mode == "group":
        parts = objective.columns
        return sum(released(r1[:, p], r2[:, p], temperature) for p in parts)
    layers = [m.weight for m in objective.projector.modules() if isinstance(m, nn.Linear)]
    if mode == "single":
        return released(r1 @ layers[0].T, r2 @ layers[0].T, temperature)

    inner, last = objective.projector[1], objective.projector[4]

    def normalised(h, norm):
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()
        return h * norm.weight + norm.bias

    def embed(r):
        return normalised(normalised(r @ layers[0].T, inner).clamp_min(0) @ layers[1].T, last)

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
    if mode == "random":
        assert (got[0] != 0).any(0).sum() == 8
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)
    trained = {"single": 1, "simclr": 6, "diagonal": 1, "orthogonal": 1}
    assert len(weights) == trained.get(mode, 0)


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
    ("baseline", 0), ("directclr", 0), ("group", 1), ("single", 1), ("simclr", 12), ("diagonal", 1),
    ("orthogonal", 2), ("lowrank", 1), ("random", 1),
])  # fmt: skip
def test_what_the_checkpoint_holds(mode, names):
    objective = build(mode)
    assert len(objective.state_dict()) == names
    width = {"single": EMBEDDING, "simclr": EMBEDDING, "directclr": 8, "lowrank": 8}
    width = width.get(mode, WIDTH)
    assert objective.embed(views()[0]).shape == (12, width)


def test_simclr_projector_is_the_released_one():
    """By its parameters; its closed form is `by_hand`."""
    shapes = {name: tuple(p.shape) for name, p in build("simclr").projector.named_parameters()}
    assert shapes == {
        "0.weight": (WIDTH, WIDTH),
        "1.weight": (WIDTH,), "1.bias": (WIDTH,),
        "3.weight": (EMBEDDING, WIDTH),
        "4.weight": (EMBEDDING,), "4.bias": (EMBEDDING,),
    }  # fmt: skip
    # At the start each column of an embedding has mean 0 and variance 1 over the batch.
    z = build("simclr").embed(views()[0])
    torch.testing.assert_close(z.mean(0), torch.zeros(EMBEDDING).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        z.var(0, unbiased=False), torch.ones(EMBEDDING).double(), rtol=1e-2, atol=0
    )


def test_orthogonal_projector_stays_orthogonal_and_changes_no_similarity():
    """Which is why the paper's 52.2 for it is the 51.5 of no projector: the same loss."""
    objective, baseline = build("orthogonal"), build("baseline")
    start = objective.projector.linear.parametrizations.weight[0]
    start.base = torch.linalg.qr(start.base).Q  # it was made in fp32
    r1, r2 = views()
    eye = torch.eye(WIDTH).double()
    optimizer = torch.optim.SGD(objective.parameters(), 1.0)
    start = objective.projector.linear.weight.detach().clone()
    for _ in range(3):
        torch.testing.assert_close(objective(r1, r2), baseline(r1, r2), rtol=1e-12, atol=0)
        (weight,) = objective.parameters()
        of_loss, *of_rows = torch.autograd.grad(objective(r1, r2), (weight, r1, r2))
        want = torch.autograd.grad(baseline(r1, r2), (r1, r2))
        torch.testing.assert_close(tuple(of_rows), want, rtol=1e-9, atol=1e-13)
        assert of_loss.abs().max() < 1e-13
        # What would move it moves it along orthogonal matrices.
        optimizer.zero_grad()
        objective.projector(r1)[:, 0].sum().backward()
        optimizer.step()
        q = objective.projector.linear.weight.detach()
        torch.testing.assert_close(q @ q.T, eye, rtol=0, atol=1e-12)
    assert (q - start).norm() > 1
    with torch.autocast("cpu", torch.bfloat16):
        q = objective.float().projector.matrix()
        torch.testing.assert_close(q.double() @ q.T.double(), eye, rtol=0, atol=1e-5)


def test_low_rank_projector_is_a_rotated_slice():
    objective = build("lowrank", dim=10)
    v = objective.projector.weight
    torch.testing.assert_close(v.T @ v, torch.eye(10).double(), rtol=0, atol=1e-6)  # kept in fp32
    r1, r2 = views()
    # U D V' with any orthogonal U and any completion of V is the same loss.
    u = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    diagonal = torch.diag((torch.arange(WIDTH) < 10).double())
    full = torch.cat((v, torch.randn(WIDTH, WIDTH - 10, dtype=torch.float64)), 1)
    projector = u @ diagonal @ full.T
    want = released(r1 @ projector.T, r2 @ projector.T)
    torch.testing.assert_close(objective(r1, r2), want, rtol=1e-12, atol=0)
    again, other = (Objective("lowrank", WIDTH, dim=10, seed=s) for s in (0, 1))
    assert torch.equal(again.projector.weight.double(), v)
    assert not torch.allclose(again.projector.weight, other.projector.weight, atol=0.1)


def test_random_columns_are_a_function_of_seed_and_step():
    def drawn(seed, steps, start=0):
        draw = Objective("random", WIDTH, dim=12, seed=seed).draw
        draw.draws = start
        return torch.stack([draw() for _ in range(steps)])

    torch.manual_seed(3)
    columns = drawn(0, 40)
    torch.manual_seed(4)
    assert torch.equal(columns, drawn(0, 40))  # every process draws alike
    assert torch.equal(columns[7:], drawn(0, 33, start=7))
    assert not torch.equal(columns, drawn(1, 40))
    assert all(len(set(row)) == 12 and row == sorted(row) for row in columns.tolist())
    assert len(set(map(tuple, columns.tolist()))) == 40
    assert set(columns.flatten().tolist()) == set(range(WIDTH))


def test_random_columns_are_kept_in_the_checkpoint_and_stay_while_evaluating():
    first, second = (Objective("random", WIDTH, dim=12) for _ in "ab")
    r1, r2 = views()
    losses = [first(r1, r2).item() for _ in range(5)]
    assert len(set(losses)) == 5
    first.eval()
    assert first(r1, r2).item() == first(r1, r2).item() and first.draw.draws == 5
    second.load_state_dict(first.state_dict())
    assert second.draw.draws == 5
    assert second(r1, r2).item() == first(r1, r2).item()
    assert first.embed(r1).shape == r1.shape


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
        ("lowrank", 16, {"dim": 17}, "dim: expected 1 to 16 .*, got 17"),
        ("random", 16, {"dim": 17}, "dim: expected 1 to 16 .*, got 17"),
        ("group", 20, {}, "mode: expected an encoder width divisible by 8 for 'group', got 20"),
    ],
)
def test_errors(mode, width, options, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        Objective(mode, width, **options)


# ---------------------------------------------------------------- in the trainer

LATER = ("diagonal", "orthogonal", "lowrank", "random")  # test_train_run.py has the others


@pytest.mark.parametrize("mode", LATER)
def test_a_mode_learns_and_resumes_to_the_bit(mode, run_dir):
    settings = {"mode": mode, "seed": 2}
    _, result = train(run_dir, "whole", **settings)
    losses = [r["loss"] for r in log_of(run_dir / "whole")[1]]
    assert result["step"] == 15 and sum(losses[-4:]) < 0.97 * sum(losses[:4])
    train(run_dir, "parts", **settings, max_steps=7)
    trainer, _ = train(run_dir, "parts", **settings, resume=True)
    assert_same(state_of(run_dir / "parts"), state_of(run_dir / "whole"))
    assert log_of(run_dir / "parts")[1][-1]["loss"] == losses[-1]
    if mode == "random":
        assert trainer.model.objective.draw.draws == 15


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_simclr_of_an_older_version_goes_on_as_it_was(optimizer, run_dir, monkeypatch):
    """A run whose projector ends in a Linear resumes to the bit in that form, which is said."""
    settings = {"mode": "simclr", "optimizer": optimizer, "epochs": 2}
    with monkeypatch.context() as older:
        plain = Objective.__init__

        def init(self, *args, **options):
            plain(self, *args, **options)
            self.projector = self.projector[:4]

        older.setattr(Objective, "__init__", init)
        train(run_dir, "whole", **settings)
        train(run_dir, "parts", **settings, max_steps=6)
    with pytest.warns(UserWarning, match="^mode: simclr of an older version, .* keeps that form$"):
        train(run_dir, "parts", **settings, resume=True)
    assert_same(state_of(run_dir / "parts"), state_of(run_dir / "whole"))
    with pytest.warns(UserWarning, match="^mode: simclr of an older version"):
        _, model, _ = load_model(run_dir / "parts")
    assert len(model.objective.projector) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(run_dir, "new", **settings, max_steps=6)
        train(run_dir, "new", **settings, resume=True)
        assert len(load_model(run_dir / "new")[1].objective.projector) == 5


def test_random_columns_are_drawn_once_a_step_by_chunks(run_dir):
    """With one chunk of the whole batch gradient caching is the plain step, columns included."""
    settings = {"mode": "random", "optimizer": "sgd", "learning_rate": 0.01, "max_steps": 3}
    train(run_dir, "plain", **settings)
    for size in (16, 4):
        settings |= {"chunk_size": size, "cache_bn": "chunk"}
        trainer, _ = train(run_dir, f"chunk{size}", **settings)
        assert trainer.model.objective.draw.draws == 3
    plain, cached = ([r["loss"] for r in log_of(run_dir / n)[1]] for n in ("plain", "chunk16"))
    assert cached == pytest.approx(plain, rel=1e-5)


@pytest.mark.skipif(
    not torch.distributed.is_gloo_available() or not hasattr(os, "fork"), reason="needs Gloo, fork"
)
def test_two_ranks_are_one_process(run_dir):
    from test_train_distributed import FEW, apart, launch

    launch(2, run_dir, f"def main(rank): [train(mode, mode=mode) for mode in {LATER!r}]")
    for mode in LATER:
        train(run_dir, f"{mode}-one", **{**FEW, "mode": mode})
        assert apart(run_dir / mode, run_dir / f"{mode}-one", "encoder") < 1e-4, mode
        ours, theirs = ([r["loss"] for r in log_of(run_dir / n)[1]] for n in (mode, f"{mode}-one"))
        assert ours == pytest.approx(theirs, rel=1e-4)
