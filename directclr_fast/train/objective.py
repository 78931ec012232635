"""What a training mode does between the representation and the loss.

========== ======================================================= =========================
mode       loss is taken on                                        projector
========== ======================================================= =========================
baseline   all R columns of r                                      none
directclr  r[:, :dim]                                              none
single     Linear(R, 128) of r                                     trained
simclr     Linear(R, R), BatchNorm, ReLU, Linear(R, 128) of r      trained
group      8 groups of R/8 columns of r, losses summed             none; one fixed permutation
========== ======================================================= =========================

The permutation of "group" comes from a generator seeded by the run's seed, so it is the same on
every process and is kept in the checkpoint (the release draws another one on every rank).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..loss import fast_directclr_loss

MODES = ("baseline", "directclr", "single", "simclr", "group")
EMBEDDING = 128
GROUPS = 8


def default_dim(width: int) -> int:
    """The paper's 360 of 2048 columns, or the same share of another width."""
    return max(1, round(360 * width / 2048))


class Objective(nn.Module):
    """Mode and loss: representations (B, R) of two views to a scalar loss.

    Args:
        mode: one of :data:`MODES`.
        width: R.
        dim: columns of "directclr", 1 to R; None takes :func:`default_dim`.
        temperature, negatives: of the loss.
        backend: of the loss; "reference" materialises N x N.
        group: processes over which the batch lies, as for the loss.
        seed: of the permutation of "group".
    """

    def __init__(
        self,
        mode: str,
        width: int,
        *,
        dim: int | None = None,
        temperature: float = 0.1,
        negatives: str = "cross",
        backend: str = "auto",
        group: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
        dim = default_dim(width) if dim is None else dim
        if mode == "directclr" and not 0 < dim <= width:
            raise ValueError(f"dim: expected 1 to {width} (the encoder's width), got {dim}")
        if mode == "group" and width % GROUPS:
            raise ValueError(
                f"mode: expected an encoder width divisible by {GROUPS} for 'group', got {width}"
            )
        self.mode, self.width = mode, width
        self.dim = dim if mode == "directclr" else None
        self.loss_options = {
            "temperature": temperature,
            "negatives": negatives,
            "backend": backend,
            "group": group,
        }
        self.projector = nn.Identity()
        columns = None
        if mode == "single":
            self.projector = nn.Linear(width, EMBEDDING, bias=False)
        elif mode == "simclr":
            self.projector = nn.Sequential(
                nn.Linear(width, width, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(inplace=True),
                nn.Linear(width, EMBEDDING, bias=False),
            )
        elif mode == "group":
            generator = torch.Generator().manual_seed(seed)
            columns = torch.randperm(width, generator=generator).view(GROUPS, -1)
        self.register_buffer("columns", columns)

    @property
    def sub_vector(self) -> slice:
        """The columns of r that the loss reads ("directclr"), or all of them."""
        return slice(0, self.dim)

    def embed(self, r: Tensor) -> Tensor:
        """What the similarity is taken of, (B, d): the projector's output, or r's sub-vector."""
        return self.projector(r)[:, self.sub_vector]

    def forward(self, r1: Tensor, r2: Tensor) -> Tensor:
        """Loss of two views' representations, each (B, R)."""
        return fast_directclr_loss(
            self.projector(r1),
            self.projector(r2),
            self.dim,
            columns=self.columns,
            **self.loss_options,
        )
