"""Steps whose loss or gradient is not finite are left out, all ranks together, and counted.

Left out means that parameters, optimiser state and BatchNorm's running statistics keep their bits;
the images and the step of the schedule are used up.

On a CPU, and wherever a gradient scaler reads its own flag, the host looks and does not step. On a
GPU it would wait for the whole step, so there the optimiser steps in any case and what it changed
is put back on the device; only the counts are read. All ranks decide alike.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from .batchnorm import norms
from .ranks import Ranks


class Guard:
    """``start`` before a step's forward pass, ``step`` in place of the optimiser's.

    ``counts`` (2,) int64, on the device: steps left out in all, and in a row until now.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        ranks: Ranks,
    ) -> None:
        self.model, self.optimizer, self.scaler, self.ranks = model, optimizer, scaler, ranks
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.on_host = self.parameters[0].device.type == "cpu" or scaler.is_enabled()
        self.counts = torch.zeros(2, dtype=torch.int64, device=self.parameters[0].device)

    def start(self) -> None:
        """Remembers what the forward pass changes."""
        self.statistics = [b for norm in norms(self.model) for b in norm.buffers()]
        self.before = [b.clone() for b in self.statistics]

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """The optimiser's step where ``loss`` and all gradients are finite."""
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        # The scaler's own check, times 1: one pass, on a GPU one kernel.
        bad, one = loss.new_zeros((), dtype=torch.float32), loss.new_ones((), dtype=torch.float32)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, bad, one)
        good = loss.detach().isfinite() & (bad == 0)
        # The first step makes the optimiser's state, which there must be a copy of.
        if self.on_host or not self.optimizer.state:
            good.fill_(not self.ranks.any(not good))
            if good:
                self.scaler.step(self.optimizer)
            else:
                for b, old in zip(self.statistics, self.before):
                    b.copy_(old)
        else:
            self._select(good)
        self.scaler.update()
        left_out = (~good).long()
        self.counts[0] += left_out
        self.counts[1] = (self.counts[1] + left_out) * left_out

    def _select(self, good: Tensor) -> None:
        """Steps, and puts everything back, bit by bit, where ``good`` is false; no host waits."""
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        changed = [*self.parameters, *(v for v in state if isinstance(v, Tensor))]
        before = [v.clone() for v in changed] + self.before
        self.optimizer.step()
        kinds = defaultdict(lambda: ([], []))
        for new, old in zip(changed + self.statistics, before):
            # As whole numbers: 0 times NaN would stay NaN.
            kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[new.element_size()]
            for values, tensor in zip(kinds[kind], (new, old)):
                values.append(tensor.detach().view(kind))
        for kind, (new, old) in kinds.items():
            torch._foreach_mul_(new, good.to(kind))
            torch._foreach_mul_(old, (~good).to(kind))
            torch._foreach_add_(new, old)
