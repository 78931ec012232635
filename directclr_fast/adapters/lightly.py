"""``lightly.loss.NTXentLoss`` and ``DirectCLRLoss`` without a memory bank."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from ..loss import fast_directclr_loss
from . import initialised


class NTXentLoss(nn.Module):
    """NT-Xent (SimCLR) of two views: ``NTXentLoss(temperature)(out0, out1)``.

    Args:
        temperature: positive. The original also takes a negative one, which pulls negatives
            together and pushes positives apart; here it is refused.
        memory_bank_size: 0, or (0, dim). Another one raises ``NotImplementedError``.
        gather_distributed: take candidates from all processes of torch.distributed. Each returns
            the loss of its own rows and gets the gradient of the sum over processes, as with the
            original.

    Raises:
        ValueError: a temperature that is negative or, as in the original, below 1e-8;
            ``gather_distributed`` where PyTorch has no torch.distributed.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if not temperature >= 1e-8:
            raise ValueError(f"temperature: expected at least 1e-8, got {temperature}")
        size = memory_bank_size if isinstance(memory_bank_size, int) else memory_bank_size[0]
        if size:
            raise NotImplementedError(
                f"memory_bank_size: expected 0, got {memory_bank_size}; a memory bank (MoCo) "
                "needs lightly's own loss"
            )
        if gather_distributed and not dist.is_available():
            raise ValueError(
                "gather_distributed: expected False in a PyTorch without torch.distributed, "
                f"got {gather_distributed}"
            )
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """0-dim loss of the views (N, d); errors are those of ``fast_directclr_loss``."""
        return self._loss(out0, out1, None)

    def _loss(self, out0: Tensor, out1: Tensor, dim: int | None) -> Tensor:
        if not (self.gather_distributed and initialised()):
            return fast_directclr_loss(out0, out1, dim, self.temperature, negatives="both")
        # The mean over this process's rows, which lightly returns, not over those of all.
        return fast_directclr_loss(
            out0, out1, dim, self.temperature, negatives="both", reduction="none", group="world"
        ).mean()


class DirectCLRLoss(NTXentLoss):
    """NT-Xent on the first ``loss_dim`` columns: ``DirectCLRLoss(loss_dim)(out0, out1)``.

    The paper's loss as lightly has it, with the candidates of both views; the one released with
    the paper takes those of the other view (``directclr_fast.DirectCLRLoss``).

    Args:
        loss_dim: the number of leading columns; one above the width takes all.
        temperature, memory_bank_size, gather_distributed: of :class:`NTXentLoss`.
    """

    def __init__(
        self,
        loss_dim: int = 64,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, memory_bank_size, gather_distributed)
        self.loss_dim = loss_dim

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """0-dim loss of the views (N, ...), whose dimensions after the first are flattened."""
        out0, out1 = out0.flatten(1), out1.flatten(1)
        return self._loss(out0, out1, len(range(out0.shape[1])[: self.loss_dim]))
