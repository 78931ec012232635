"""The paper's propositions about linear networks and projectors, in fp64."""

from __future__ import annotations

import math

import pytest
import torch

from directclr_fast import fast_directclr_loss
from directclr_fast.paper import theory

N, WIDTH = 24, 6


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthogonal(*shape, seed=0):
    return torch.linalg.qr(randn(*shape, seed=seed))[0]


def views(noise=0.3, seed=0):
    x = randn(N, WIDTH, seed=seed)
    return x + noise * randn(N, WIDTH, seed=seed + 1), x + noise * randn(N, WIDTH, seed=seed + 2)


def eq2(weight, x1, x2, backend="reference"):
    return fast_directclr_loss(
        x1 @ weight.T,
        x2 @ weight.T,
        None,
        negatives="same",
        symmetric=False,
        backend=backend,
    )


def close(got, want, rtol=1e-10):
    torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * want.abs().max().item())


# ---------------------------------------------------------------- lemmas 1 and 2


@pytest.mark.parametrize("noise", [1e-3, 0.3, 3.0])
@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("out", [1, 4, WIDTH])
def test_gradient_of_eq2_is_minus_w_x(noise, scale, out):
    x1, x2 = views(noise)
    weight = (scale * randn(out, WIDTH, seed=3)).requires_grad_()
    (want,) = torch.autograd.grad(eq2(weight, x1, x2), weight)
    a = theory.shares(x1 @ weight.detach().T, x2 @ weight.detach().T)
    close(-weight.detach() @ theory.lemma2_matrix(x1, x2, a), want)


def test_shares_are_those_of_eq2():
    x1, x2 = views()
    a = theory.shares(x1, x2)
    close(a.sum(-1), torch.ones(N, dtype=torch.float64))
    # -log a_ii is the loss of anchor i.
    close(-a.diagonal().log().mean(), eq2(torch.eye(WIDTH, dtype=torch.float64), x1, x2))
    i, j = 2, 5
    ratio = ((x1[i] - x2[i]).square().sum() - (x1[i] - x1[j]).square().sum()) / 2
    close(a[i, j] / a[i, i], ratio.exp())


def test_lemma2_matrix_is_the_difference_of_two_covariances():
    """The sum over pairs as lemma 2 has it, term by term, and in batches."""
    x1, x2 = views()
    a = theory.shares(x1, x2)
    negative = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    positive = torch.zeros_like(negative)
    for i in range(N):
        positive += (1 - a[i, i]) * torch.outer(x2[i] - x1[i], x2[i] - x1[i])
        for j in range(N):
            if j != i:
                negative += a[i, j] * torch.outer(x1[i] - x1[j], x1[i] - x1[j])
    got = theory.lemma2_matrix(x1, x2, a)
    close(got, (negative - positive) / N)
    close(got, got.T)
    other = views(seed=9)
    stacked = torch.stack([x1, other[0]]), torch.stack([x2, other[1]])
    batched = theory.lemma2_matrix(*stacked, theory.shares(*stacked))
    close(batched, torch.stack([got, theory.lemma2_matrix(*other, theory.shares(*other))]))


# ---------------------------------------------------------------- theorem 1


def one_layer(weight, x, time):
    """W(time) under gradient flow with X held fixed, dW/dt = W X. X has a negative eigenvalue where
    augmentation outweighs the spread of the data, and W shrinks along it."""
    return weight @ torch.linalg.matrix_exp(x * time)


def test_one_layer_solves_the_flow():
    x, w = randn(WIDTH, WIDTH), randn(4, WIDTH, seed=1)
    x = x + x.T
    h = 1e-4
    close(one_layer(w, x, 0.0), w)
    slope = (one_layer(w, x, 0.7 + h) - one_layer(w, x, 0.7 - h)) / (2 * h)
    close(slope, one_layer(w, x, 0.7) @ x, rtol=1e-6)


