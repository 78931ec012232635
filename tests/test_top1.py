"""Contrastive top-1 among the statistics: every backend against the reference, ties included."""

from __future__ import annotations

import pytest
import torch

from directclr_fast import fast_directclr_loss, info_nce, ops
from directclr_fast.problem import Options
from directclr_fast.testing import backends, make_views
from directclr_fast.world import ALONE

GROUPS = torch.tensor([[0, 2, 1, 5], [1, 2, 3, 7]])
CASES = {
    "views": (57, 57, "views", {}),
    "one direction": (57, 57, "views", {"symmetric": False}),
    "more candidates": (57, 70, "views", {}),
    "both": (130, 130, "views", {"negatives": "both"}),
    "both, one direction": (57, 57, "ties", {"negatives": "both", "symmetric": False}),
    "both, cold": (130, 130, "ties", {"negatives": "both", "temperature": 0.003}),
    "ties": (130, 130, "ties", {}),
    "cold": (130, 130, "ties", {"temperature": 0.003}),
    "tensor": (57, 57, "views", {"temperature": torch.tensor(0.1)}),
    "one row": (1, 1, "views", {}),
    "one row of both": (1, 1, "views", {"negatives": "both"}),
    "groups": (57, 57, "views", {"dim": None, "columns": GROUPS}),
    "columns": (57, 57, "views", {"dim": None, "columns": GROUPS[0], "reduction": "none"}),
}


def check_against_the_reference(name: str, **how) -> None:
    """One of CASES; ``how`` names the backend and its precision."""
    rows, candidates, kind, options = CASES[name]
    r1, r2 = make_views(rows, 24, candidates=candidates, kind=kind, dtype=torch.float32)
    options = {"dim": 20, "temperature": 0.1, "return_stats": True} | options
    loss, stats = fast_directclr_loss(r1, r2, **options, **how)
    _, truth = fast_directclr_loss(r1.double(), r2.double(), **options, backend="reference")
    wrong = stats.row_top1.numel() and not truth.row_top1.all()
    assert wrong or kind == "ties" or rows == 1, "the case shows nothing"
    for got, want in ((stats.row_top1, truth.row_top1), (stats.col_top1, truth.col_top1)):
        if want is None:
            assert got is None and options["symmetric"] is False
        else:
            assert got.dtype == torch.bool and not got.requires_grad
            assert torch.equal(got, want)
    # Statistics change nothing of the loss but, at most, the order of its sums.
    without = fast_directclr_loss(r1, r2, **(options | {"return_stats": False}), **how)
    torch.testing.assert_close(without, loss, rtol=1e-6, atol=1e-6)
    if how["backend"] in ("torch", "cpu"):
        assert torch.equal(without, loss)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends())
def test_every_backend_agrees_with_the_reference(backend, name):
    check_against_the_reference(name, backend=backend)


