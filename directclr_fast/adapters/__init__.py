"""Losses of other libraries by their own names, arguments and calls: change the import, no more.

One module for each library: ``lightly``, ``open_clip``, ``pytorch_metric_learning`` and
``sentence_transformers``. None imports the library it stands in for. Values and gradients are the
original's to rounding (``tests/test_adapters.py``), with two differences everywhere: the loss is
fp32 for half-precision inputs, and what the fused loss does not compute raises
``NotImplementedError`` in a sentence that names the argument.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..world import all_gather


def initialised() -> bool:
    """Whether this process is one of a torch.distributed job."""
    return dist.is_available() and dist.is_initialized()


def own_first(rows: Tensor) -> Tensor:
    """The rows of all processes, (W n, d), those of this process first, gradients included.

    All processes must call with equally many rows n, and run the backward pass.
    """
    return Gathered.apply(rows).roll(-dist.get_rank() * len(rows), 0)


class Gathered(torch.autograd.Function):
    """All-gather in the order of ranks. PyTorch's own that has a gradient is deprecated from 2.14
    on, and what follows it is not in 2.11."""

    @staticmethod
    def forward(ctx, rows):
        ctx.rows = len(rows)
        everyone = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        all_gather(everyone, rows.contiguous())
        return everyone

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.split(ctx.rows)[dist.get_rank()]