def test_one_layer_collapses_where_x_is_negative():
    """Noise beyond the data's spread makes X negative there, and W vanishes along it only."""
    x = randn(N * 20, WIDTH)
    strong = torch.tensor([0.0, 0.0, 0.0, 0.0, 6.0, 6.0], dtype=torch.float64)
    x1, x2 = x + strong * randn(*x.shape, seed=1), x + strong * randn(*x.shape, seed=2)
    w = 0.1 * orthogonal(WIDTH, WIDTH, seed=3)
    x = theory.lemma2_matrix(x1, x2, theory.shares(x1 @ w.T, x2 @ w.T))
    values, vectors = torch.linalg.eigh(x)
    assert (values < 0).tolist() == [True, True, False, False, False, False]
    assert (vectors[4:, :2].square().sum(0) > 0.95).all()  # they lie in the noisy coordinates
    time = 30 / -values[1].item()
    final = one_layer(w, x, time)
    close((final @ vectors).norm(dim=0), 0.1 * (values * time).exp())
    singular = torch.linalg.svdvals(final)
    assert (singular < 0.1 * math.exp(-29)).sum() == 2 and (singular > 0.1).sum() == 4


def test_an_ignored_direction_is_pushed_back():
    """Why training ends on a plateau: X is not fixed. Where W reads nothing of a coordinate, the
    shares do not depend on it, and X there is 2 E(1 - a_ii), positive however strong the noise."""
    x = randn(2000, WIDTH)
    noise = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, 2.0], dtype=torch.float64)
    x1, x2 = x + noise * randn(*x.shape, seed=1), x + noise * randn(*x.shape, seed=2)
    w = torch.diag((noise == 0).double())
    negative = 0.5 * torch.eye(WIDTH, dtype=torch.float64)
    for weight, sign in ((w, 1), (negative, -1)):
        a = theory.shares(x1 @ weight.T, x2 @ weight.T)
        block = theory.lemma2_matrix(x1, x2, a)[4:, 4:]
        assert (sign * torch.linalg.eigvalsh(block) > 0).all()
        if sign > 0:
            want = 2 * (1 - a.diagonal().mean()) * torch.eye(2, dtype=torch.float64)
            assert (block - want).abs().max() < 0.2 * want.max()


# ---------------------------------------------------------------- several layers


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_layer_gradients(layers):
    weights = randn(3, layers, WIDTH, WIDTH, seed=1).requires_grad_()
    product = torch.eye(WIDTH, dtype=torch.float64)
    for layer in range(layers):
        product = weights[:, layer] @ product
    dp = randn(3, WIDTH, WIDTH, seed=2)
    (want,) = torch.autograd.grad(product, weights, dp)
    before = theory.products(weights.detach())
    close(before[-1], product.detach())
    close(theory.layer_gradients(weights.detach(), before, dp), want)


def trained(rate, layers=2, time=2.0):
    """Weights before and after ``time`` / ``rate`` steps of gradient descent on Eq. 2."""
    x1, x2 = views(0.1)
    weights = 0.5 * randn(layers, WIDTH, WIDTH, seed=4)
    start = weights.clone()
    for _ in range(round(time / rate)):
        before = theory.products(weights)
        z1, z2 = x1 @ before[-1].T, x2 @ before[-1].T
        x = theory.lemma2_matrix(x1, x2, theory.shares(z1, z2))
        weights = weights + rate * theory.layer_gradients(weights, before, before[-1] @ x)
    return start, weights


def conserved(weights):
    """C_l = W_l W_l^T - W_{l+1}^T W_{l+1} of neighbouring layers, (L - 1, n, n). W_l^T dW_l =
    dW_{l-1} W_{l-1}^T, so gradient flow keeps it, and steps of length r change it by
    r^2 (dW_l dW_l^T - dW_{l+1}^T dW_{l+1}) each."""
    lower, upper = weights[:-1], weights[1:]
    return lower @ lower.mT - upper.mT @ upper


@pytest.mark.parametrize("layers", [2, 3])
def test_difference_of_neighbouring_layers_is_conserved_to_first_order(layers):
    drifts = []
    for rate in (0.04, 0.02, 0.01, 0.005):
        start, end = trained(rate, layers)
        drift = (conserved(end) - conserved(start)).norm()
        moved = (end @ end.mT - start @ start.mT).norm()
        drifts.append((drift / moved).item())
    ratios = [a / b for a, b in zip(drifts, drifts[1:])]
    assert drifts[0] < 0.1
    assert all(1.85 < ratio < 2.15 for ratio in ratios[1:]), (drifts, ratios)


