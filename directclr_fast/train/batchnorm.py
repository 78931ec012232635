"""BatchNorm whose statistics are those of the batches of all processes together.

On GPUs it is torch's SyncBatchNorm, which has no CPU form; on a CPU the one below, for runs under
Gloo: the same statistics by differentiable sums, at twice the memory of the ordinary layer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def norms(module: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm in ``module``, in order."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def synchronise(module: nn.Module) -> nn.Module:
    """``module`` with the statistics of all ranks in each of its BatchNorms, names unchanged."""
    if any(p.is_cuda for p in module.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for norm in norms(module):
        norm.__class__ = _HostSyncBatchNorm  # parameters, buffers and their names stay
    return module


class _Sum(torch.autograd.Function):
    """Sum over the ranks; so is its gradient, as the output of each reads the input of all."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.forward(None, grad)


class _HostSyncBatchNorm(_BatchNorm):
    """x (B, C, ...) with rows of all ranks normalised together; B may differ between ranks."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        over = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = x.float()
        rows = wide.new_tensor([x.numel() / x.shape[1]])
        sums = _Sum.apply(torch.cat((wide.sum(over), rows)))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = wide - mean.view(shape)
        var = _Sum.apply(centred.square().sum(over)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        scale = (var + self.eps).rsqrt() * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