def by_hand(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Whether the positive is among the largest of a row, from rows of all other candidates."""
    return torch.stack([p >= row.max() for p, row in zip(positives, logits)])


def test_the_reference_agrees_with_the_words():
    """Negatives "cross", "both" and "same", each from its candidates, in both directions."""
    r1, r2 = make_views(19, 12, dtype=torch.float64)
    z1, z2 = (torch.nn.functional.normalize(r, dim=1) for r in (r1, r2))
    off = ~torch.eye(19, dtype=torch.bool)
    positives = (z1 * z2).sum(1) + 1e-12  # a sum of its own, so another rounding
    for negatives in ("cross", "both"):
        _, stats = fast_directclr_loss(
            r1, r2, None, negatives=negatives, backend="reference", return_stats=True
        )
        for top1, own, other in ((stats.row_top1, z1, z2), (stats.col_top1, z2, z1)):
            logits = (own @ other.T)[off].view(19, 18)
            if negatives == "both":
                logits = torch.cat([logits, (own @ own.T)[off].view(19, 18)], 1)
            assert torch.equal(top1, by_hand(logits, positives))
    _, stats = fast_directclr_loss(r1, r2, None, negatives="same", return_stats=True)
    for top1, own in ((stats.row_top1, r1), (stats.col_top1, r2)):
        logits = -torch.cdist(own, own).square()[off].view(19, 18)
        assert torch.equal(top1, by_hand(logits, -(r1 - r2).square().sum(1)))


@pytest.mark.parametrize("backend", [*backends(), "reference"])
def test_ties_are_right_and_a_nan_is_wrong(backend):
    r1, _ = make_views(40, 24, dtype=torch.float32)
    options = {"backend": backend, "return_stats": True}
    _, stats = fast_directclr_loss(r1, r1, 20, **options)
    assert stats.row_top1.all() and stats.col_top1.all()
    r1[5] = r1[30]
    _, stats = fast_directclr_loss(r1, r1, 20, negatives="both", **options)
    assert stats.row_top1.all() and stats.col_top1.all()
    _, stats = fast_directclr_loss(r1[:1].expand(40, 24), r1[:1].expand(50, 24), 20, **options)
    assert stats.row_top1.all() and stats.col_top1.all() and stats.col_top1.shape == (40,)
    r2 = r1.clone()
    r2[[3, 8]] = r2[[8, 3]]
    _, stats = fast_directclr_loss(r1, r2, 20, **options)
    assert (~stats.row_top1).nonzero().flatten().tolist() == [3, 8]
    assert (~stats.col_top1).nonzero().flatten().tolist() == [3, 8]
    r2[7, 3] = float("nan")
    _, stats = fast_directclr_loss(r1, r2, 20, **options)
    assert not stats.row_top1.any()
    assert (~stats.col_top1).nonzero().flatten().tolist() == [3, 7, 8]


@pytest.mark.parametrize("negatives", ["cross", "both"])
@pytest.mark.parametrize("backend", backends())
def test_rows_and_columns_in_many_blocks_and_threads(backend, negatives):
    """Super-blocks, strips, parts of threads: none of them loses a maximum or a positive."""
    candidates = 1700 if negatives == "cross" else 1500
    r1, r2 = make_views(1500, 40, candidates=candidates, dtype=torch.float32)
    options = {"negatives": negatives, "return_stats": True}
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        _, stats = fast_directclr_loss(r1, r2, 40, backend=backend, **options)
    finally:
        torch.set_num_threads(before)
    _, truth = fast_directclr_loss(r1, r2, 40, backend="reference", **options)
    assert 0.05 < float(truth.row_top1.float().mean()) < 0.95
    assert torch.equal(stats.row_top1, truth.row_top1)
    assert torch.equal(stats.col_top1, truth.col_top1)


def test_info_nce_has_one_direction_and_func_takes_it():
    r1, r2 = make_views(30, 16, dtype=torch.float32)
    _, stats = info_nce(r1, r2, return_stats=True)
    assert stats.col_top1 is None
    _, both = fast_directclr_loss(r1, r2, None, return_stats=True)
    assert torch.equal(stats.row_top1, both.row_top1)

    def correct(a, b):
        _, stats = info_nce(a, b, return_stats=True)
        return stats.row_top1

    stacked = torch.func.vmap(correct)(torch.stack([r1, r2]), torch.stack([r2, r2]))
    assert torch.equal(stacked[0], both.row_top1) and stacked[1].all()


@pytest.mark.usefixtures("inductor")
@pytest.mark.parametrize("backend", [*backends(), "reference"])
def test_compiled_equals_eager(backend):
    torch._dynamo.reset()
    r1, r2 = (r.requires_grad_() for r in make_views(37, 24, dtype=torch.float32))

    def call(a, b):
        return fast_directclr_loss(a, b, 20, backend=backend, return_stats=True)

    with torch._inductor.config.patch(force_disable_caches=True):
        loss, stats = torch.compile(call, fullgraph=True)(r1, r2)
        loss.backward()
    _, eager = call(r1.detach(), r2.detach())
    assert torch.equal(stats.row_top1, eager.row_top1)
    assert torch.equal(stats.col_top1, eager.col_top1)


@pytest.mark.parametrize("backend", backends())
def test_without_statistics_no_maximum_is_looked_for(backend):
    options = Options(dim=20, backend=backend)
    r1, r2 = make_views(30, 24, dtype=torch.float32)
    problem = ops.problem_of(options, r1, r2, None)
    assert ops.forward_body(problem, ALONE, r1, r2, None, None)[2] is None
    asked = problem.replace(return_stats=True)
    assert ops.forward_body(asked, ALONE, r1, r2, None, None)[2].top1.shape == (1, 2, 30)
    outputs = ops.loss_forward(r1, r2, None, None, None, True, *ops.arguments(options))
    assert outputs[-1].shape == (0,)
