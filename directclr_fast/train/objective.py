"""What a training mode does between the representation and the loss.

========== ======================================================= =========================
mode       loss is taken on                                        projector
========== ======================================================= =========================
baseline   all R columns of r                                      none
directclr  r[:, :dim]                                              fixed, diagonal, low rank
single     Linear(R, 128) of r                                     trained
simclr     Linear(R, R), BatchNorm, ReLU, Linear(R, 128),          trained
           BatchNorm of r; no Linear has a bias
group      8 groups of R/8 columns of r, losses summed             none; one fixed permutation
diagonal   r times one weight for each column                      trained, diagonal
orthogonal r times an orthogonal matrix (R, R)                     trained, kept orthogonal
lowrank    r times dim orthonormal columns (R, dim)                fixed, low rank
random     dim columns of r, others in every step                  none
========== ======================================================= =========================

"directclr" is the fixed low-rank diagonal projector: dim ones on the diagonal of a matrix of zeros.
"lowrank" is the fixed low-rank one U D V' with the same D and random orthogonal U, V. U turns the
embedding and changes no similarity, so only the dim columns of V that D keeps are there. For the
same reason "orthogonal" has the loss and the gradient of "baseline" up to rounding, and its matrix
has no gradient at all but rounding; it is there because the paper has it.

The permutation of "group", V of "lowrank" and the columns of "random" are drawn from the run's
seed, alike on every process.
"""

from __future__ import annotations

import warnings
from collections.abc import Container

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from ..loss import fast_directclr_loss
from .config import MODES, check_setting

OF_DIM = ("directclr", "lowrank", "random")  # the modes that read `dim`
EMBEDDING = 128
GROUPS = 8


def default_dim(width: int) -> int:
    """The paper's 360 of 2048 columns, or the same share of another width."""
    return max(1, round(360 * width / 2048))


class Diagonal(nn.Module):
    """x (B, R) times a trained weight (1, R), one at the start: a matrix, so that it takes weight
    decay and LARS's adaptation as other projectors do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Orthogonal(nn.Module):
    """x (B, R) times a trained matrix that stays orthogonal: a Cayley transform of a skew matrix,
    times a random orthogonal matrix where it starts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        linear = nn.Linear(width, width, bias=False)
        # One solve; the exponential map takes some ten products, and its gradient eight times that.
        self.linear = orthogonal(linear, orthogonal_map="cayley")

    def matrix(self) -> Tensor:
        """What x is multiplied with, (R, R), transposed."""
        # In half precision it would be orthogonal to three digits only.
        device = self.linear.parametrizations.weight.original.device
        with torch.autocast(device.type, enabled=False):
            return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix())


class LowRank(nn.Module):
    """x (B, R) times a fixed matrix ``weight`` (R, rank) of orthonormal columns."""

    def __init__(self, width: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        normal = torch.randn(width, rank, generator=generator, dtype=torch.float64)
        self.register_buffer("weight", torch.linalg.qr(normal).Q.float())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class RandomColumns(nn.Module):
    """Which ``count`` of ``width`` columns a step takes: a function of the seed and of the number
    of draws before it, which is all that a checkpoint needs to hold."""

    def __init__(self, width: int, count: int, seed: int) -> None:
        super().__init__()
        self.width, self.count, self.seed, self.draws = width, count, seed, 0

    def forward(self) -> Tensor:
        """int64 (count,), ascending; a new draw at each call while training."""
        mixed = np.random.SeedSequence((self.seed, self.draws)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        self.draws += self.training
        return torch.randperm(self.width, generator=generator)[: self.count].sort().values

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.draws)

    def set_extra_state(self, state: Tensor) -> None:
        self.draws = int(state)


class Objective(nn.Module):
    """Mode and loss: representations (B, R) of two views to a scalar loss.

    Args:
        mode: one of :data:`MODES`.
        width: R.
        dim: columns of the modes :data:`OF_DIM`, 1 to R; None takes :func:`default_dim`.
        seed: of what is drawn in "group", "lowrank" and "random".
        loss_options: of :func:`directclr_fast.fast_directclr_loss`.
    """

    def __init__(
        self,
        mode: str,
        width: int,
        *,
        dim: int | None = None,
        seed: int = 0,
        **loss_options,
    ) -> None:
        super().__init__()
        check_setting("mode", mode, choices=MODES)
        dim = default_dim(width) if dim is None else dim
        if mode in OF_DIM and not 0 < dim <= width:
            raise ValueError(f"dim: expected 1 to {width} (the encoder's width), got {dim}")
        if mode == "group" and width % GROUPS:
            raise ValueError(
                f"mode: expected an encoder width divisible by {GROUPS} for 'group', got {width}"
            )
        self.mode, self.width = mode, width
        self.dim = dim if mode == "directclr" else None
        self.loss_options = loss_options
        generator = torch.Generator().manual_seed(seed)
        projectors = {
            "single": lambda: nn.Linear(width, EMBEDDING, bias=False),
            "simclr": lambda: nn.Sequential(
                nn.Linear(width, width, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(inplace=True),
                nn.Linear(width, EMBEDDING, bias=False),
                nn.BatchNorm1d(EMBEDDING),
            ),
            "diagonal": lambda: Diagonal(width),
            "orthogonal": lambda: Orthogonal(width),
            "lowrank": lambda: LowRank(width, dim, generator),
        }
        self.projector = projectors.get(mode, nn.Identity)()
        self.draw = RandomColumns(width, dim, seed) if mode == "random" else None
        columns = None
        if mode == "group":
            columns = torch.randperm(width, generator=generator).view(GROUPS, -1)
        self.register_buffer("columns", columns)

    def as_in(self, names: Container[str]) -> None:
        """Takes the form whose state dict has these ``names``: until version 0.1.0 the projector of
        "simclr" ended in its second Linear. Said in a warning."""
        if self.mode == "simclr" and "projector.4.weight" not in names:
            self.projector = self.projector[:4]
            warnings.warn(
                "mode: simclr of an older version, whose projector has no BatchNorm at its end; "
                "the run keeps that form",
                stacklevel=2,
            )

    @property
    def sub_vector(self) -> slice:
        """The columns of r that the loss reads ("directclr"), or all of them."""
        return slice(0, self.dim)

    def embed(self, r: Tensor) -> Tensor:
        """What the similarity is taken of, (B, d): the projector's output, or r's sub-vector; all
        of r where the groups or draws of columns are several."""
        return self.projector(r)[:, self.sub_vector]

    def forward(self, r1: Tensor, r2: Tensor) -> Tensor:
        """Loss of two views' representations, each (B, R). Training with "random", each call is a
        step and draws its columns."""
        columns = self.columns if self.draw is None else self.draw().to(r1.device)
        with parametrize.cached():  # of "orthogonal": one solve for both views
            z1, z2 = self.projector(r1), self.projector(r2)
        return fast_directclr_loss(z1, z2, self.dim, columns=columns, **self.loss_options)
