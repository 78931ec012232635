"""The public loss: one function, one module, and the names and words of both."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import distributed, ops
from .problem import check_columns, check_positive, checked, index_tensor


class LossStats(NamedTuple):
    """Detached statistics of one call, fp32 (fp64 for fp64 inputs), in units of the logits.

    ``row_lse`` (M,): log-sum-exp over the candidates of each anchor of view 1; ``col_lse`` (N,):
    the same for view 2, None for one direction; ``positives`` (M,): the positive logits. For
    grouped columns each has a leading dimension G. The loss of row i is
    (row_lse_i + col_lse_i) / 2 - positives_i, or row_lse_i - positives_i for one direction. Over
    several processes they are those of this process's rows, col_lse too. With labels "positive" is
    still the pair (i, i) alone, here and in top-1.

    ``row_top1`` (M,) bool: whether no candidate of anchor i of view 1 has a larger logit than its
    positive, so ``row_top1.float().mean()`` is the contrastive top-1 accuracy; ``col_top1`` (M,):
    the same for the anchors of view 2 that are a row's positive, None for one direction. A tie
    counts as right: the positive's logit is compared as its tile has it, with the rounding of the
    others. A row with a NaN among its logits is wrong.
    """

    row_lse: Tensor
    col_lse: Tensor | None
    positives: Tensor
    row_top1: Tensor
    col_top1: Tensor | None


def fast_directclr_loss(
    r1: Tensor,
    r2: Tensor,
    dim: int | None = 360,
    temperature: float | Tensor = 0.1,
    *,
    columns: Tensor | Sequence[int] | None = None,
    labels: Tensor | None = None,
    negatives: str = "cross",
    same_label: str = "positive",
    symmetric: bool = True,
    reduction: str = "mean",
    group=None,
    gather: str = "auto",
    even_batches: bool = False,
    precision: str = "auto",
    backend: str = "auto",
    workspace_bytes: int | None = None,
    eps: float = 1e-12,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""InfoNCE on the sub-vector r[:, :dim] of two views, exact and in O(N d) memory.

    With z the unit rows of r[:, :dim] and s_ij = z1_i . z2_j / temperature, the default is

    .. code-block:: text

        1/N sum_i [ (log sum_j exp s_ij + log sum_j exp s_ji) / 2 - s_ii ]

    the loss of DirectCLR (Jing, Vincent, LeCun, Tian, arXiv 2110.09348, section 6).

    Args:
        r1, r2: (M, R) and (N, R) representations of the two views, same dtype (fp16, bf16, fp32
            or fp64) and device, any strides. Row i of r1 and row i of r2 are a positive pair;
            rows of r2 beyond M are further candidates only. Gradients come in the input dtype.
            Under autocast the dtypes may differ: both are then taken as the wider of the two.
        dim: the number d of leading columns the loss reads; None takes all R.
        temperature: positive float, or a tensor of one element (of any shape), which receives its
            gradient.
        columns: int64 (d,) takes those columns instead of the first ``dim``; (G, d) sums the
            losses of G column groups. On the CPU the indices are checked (in range, none twice
            in a group), in a compiled call when it runs. On another device nothing waits for that:
            an index out of range reads NaN and is not written to, or PyTorch's indexing objects.
        labels: integers (N,), one for each row of r2; row i of r1 has that of row i of r2. A
            negative one equals no other. None: every pair has its own. Over several processes they
            are those of this process's rows.
        negatives: the candidates of an anchor. "cross": all rows of the other view (the DirectCLR
            release; CLIP). "both": the 2N - 1 other rows of both views (NT-Xent; SimCLR). "same":
            the other rows of its own view, by squared distance (Eq. 2 of the paper), which neither
            normalises nor divides by the temperature, and materialises N x N.
        same_label: what the other candidates with the label of an anchor are to it. "positive": its
            positives too; the mean of their logits takes the place of s_ii (supervised contrastive
            learning, Khosla et al., arXiv 2004.11362, L_out). "ignore": no candidates, so that
            copies of a positive are not pushed away.
        symmetric: average both directions; False takes the anchors of r1 only.
        reduction: "mean", "sum", or "none" for one loss per row, (M,).
        group: None, a ProcessGroup or "world": r1 and r2 are this process's rows, equally many of
            both, of a batch that lies over its processes; all of them must call, and must run the
            backward pass. See below.
        gather: "all" holds z2 of the whole batch in every process, "ring" passes blocks round,
            "auto" takes the ring where the former would need over 4 GiB.
        even_batches: promises that every process has as many rows and asks the same, statistics
            included. Without it a small message between the hosts per call says so, or raises in
            all of them; a promise that does not hold ends in a hang or in wrong numbers.
        precision: "auto", "fp16", "bf16", "tf32", "fp8" or "highest": that of the products; a
            backend without it says so. "highest" keeps fp32 inputs free of TF32 and bf16; GPU
            kernels multiply two fp16 parts of each row, which have 23 bits. "auto"
            on a GPU rounds operands to fp16 for half-precision inputs, under autocast and where
            ``torch.set_float32_matmul_precision`` allows rounding, and is "highest" elsewhere. On a
            CPU with a matrix unit (AMX) it rounds there too, to bf16 or, where that is coarser than
            what eager PyTorch keeps, to the 16 bits of "tf32"; without one it is "highest".
        backend: "auto", "cpu", "cuda", "triton", "torch" or "reference".
        workspace_bytes: limit of the scratch memory; None takes the backend's default. A larger
            workspace may keep similarity tiles for the backward pass and save their recompute.
        eps: rows shorter than this are divided by it, as in ``torch.nn.functional.normalize``.
        return_stats: also return :class:`LossStats`, at no extra pass over the similarities.

    Over W processes "mean" and "sum" run over the whole batch, and every process returns the same
    bits; "none" returns its own rows. A process's gradient of r1 and r2 is that of the sum over
    processes of upstream x loss, for "mean" and "sum" W times that of the loss: after
    DistributedDataParallel's averaging, parameters have exactly the gradient of the whole batch,
    whether or not all processes have equally many rows. A tensor temperature receives its whole
    gradient in every one of them. There is no second derivative and no negatives "same".

    Returns:
        The loss, 0-dim or (M,), fp32 (fp64 for fp64 inputs), or ``(loss, LossStats)``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype, device or range.
        NotImplementedError: no backend, or not the one named, has this combination.
    """

    given = (
        r1, r2, columns, temperature, labels, dim, negatives, same_label, symmetric, reduction,
        gather, even_batches, precision, backend, workspace_bytes, eps, return_stats,
    )  # fmt: skip
    if group is not None and distributed.size(group) > 1:
        loss, statistics = distributed.loss(group, even_batches, partial(checked, *given))
    else:
        loss, statistics = ops.run(checked(*given))
    if statistics is None:
        return loss
    *values, top1 = statistics
    values = [*(value.detach().to(loss.dtype) for value in values), *top1.unbind(1)]
    if columns is None or index_tensor(columns).dim() == 1:
        values = [value[0] for value in values]
    row_lse, col_lse, positives, *top1 = values
    if not symmetric:
        return loss, LossStats(row_lse, None, positives, *top1, None)
    return loss, LossStats(row_lse, col_lse, positives, *top1)