def test_flow_conserves_it_exactly():
    """W_l^T dW_l = dW_{l-1} W_{l-1}^T, so d/dt C_l = 0 at any point and for any gradient."""
    weights, dp = randn(4, WIDTH, WIDTH), randn(WIDTH, WIDTH, seed=1)
    d = theory.layer_gradients(weights, theory.products(weights), dp)
    rates = d @ weights.mT + weights @ d.mT
    other = d.mT @ weights + weights.mT @ d
    close(rates[:-1], other[1:])
    assert rates.norm() > 1


# ---------------------------------------------------------------- theorems 2 and 3


def growth_rates(weights, x):
    """ds_l^k/dt = (u_l^k)^T (dW_l/dt) v_l^k (L, n) of simple singular values, under -dP = P X."""
    before = theory.products(weights)
    u, _, vh = torch.linalg.svd(weights)
    flow = theory.layer_gradients(weights, before, before[-1] @ x)
    return torch.einsum("lik,lij,lkj->lk", u, flow, vh)


def aligned_growth_rates(values, curvature):
    """Theorem 3: u_l = v_{l+1}, and the factors outside collapse to singular values:
    s_l^k prod_{m != l} (s_m^k)^2 (v_1^k)^T X v_1^k. A small value grows at a rate that vanishes
    with it, the faster the more layers there are."""
    return values.prod(0).square() / values * curvature


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_growth_rates_against_numerical_differentiation(layers):
    weights = 0.4 * randn(layers, WIDTH, WIDTH, seed=2)
    x = randn(WIDTH, WIDTH, seed=3)
    x = x + x.T

    def after(h):
        before = theory.products(weights)
        return weights + h * theory.layer_gradients(weights, before, before[-1] @ x)

    h = 1e-6
    values = [torch.linalg.svdvals(after(sign * h)) for sign in (1, -1)]
    close(growth_rates(weights, x), (values[0] - values[1]) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_growth_rates_of_aligned_layers(layers):
    values = randn(layers, WIDTH, seed=1).abs().sort(descending=True).values + 0.1
    bases = orthogonal(layers + 1, WIDTH, WIDTH, seed=2)
    weights = (bases[1:] * values[:, None]) @ bases[:-1].mT
    x = randn(WIDTH, WIDTH, seed=3)
    x = x + x.T
    curvature = torch.einsum("ik,ij,jk->k", bases[0], x, bases[0])
    want = aligned_growth_rates(values, curvature)
    close(growth_rates(weights, x), want)
    if layers == 2:  # theorem 3 as the paper has it
        close(want[0], values[0] * values[1] ** 2 * curvature)
        close(want[1], values[1] * values[0] ** 2 * curvature)


def test_alignment_is_scored_by_group():
    values = torch.tensor([3.0, 3.0, 3.0, 1.0, 0.1, 0.1], dtype=torch.float64)
    u, v, w = orthogonal(3, WIDTH, WIDTH, seed=1)
    turn = torch.eye(WIDTH, dtype=torch.float64)
    turn[:3, :3] = orthogonal(3, 3, seed=2)  # within the group of three: arbitrary
    lower, upper = (u * values) @ v.T, (w * values) @ (u @ turn).T
    a, score, chance = theory.alignment(lower, upper)
    close(score, torch.ones(WIDTH, dtype=torch.float64))
    close(chance, torch.tensor([3.0, 3, 3, 1, 2, 2], dtype=torch.float64) / 6)
    assert a[:3, 3:].abs().max() < 1e-12
    # Directions 2 and 3 are of different groups: exchanging them is not aligned.
    swap = torch.eye(WIDTH, dtype=torch.float64)[[0, 1, 3, 2, 4, 5]]
    _, score, _ = theory.alignment(lower, (w * values) @ (u @ swap).T)
    assert score[3] < 1e-10 and abs(score[:3].sum() - 2) < 1e-10 and score[4] > 1 - 1e-10


def test_a_group_ends_where_both_layers_have_a_gap():
    """Where one layer has equal values its vectors are arbitrary, whatever the other's are."""
    basis, turn = orthogonal(WIDTH, WIDTH), torch.eye(WIDTH, dtype=torch.float64)
    turn[:2, :2] = orthogonal(2, 2, seed=3)
    apart = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    level = torch.tensor([3.0, 3.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    for first, second in ((apart, level), (level, apart)):
        _, score, chance = theory.alignment(basis * first, (second * (basis @ turn)).T)
        close(score, torch.ones(WIDTH, dtype=torch.float64))
        close(chance, torch.tensor([2.0, 2, 1, 1, 1, 1], dtype=torch.float64) / 6)


def test_unrelated_layers_score_chance():
    """Over many random bases the mean score is what ``chance`` says."""
    values = torch.tensor([3.0, 3.0, 3.0, 1.0, 0.1, 0.1], dtype=torch.float64)
    u, v, w, y = orthogonal(4, 500, WIDTH, WIDTH)
    _, score, chance = theory.alignment((u * values) @ v.mT, (w * values) @ y.mT)
    assert (score.mean(0) - chance.mean(0)).abs().max() < 0.03


# ---------------------------------------------------------------- projectors

BACKENDS = ["reference", "auto"]
D0 = 3


def loss_and_gradients(r1, r2, projector=None, backend="auto", **options):
    r1, r2 = r1.clone().requires_grad_(), r2.clone().requires_grad_()
    z1, z2 = (r1, r2) if projector is None else (r1 @ projector.T, r2 @ projector.T)
    dim = options.pop("dim", None)
    loss = fast_directclr_loss(z1, z2, dim, backend=backend, **options)
    (1.7 * loss).backward()
    return loss.detach(), r1.grad, r2.grad


@pytest.mark.parametrize("negatives", ["cross", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_diagonal_projector_is_the_slice(backend, negatives):
    r1, r2 = views()
    diagonal = torch.diag((torch.arange(WIDTH) < D0).double())
    options = {"backend": backend, "negatives": negatives}
    want = loss_and_gradients(r1, r2, dim=D0, **options)
    for got, expected in zip(loss_and_gradients(r1, r2, diagonal, **options), want):
        close(got, expected)
    assert not want[1][:, D0:].any() and want[1][:, :D0].all()
    # Some other slice is another loss.
    assert abs(loss_and_gradients(r1, r2, dim=D0 + 1, **options)[0] - want[0]) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotating_a_low_rank_projector_rotates_the_basis_only(backend):
    """loss(r; U D V^T) = loss(r V; D), dr = d(rV) V^T: the left rotation does nothing, the right
    one is a change of basis of r."""
    r1, r2 = views()
    u, v = orthogonal(2, WIDTH, WIDTH, seed=5)
    diagonal = torch.diag((torch.arange(WIDTH) < D0).double())
    loss, dr1, dr2 = loss_and_gradients(r1, r2, u @ diagonal @ v.T, backend)
    want, d1, d2 = loss_and_gradients(r1 @ v, r2 @ v, dim=D0, backend=backend)
    close(loss, want)
    close(dr1, d1 @ v.T)
    close(dr2, d2 @ v.T)
    assert abs(loss - loss_and_gradients(r1, r2, dim=D0)[0]) > 1e-3


def test_rotated_projector_trains_the_same_network_in_another_basis():
    """SGD on a last linear layer A with projector U D V^T is SGD on V^T A with the slice."""
    x1, x2 = views(0.1)
    u, v = orthogonal(2, WIDTH, WIDTH, seed=5)
    diagonal = torch.diag((torch.arange(WIDTH) < D0).double())
    start = randn(WIDTH, WIDTH, seed=6)

    def train(a, projector):
        for _ in range(30):
            a = a.detach().requires_grad_()
            r1, r2 = x1 @ a.T, x2 @ a.T
            if projector is None:
                loss = fast_directclr_loss(r1, r2, D0)
            else:
                loss = fast_directclr_loss(r1 @ projector.T, r2 @ projector.T, None)
            (gradient,) = torch.autograd.grad(loss, a)
            a = a.detach() - 0.1 * gradient
        return a

    rotated = train(start, u @ diagonal @ v.T)
    close(rotated, v @ train(v.T @ start, None), rtol=1e-8)
    assert (rotated - start).norm() > 0.1
