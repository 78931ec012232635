"""``lightly.loss.NTXentLoss`` and ``DirectCLRLoss``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..loss import fast_directclr_loss
from . import Gathered, initialised


class MemoryBank(nn.Module):
    """The last rows it was given, in a ring: ``bank`` (K, d), unit rows in fp32, not saved.

    It starts as random unit rows. A batch that reaches the end is cut there, and the next one
    begins at row 0.

    Raises:
        ValueError: ``size`` that is no (K, d) of positive ints.
    """

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        if len(size) != 2 or not min(size) > 0:
            raise ValueError(f"memory_bank_size: expected 0 or (rows, dim), got {tuple(size)}")
        self.register_buffer("bank", F.normalize(torch.randn(*size), dim=1), persistent=False)
        self.start = 0

    def put(self, rows: Tensor) -> None:
        """Takes rows (n, d) in the place of the oldest."""
        end = min(self.start + len(rows), len(self.bank))
        self.bank[self.start : end] = rows[: end - self.start].detach()
        self.start = end % len(self.bank)


class NTXentLoss(nn.Module):
    """NT-Xent (SimCLR) of two views: ``NTXentLoss(temperature)(out0, out1)``.

    Args:
        temperature: positive. The original also takes a negative one, which pulls negatives
            together and pushes positives apart; here it is refused.
        memory_bank_size: 0, or (K, dim): the candidates of a row of ``out0`` are then its positive
            and K rows of ``out1`` of earlier calls (MoCo), and no others of the batch.
        gather_distributed: take candidates from all processes of torch.distributed. Each returns
            the loss of its own rows and gets the gradient of the sum over processes, as with the
            original. With a memory bank, it is the bank that takes the rows of all.

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
        if gather_distributed and not dist.is_available():
            raise ValueError(
                "gather_distributed: expected False in a PyTorch without torch.distributed, "
                f"got {gather_distributed}"
            )
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        one = isinstance(memory_bank_size, int)
        size = (memory_bank_size,) if one else tuple(memory_bank_size)
        self.memory_bank = MemoryBank(size) if size[0] else None

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """0-dim loss of the views (N, d); errors are those of ``fast_directclr_loss``."""
        return self._loss(out0, out1, None)

    def _loss(self, out0: Tensor, out1: Tensor, dim: int | None) -> Tensor:
        if self.memory_bank is not None:
            return self._of_bank(out0[:, :dim], out1[:, :dim])
        if not (self.gather_distributed and initialised()):
            return fast_directclr_loss(out0, out1, dim, self.temperature, negatives="both")
        # The mean over this process's rows, which lightly returns, not over those of all.
        return fast_directclr_loss(
            out0, out1, dim, self.temperature, negatives="both", reduction="none", group="world"
        ).mean()

    def _of_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        bank = self.memory_bank.bank
        if out1.shape[1:] != bank.shape[1:]:
            raise ValueError(
                f"out1: expected {bank.shape[1]} columns, those of memory_bank_size, "
                f"got shape {tuple(out1.shape)}"
            )
        # The batch has one label: its other rows are no candidates. Those of the bank have none.
        labels = torch.zeros(len(out1) + len(bank), dtype=torch.int64, device=out1.device)
        labels[len(out1) :] = -1
        loss = fast_directclr_loss(
            out0, torch.cat([out1, bank.to(out1)]), None, self.temperature, labels=labels,
            same_label="ignore", symmetric=False,
        )  # fmt: skip
        if out0.requires_grad:
            rows = F.normalize(out1.detach(), dim=1)
            if self.gather_distributed and initialised():
                rows = Gathered.apply(rows)
            self.memory_bank.put(rows)
        return loss


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