def info_nce(
    z1: Tensor, z2: Tensor, temperature: float | Tensor = 0.1, **options
) -> Tensor | tuple[Tensor, LossStats]:
    """One direction of InfoNCE on all columns: anchors z1 (M, d), candidates z2 (N, d).

    Drop-in for the ``infoNCE`` of the DirectCLR release: rows are normalised here, logits are
    z1 z2^T / temperature, the target of row i is column i. ``options`` are the keywords of
    :func:`fast_directclr_loss` but ``symmetric``; results and errors are its own.
    """
    return fast_directclr_loss(z1, z2, None, temperature, symmetric=False, **options)


_KEYWORDS = {
    parameter.name: parameter.default
    for parameter in inspect.signature(fast_directclr_loss).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in ("columns", "labels")
}


class DirectCLRLoss(nn.Module):
    """:func:`fast_directclr_loss` as a module: ``DirectCLRLoss()(r1, r2)``.

    Takes the function's arguments, ``options`` being its keywords. ``temperature`` may be set
    later (a schedule). ``learnable_temperature=True`` makes it exp(``log_temperature``), a
    parameter of shape (1,), fp32 until the module is moved, that starts at ``temperature`` and
    stays positive; setting ``temperature`` starts it anew.

    ``temperature_min`` and ``temperature_max`` bound it: CLIP's limit of 100 for 1/temperature is
    ``temperature_min=0.01``. Outside, the loss takes the bound, and ``log_temperature`` receives
    the part of its gradient that leads a descent back inside: it moves past a bound by at most
    what the optimizer adds of its own (momentum). Other values than within are refused.

    ``columns`` become a buffer that moves with the module, outside the ``state_dict``. After
    ``to_empty`` of a module made on the meta device, ``reset_parameters`` restores both. A copy
    holds the same process group; a pickle holds "world", or the name and ranks of another group,
    which is looked for when it is loaded and else asked for at the first call.
    """

    def __init__(
        self,
        dim: int | None = 360,
        temperature: float = 0.1,
        *,
        columns: Tensor | Sequence[int] | None = None,
        learnable_temperature: bool = False,
        temperature_min: float | None = None,
        temperature_max: float | None = None,
        **options,
    ) -> None:
        if unknown := sorted(set(options) - set(_KEYWORDS)):
            raise TypeError(f"DirectCLRLoss: expected keywords of the loss, got {unknown[0]!r}")
        super().__init__()
        self.dim = dim
        self.options = _KEYWORDS | options
        self._columns = None
        if columns is not None:
            columns = index_tensor(columns).clone()
            if columns.is_meta:
                raise ValueError("columns: expected values (a list of ints), got a meta tensor")
            check_columns(columns, None)
            self._columns = columns.tolist()  # what a meta device and to_empty do not keep
        self.register_buffer("columns", columns, persistent=False)
        for name, bound in (
            ("temperature_min", temperature_min),
            ("temperature_max", temperature_max),
        ):
            if bound is not None:
                check_positive(name, bound)
        self.temperature_min, self.temperature_max = temperature_min, temperature_max
        self.log_temperature = None
        if learnable_temperature:
            self.log_temperature = nn.Parameter(torch.empty(1, dtype=torch.float32))
        self.temperature = temperature

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in force: a float, or a 0-dim tensor where it is learned."""
        if self.log_temperature is None:
            return self._temperature
        value = self.log_temperature
        if self.temperature_min is not None or self.temperature_max is not None:
            value = _Bounded.apply(value, _log(self.temperature_min), _log(self.temperature_max))
        return value.exp().squeeze()

    @temperature.setter
    def temperature(self, value: float) -> None:
        hint = "" if self.log_temperature is not None else _LEARNABLE
        check_positive("temperature", value, hint)
        low, high = self.temperature_min or 0.0, self.temperature_max or math.inf
        if not low <= value <= high:
            raise ValueError(f"temperature: expected {low} to {high} as bounded, got {value!r}")
        self._temperature = float(value)
        self._reset_temperature()

    def reset_parameters(self) -> None:
        """Puts the learned temperature at the value last set, and the columns where they were."""
        self._reset_temperature()
        if self.columns is not None:
            self.columns.copy_(torch.tensor(self._columns, device="cpu"))

    @torch.no_grad()
    def _reset_temperature(self) -> None:
        if self.log_temperature is not None:
            self.log_temperature.fill_(math.log(self._temperature))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Saved 0-dim once, which fully_shard does not take.
        key = f"{prefix}log_temperature"
        if key in state_dict and state_dict[key].dim() == 0:
            state_dict[key] = state_dict[key].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state["options"] = {**self.options, "group": distributed.portable(self.options["group"])}
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.options["group"] = distributed.restored(self.options["group"])

    def forward(
        self, r1: Tensor, r2: Tensor, labels: Tensor | None = None
    ) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of the two views (M, R) and (N, R), with labels (N,) where given."""
        return fast_directclr_loss(
            r1, r2, self.dim, self.temperature, columns=self.columns, labels=labels, **self.options
        )

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        taken = f"dim={self.dim}"
        if self.columns is not None:
            taken = f"columns={tuple(self.columns.shape)}"
        value, learned = f"{self._temperature:.4g}", self.log_temperature is not None
        if learned:
            # A sharded one has no value without its peers, one on meta none at all.
            known = type(self.log_temperature) is nn.Parameter and not self.log_temperature.is_meta
            value = f"{self.temperature.item():.4g}" if known else "?"
        return f"{taken}, temperature={value}, learnable_temperature={learned}"


_LEARNABLE = " (learnable_temperature=True makes it a parameter)"


class _Bounded(torch.autograd.Function):
    """clamp, except that outside a gradient passes whose descent leads back inside.

    Without ``jvp``, which a compiled graph could not hold.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value, low, high):
        return value.clamp(low, high)

    @staticmethod
    def setup_context(ctx, inputs, output):
        value, ctx.low, ctx.high = inputs
        ctx.save_for_backward(value)

    @staticmethod
    def backward(ctx, grad):
        (value,) = ctx.saved_tensors
        if ctx.low is not None:
            grad = torch.where(value < ctx.low, grad.clamp(max=0.0), grad)
        if ctx.high is not None:
            grad = torch.where(value > ctx.high, grad.clamp(min=0.0), grad)
        return grad, None, None


def _log(bound: float | None) -> float | None:
    return None if bound is None else math.log(bound)
