"""What a backend is: the five stages of one column group, and what they hand to each other.

``driver`` calls them in this order; the symbols are those of docs/design.md sections 2 and 3. M
anchors, N candidates, d columns, G column groups; ``scale`` is a = 1/temperature, a float or a
0-dim tensor on the device. Every method runs without autograd and waits for no device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem import Problem


class Saved(NamedTuple):
    """What the backward pass of one column group needs; no N x N tensor.

    z1 (M, d), z2 (N, d) unit rows in the compute dtype (a backend may pad d, or pack them);
    rnorm1 (M,), rnorm2 (rows of r2,) reciprocal norms; row_lse (M,), col_lse (N,), nll_row and
    nll_col (M,) in the problem's statistics dtype; kept: E tiles, if the workspace allowed. The
    column statistics are empty, (0,), for one direction. Over several processes z2 has the rows of
    all where they are gathered, and for "both" z1 and row_lse too.
    """

    z1: Tensor
    z2: Tensor
    rnorm1: Tensor
    rnorm2: Tensor
    row_lse: Tensor
    col_lse: Tensor
    nll_row: Tensor
    nll_col: Tensor
    kept: Tensor


class Statistics(NamedTuple):
    """What ``LossStats`` is made of; leading dimension G. row_lse (G, M), col_lse (G, N) or (G, 0),
    logits (G, M) of the positives, top1 (G, directions, M) bool."""

    row_lse: Tensor
    col_lse: Tensor
    logits: Tensor
    top1: Tensor


class Tops(NamedTuple):
    """Largest logits so far, from which top-1 follows; in a unit of the backend's own.

    ``row`` (M,) and ``col`` (N,) run over the other candidates, -inf where there was none; ``own``
    (M,) are the positives' with the rounding of their neighbours in the tile. In the compute
    dtype; ``col`` is None for one direction, ``own`` where no positive is met.
    """

    row: Tensor
    col: Tensor | None
    own: Tensor | None

    @staticmethod
    def none_yet(problem: Problem, like: Tensor, columns: int) -> Tops:
        """Before the first tile, on the device of ``like``."""

        def lowest(size: int) -> Tensor:
            return like.new_full((size,), -torch.inf, dtype=problem.compute_dtype)

        col = lowest(columns) if problem.symmetric else None
        return Tops(lowest(problem.rows), col, lowest(problem.rows))

    def top1(self, nll_row: Tensor, nll_col: Tensor) -> Tensor:
        """(directions, M) bool: no other candidate's logit is larger, and none is NaN.

        ``col`` has been cut to the positives' columns, (M,).
        """
        right = [(self.own >= self.row) & ~nll_row.isnan()]
        if self.col is not None:
            right.append((self.own >= self.col) & ~nll_col.isnan())
        return torch.stack(right)


class Weights(NamedTuple):
    """Weights of one tile product's gradient: G_ij = w_i p_ij + v_j q_ij, its positives given.

    The upstream gradient, the reduction's factor and a = 1/temperature are in w and v.

    p_ij = exp(a s_ij - row_lse_i) and q_ij = exp(a s_ij - col_lse_j); ``diagonal`` (M,) replaces
    G at the positives. ``v`` and ``col_lse`` are None for one direction.
    """

    w: Tensor
    row_lse: Tensor
    v: Tensor | None
    col_lse: Tensor | None
    diagonal: Tensor


# int32 of the rows and of the columns of a tile product, (M,) and (N,): entries whose two are equal
# are left out; positives, which are equal too, are what they are.
Ids = tuple[Tensor, Tensor]


class Backend:
    """One implementation of the stages; a new one joins ``problem.PRIORITY``.

    What raises ``NotImplementedError`` here is every subclass's to define, the last two where it
    fuses; types are stated here.
    """

    name: str
    default_workspace: int  # bytes

    def why_not(self, problem: Problem) -> list[str]:
        """Reasons this backend cannot run ``problem``; empty when it can."""
        raise NotImplementedError

    def why_not_unasked(self, problem: Problem) -> str | None:
        """Why ``problem``, which it can run, is no choice for it unless a caller names it."""
        return None

    def precision(self, problem: Problem) -> str:
        """That of the products: what "auto" stands for, otherwise what is asked."""
        return "highest" if problem.precision == "auto" else problem.precision

    def workspace(self, problem: Problem) -> int:
        """Bytes of scratch memory that a call may take."""
        asked = problem.workspace_bytes
        return self.default_workspace if asked is None else asked

    def details(self) -> dict[str, str]:
        """What doctor shows beside the reasons."""
        return {}

    # ------------------------------------------------------------------------------- buffers

    def packed(self, problem: Problem, z: Tensor | None = None) -> tuple[int, torch.dtype]:
        """Row length (d, or d padded) and dtype of rows to be made, or of those that ``z`` is."""
        raise NotImplementedError

    def kept_shape(self, problem: Problem) -> tuple[int, ...]:
        """Shape of the E tiles kept for the backward pass in one group; (0,) keeps nothing."""
        return (0,)

    def kept_buffer(self, problem: Problem, like: Tensor) -> Tensor:
        """Memory of that shape, on the device of ``like``."""
        return like.new_empty(self.kept_shape(problem))

    def gradient_buffer(self, problem: Problem, rows: int, device: torch.device) -> Tensor:
        """(rows, width) in the input dtype, as ``finish`` wants it (zero-filled or not)."""
        raise NotImplementedError

    def unit_rows(self, problem: Problem, z: Tensor) -> Tensor:
        """(rows, d) in the compute dtype of rows as ``normalize`` made them."""
        return z[:, : problem.dim]

    # ------------------------------------------------------------------------------- forward

    def normalize(self, problem: Problem, r: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Unit rows (rows, d) and reciprocal norms (rows,) of the columns taken from ``r`` (rows,
        width): the first d, or those of ``index`` (d,)."""
        raise NotImplementedError

    def sums(
        self,
        problem: Problem,
        z1: Tensor,
        z2: Tensor,
        scale: float | Tensor,
        kept: Tensor,
        logits: Tensor | None = None,
        tops: Tops | None = None,
        ids: Ids | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """log sum of exp(a s) over all but the positives: (M,) by rows and (N,) by columns.

        ``logits`` (M,), in the statistics dtype, receives the positives' a s_ip(i) where these are
        among the candidates: with the rounding of their neighbours in the tile, or from an exact
        product where the tile's operands are rounded. None: nobody asks. ``tops`` is raised to the
        largest logits met here, and its ``own`` written where ``logits`` would be. What has equal
        ``ids`` is left out as the positives are.
        """
        raise NotImplementedError

    def self_sums(
        self,
        problem: Problem,
        z: Tensor,
        scale: float | Tensor,
        top: Tensor | None = None,
        ids: Ids | None = None,
    ) -> Tensor:
        """log sum_j exp(a z_i . z_j) over j != i: (rows,). ``top`` (rows,): as ``tops``."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------- backward

    def products(
        self,
        problem: Problem,
        z1: Tensor,
        z2: Tensor,
        scale: float | Tensor,
        pair: Weights,
        kept: Tensor,
        need: tuple[bool, bool],
        ids: Ids | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """``weights`` and ``products``: dz1 = G z2 (M, d), dz2 = G^T z1 (N, d) with G of ``pair``;
        None where not needed."""
        raise NotImplementedError

    def add_self_products(
        self,
        problem: Problem,
        z: Tensor,
        scale: float | Tensor,
        w: Tensor,
        lse: Tensor,
        dz: Tensor,
        ids: Ids | None = None,
    ) -> None:
        """dz += (H + H^T) z with H_ij = w_i exp(a z_i . z_j - lse_i), i != j."""
        raise NotImplementedError

    def finish(
        self,
        problem: Problem,
        z: Tensor,
        rnorm: Tensor,
        dz: Tensor,
        dr: Tensor | None,
        index: Tensor | None,
    ) -> Tensor | float:
        """Through the normalisation into the columns of ``dr`` (None: only the sum is wanted).

        Returns sum_i z_i . dz_i, 0-dim or a float. May overwrite ``dz``.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------------------- in one go

    def fuses(self, problem: Problem) -> bool:
        """Whether ``forward`` and ``backward`` run ``problem``, of one process and without labels,
        in fewer launches than the driver."""
        return False

    def forward(
        self, problem: Problem, r1: Tensor, r2: Tensor, columns: Tensor | None,
        scale: float | Tensor,
    ) -> tuple[Tensor, list[Saved], Statistics | None]:  # fmt: skip
        """``driver.forward`` of one group, ``columns`` (1, d): the loss, 0-dim or (M,)."""
        raise NotImplementedError

    def backward(
        self, problem: Problem, dloss: Tensor, states: list[Saved], columns: Tensor | None,
        scale: float | Tensor, need: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | float | None]:  # fmt: skip
        """``driver.backward``: (dr1 (M, width), dr2 (N, width), dloss/dtemperature)."""
        raise NotImplementedError
