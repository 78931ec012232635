r"""Closed forms of the paper's sections 4 and 5 for linear networks, in any floating dtype.

Setting: inputs x_i and x'_i (two views), embeddings z_i = P x_i with P = W_L ... W_1, and Eq. 2 of
arXiv 2110.09348 as the mean over N anchors of one view (``negatives="same"``, one direction):

.. code-block:: text

    l_i = -log( exp(-|z_i - z'_i|^2 / 2) / D_i )
    D_i = exp(-|z_i - z'_i|^2 / 2) + sum_{j != i} exp(-|z_i - z_j|^2 / 2)

**Lemmas 1 and 2.** Write a_ij for the share of candidate j in D_i: a_ii for the positive, a_ij for
the row j of the own view; a_ii + sum_{j != i} a_ij = 1. Then, with d_i = x'_i - x_i and
d_ij = x_i - x_j, each squared distance is |P d|^2 / 2 with gradient P d d^T, so

.. code-block:: text

    dl_i/dP = P d_i d_i^T - a_ii P d_i d_i^T - sum_{j != i} a_ij P d_ij d_ij^T
    dl/dP   = -P X,   X = 1/N sum_i [ sum_{j != i} a_ij d_ij d_ij^T - (1 - a_ii) d_i d_i^T ]

X is symmetric, the weighted covariance of negative pairs minus that of positive pairs.

The first sum needs no N x N x n array: it is x^T (diag(row sums + column sums) - a - a^T) x, the
quadratic form of a graph Laplacian, with a taken without its diagonal.

**Several layers.** dP is the gradient by the product, so dW_l = (W_L...W_{l+1})^T dP
(W_{l-1}...W_1)^T. Layers that grew from small weights are aligned, W_l W_l^T close to
W_{l+1}^T W_{l+1}: the alignment matrix V_{l+1}^T U_l is block diagonal, a block for each set of
equal singular values (**theorem 2**; within a block the singular vectors are arbitrary).

Theorems 1 and 3 and what gradient flow conserves are in tests/test_theory.py.

Where there are several layers, ``weights`` are square, (..., L, n, n), W_1 first.
"""

from __future__ import annotations

import torch
from torch import Tensor


def shares(z1: Tensor, z2: Tensor) -> Tensor:
    """a_ij of the docstring above, (..., N, N), for embeddings (..., N, n) of two views.

    The diagonal holds the positives' shares a_ii, so rows sum to 1.
    """
    half = 0.5 * z1.square().sum(-1)
    logits = (z1 @ z1.mT).sub_(half[..., :, None]).sub_(half[..., None, :])
    torch.diagonal(logits, 0, -2, -1).copy_(-0.5 * (z1 - z2).square().sum(-1))
    return torch.softmax(logits, -1)


def lemma2_matrix(x1: Tensor, x2: Tensor, a: Tensor) -> Tensor:
    """X (..., n, n) of lemma 2, mean over anchors, from inputs (..., N, n) and :func:`shares`."""
    positive = torch.diagonal(a, 0, -2, -1)
    # With the diagonal left in, a_ii x_i x_i^T enters and leaves by the same amount.
    cross = x1.mT @ (a @ x1)
    spread = x1.mT @ ((1.0 + a.sum(-2))[..., None] * x1)
    d = x2 - x1
    pull = d.mT @ ((1.0 - positive)[..., None] * d)
    return (spread - cross - cross.mT - pull) / x1.shape[-2]


def products(weights: Tensor) -> list[Tensor]:
    """[1, W_1, W_2 W_1, ..., P], each (..., n, n)."""
    chain = [torch.eye(weights.shape[-1]).to(weights).expand_as(weights[..., 0, :, :])]
    for layer in weights.unbind(-3):
        chain.append(layer @ chain[-1])
    return chain


def layer_gradients(weights: Tensor, before: list[Tensor], dp: Tensor) -> Tensor:
    """dW (..., L, n, n) from the gradient dP (..., n, n) by the product; ``before`` is
    :func:`products` of the weights."""
    gradients = []
    for layer, prefix in zip(weights.unbind(-3)[::-1], before[-2::-1]):
        gradients.append(dp @ prefix.mT)  # dp is (W_L..W_{l+1})^T dP here
        dp = layer.mT @ dp
    return torch.stack(gradients[::-1], -3)


# Neighbouring singular values nearer than this ratio count as equal: noise of the gradient keeps
# a converged group apart by a few per cent.
EQUAL = 0.1


def alignment(lower: Tensor, upper: Tensor) -> tuple[Tensor, ...]:
    """How well ``upper`` (..., n, n) reads what ``lower`` writes: the alignment of theorem 2.

    A = V_upper^T U_lower is compared per group of nearly equal singular values: k and k + 1 are
    in different groups where in both layers log s_k - log s_{k+1} > EQUAL. Returns A
    (..., n, n); per direction k the part (..., n) of row k of A^2 that falls in its own group, 1
    where aligned; and what unrelated layers would score there, group size / n.
    """
    u, s1, _ = torch.linalg.svd(lower)
    _, s2, vh = torch.linalg.svd(upper)
    tiny = torch.finfo(s1.dtype).tiny
    gaps = [-s.clamp_min(tiny).log().diff(dim=-1) > EQUAL for s in (s1, s2)]
    label = torch.nn.functional.pad((gaps[0] & gaps[1]).cumsum(-1), (1, 0))
    same = (label[..., :, None] == label[..., None, :]).to(s1.dtype)
    a = vh @ u
    return a, (a.square() * same).sum(-1), same.mean(-1)
