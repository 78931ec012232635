"""The public loss: checks, defaults and the choice between eager, compiled and reference routes.

Three losses go by the name InfoNCE; ``negatives`` names them (docs/design.md section 2):

========= ============================================== =================================
negatives candidates of anchor i                         whose
========= ============================================== =================================
"cross"   the other view's N rows                        DirectCLR's released trainer; CLIP
"both"    both views' 2N - 1 other rows (NT-Xent)        SimCLR
"same"    rows of its own view, squared distance         Eq. 2 of arXiv 2110.09348
========= ============================================== =================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import distributed, ops, reference
from .address import dispatched, readable, unwrapped
from .dispatch import BACKENDS, choose, note
from .problem import DTYPES, NEGATIVES, PRECISIONS, REDUCTIONS


class LossStats(NamedTuple):
    """Detached statistics of one call, fp32 (fp64 for fp64 inputs), in units of the logits.

    ``row_lse`` (M,): log-sum-exp over the candidates of each anchor of view 1; ``col_lse`` (N,):
    the same for view 2, None for one direction; ``positives`` (M,): the positive logits. For
    grouped columns each has a leading dimension G. The loss of row i is
    (row_lse_i + col_lse_i) / 2 - positives_i, or row_lse_i - positives_i for one direction. Over
    several processes they are those of this process's rows, col_lse too.

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
    negatives: str = "cross",
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
        negatives: "cross", "both" or "same", see the module's table. "same" (Eq. 2 of the paper)
            neither normalises nor divides by the temperature, and materialises N x N.
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
            backend without it says so. "highest" keeps fp32 inputs free of TF32 and bf16. "auto"
            on a GPU rounds operands to fp16 for half-precision inputs, under autocast and where
            ``torch.set_float32_matmul_precision`` allows rounding, and is "highest" elsewhere.
        backend: "auto" or a name from :mod:`directclr_fast.dispatch`.
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

    def check():
        return _checked(
            r1, r2, dim, temperature, columns, negatives, symmetric, reduction, gather,
            even_batches, precision, backend, workspace_bytes, eps, return_stats,
        )  # fmt: skip

    if distributed.size(group) > 1:
        loss, *stats = distributed.loss(group, gather, even_batches, check)
    else:
        loss, *stats = _run(*check(), return_stats)
    if not return_stats:
        return loss
    *stats, top1 = stats
    stats = [*(value.detach().to(loss.dtype) for value in stats), *top1.unbind(1)]
    if columns is None or _index_tensor(columns).dim() == 1:
        stats = [value[0] for value in stats]
    row_lse, col_lse, positives, *top1 = stats
    if not symmetric:
        return loss, LossStats(row_lse, None, positives, *top1, None)
    return loss, LossStats(row_lse, col_lse, positives, *top1)


def info_nce(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.1,
    *,
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
    """One direction of InfoNCE on all columns: anchors z1 (M, d), candidates z2 (N, d).

    Drop-in for the ``infoNCE`` of the DirectCLR release: rows are normalised here, logits are
    z1 z2^T / temperature, the target of row i is column i. Other arguments, results and errors as
    in :func:`fast_directclr_loss`.
    """
    return fast_directclr_loss(
        z1,
        z2,
        None,
        temperature,
        symmetric=False,
        reduction=reduction,
        group=group,
        gather=gather,
        even_batches=even_batches,
        precision=precision,
        backend=backend,
        workspace_bytes=workspace_bytes,
        eps=eps,
        return_stats=return_stats,
    )


class DirectCLRLoss(nn.Module):
    """:func:`fast_directclr_loss` as a module: ``DirectCLRLoss()(r1, r2)``.

    Takes the function's arguments. ``temperature`` may be set later (a schedule).
    ``learnable_temperature=True`` makes it exp(``log_temperature``), a parameter of shape (1,),
    fp32 until the module is moved, that starts at ``temperature`` and stays positive; setting
    ``temperature`` starts it anew.

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
        negatives: str = "cross",
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
        learnable_temperature: bool = False,
        temperature_min: float | None = None,
        temperature_max: float | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.options = {
            "negatives": negatives,
            "symmetric": symmetric,
            "reduction": reduction,
            "group": group,
            "gather": gather,
            "even_batches": even_batches,
            "precision": precision,
            "backend": backend,
            "workspace_bytes": workspace_bytes,
            "eps": eps,
            "return_stats": return_stats,
        }
        self._columns = None
        if columns is not None:
            columns = _index_tensor(columns).clone()
            if columns.is_meta:
                raise ValueError("columns: expected values (a list of ints), got a meta tensor")
            ops.check_columns(columns, None)
            self._columns = columns.tolist()  # what a meta device and to_empty do not keep
        self.register_buffer("columns", columns, persistent=False)
        for name, bound in (
            ("temperature_min", temperature_min),
            ("temperature_max", temperature_max),
        ):
            if bound is not None:
                _check_positive(name, bound)
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
        _check_positive("temperature", value, hint)
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
        self.options["group"] = distributed.found(self.options["group"])

    def forward(self, r1: Tensor, r2: Tensor) -> Tensor | tuple[Tensor, LossStats]:
        """Loss of the two views (M, R) and (N, R)."""
        return fast_directclr_loss(
            r1, r2, self.dim, self.temperature, columns=self.columns, **self.options
        )

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        taken = f"dim={self.dim}"
        if self.columns is not None:
            taken = f"columns={tuple(self.columns.shape)}"
        value, learned = f"{self._temperature:.4g}", self.log_temperature is not None
        if learned:
            # A sharded one has no value without its peers, one on meta none at all.
            told = type(self.log_temperature) is nn.Parameter and not self.log_temperature.is_meta
            value = f"{self.temperature.item():.4g}" if told else "?"
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


def _checked(
    r1, r2, dim, temperature, columns, negatives, symmetric, reduction, gather, even_batches,
    precision, backend, workspace_bytes, eps, top1,
):  # fmt: skip
    """(r1, r2, (G, d) columns or None, tensor temperature or None, options), or raises."""
    r1, r2 = unwrapped("r1", r1), unwrapped("r2", r2)
    temperature, columns = unwrapped("temperature", temperature), unwrapped("columns", columns)
    _check_views(r1, r2)
    if r1.dtype != r2.dtype:  # under autocast; the conversions bring gradients back
        wide = torch.promote_types(r1.dtype, r2.dtype)
        r1, r2 = r1.to(wide), r2.to(wide)
    index = _check_columns(columns, r1)
    dim = _check_dim(dim, r1) if index is None else 0
    _check_choice("negatives", negatives, NEGATIVES)
    _check_choice("reduction", reduction, REDUCTIONS)
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("backend", backend, BACKENDS)
    _check_choice("gather", gather, distributed.GATHERS)
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric: expected True or False, got {symmetric!r}")
    if not isinstance(even_batches, bool):
        raise TypeError(f"even_batches: expected True or False, got {even_batches!r}")
    value, tensor = _check_temperature(temperature, r1, negatives)
    if negatives != "cross" and r1.shape[0] != r2.shape[0]:
        raise ValueError(
            f"r2: expected {r1.shape[0]} rows like r1 with negatives={negatives!r}, "
            f"got {r2.shape[0]}"
        )
    _check_positive("eps", eps)
    if workspace_bytes is None:
        workspace_bytes = -1
    elif not isinstance(workspace_bytes, int) or workspace_bytes < 0:
        raise ValueError(
            f"workspace_bytes: expected None or a number of bytes >= 0, got {workspace_bytes!r}"
        )
    options = ops.Options(
        temperature=value,
        dim=dim,
        negatives=negatives,
        symmetric=symmetric,
        reduction=reduction,
        row_offset=0,
        precision=precision,
        backend=backend,
        workspace_bytes=workspace_bytes,
        eps=float(eps),
        mixed=_mixed(r1),
        top1=bool(top1),
    )
    return r1, r2, index, tensor, options


def _run(
    r1: Tensor, r2: Tensor, index: Tensor | None, temperature: Tensor | None, options, stats: bool
):
    """(loss, row_lse, col_lse, positive logits, top1) by the registered op, eagerly, or the
    reference. The last two are None without ``stats``: they would be launches more."""
    # Asked here as well: a function of its own may be compiled where this one is not.
    compiling, transformed = torch.compiler.is_compiling(), ops.transformed()
    if compiling or (not transformed and dispatched(r1, r2, index, temperature)):
        if options.backend != "reference" and options.negatives != "same":
            if transformed:  # without fullgraph=True the call then runs outside the graph
                raise NotImplementedError(
                    "torch.func or forward-mode AD inside a compiled graph: expected "
                    "backend='reference', got another; or leave the transform out of the graph"
                )
            found = ops.loss_forward(r1, r2, index, temperature, True, *options)
            return _statistics(found, temperature, options, stats)
        if index is not None:
            index = ops.checked_columns(index, r1.shape[1])
        problem = ops.problem_of(options, r1, r2, index, temperature)
        return reference.loss(problem, r1, r2, index, temperature)
    problem = ops.problem_of(options, r1, r2, index, temperature)
    name = choose(problem, options.backend)
    if name == reference.NAME:
        readable("r1 r2 columns temperature", r1, r2, index, temperature)
        with ops.plain(problem):
            result = reference.loss(problem, r1, r2, index, temperature)
        note(name)
        return result
    options = options._replace(backend=name)
    if transformed:
        found = ops.TransformedLoss.apply(r1, r2, index, temperature, options)
        return _statistics(found, temperature, options, stats)
    keep = torch.is_grad_enabled() and (
        r1.requires_grad
        or r2.requires_grad
        or (temperature is not None and temperature.requires_grad)
    )
    found = ops.Loss.apply(r1, r2, index, temperature, keep, options)
    loss, row_lse, col_lse, cosines, top1 = found
    logits = _logits(cosines, temperature, options) if stats else None
    return loss, row_lse, col_lse, logits, top1


def _statistics(found, temperature: Tensor | None, options, stats: bool):
    """What ``_run`` returns, of (loss, *Saved, top1)."""
    loss, *saved, top1 = found
    saved = ops.Saved(*saved)
    logits = _logits(saved.positives, temperature, options) if stats else None
    return loss, saved.row_lse, saved.col_lse, logits, top1


def _logits(cosines: Tensor, temperature: Tensor | None, options) -> Tensor:
    if temperature is None:
        return cosines.detach() / options.temperature
    return cosines.detach() / temperature.detach().to(cosines)


def _mixed(r: Tensor) -> bool:
    """Whether autocast is on, so that eager PyTorch would round operands: precision "auto"."""
    return r.device.type in _AUTOCAST and torch.is_autocast_enabled(r.device.type)


# Asked once: torch 2.11 cannot trace the question.
_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia")
    if torch.amp.is_autocast_available(kind)
)


def _is_number(value) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _check_positive(name: str, value, hint: str = "") -> None:
    if not _is_number(value) or not 0.0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value!r}{hint}")


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def _check_views(r1: Tensor, r2: Tensor) -> None:
    for name, r in (("r1", r1), ("r2", r2)):
        if not isinstance(r, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(r).__name__}")
        if r.is_nested or r.layout != torch.strided:
            kind = "nested" if r.is_nested else str(r.layout)
            raise TypeError(f"{name}: expected a dense strided tensor, got a {kind} one")
        if r.dtype not in DTYPES:
            raise TypeError(
                f"{name}: expected float16, bfloat16, float32 or float64, got {_name(r.dtype)}"
            )
        if r.dim() != 2:
            raise ValueError(
                f"{name}: expected 2 dimensions (rows, width), got shape {tuple(r.shape)}"
            )
    if r1.dtype != r2.dtype and not _mixed(r1):
        raise TypeError(f"r2: expected {_name(r1.dtype)} like r1, got {_name(r2.dtype)}")
    if r1.device != r2.device:
        raise ValueError(f"r2: expected device {r1.device} like r1, got {r2.device}")
    if r1.shape[0] == 0 or r1.shape[1] == 0:
        raise ValueError(f"r1: expected at least one row and column, got shape {tuple(r1.shape)}")
    if r2.shape[1] != r1.shape[1]:
        raise ValueError(f"r2: expected width {r1.shape[1]} like r1, got shape {tuple(r2.shape)}")
    if r2.shape[0] < r1.shape[0]:
        raise ValueError(
            f"r2: expected at least {r1.shape[0]} rows, a positive for each row of r1, "
            f"got {r2.shape[0]}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_dim(dim, r1: Tensor) -> int:
    width = r1.shape[1]
    if dim is None:
        return width
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim: expected an int or None, got {type(dim).__name__}")
    if not 0 < dim <= width:
        raise ValueError(f"dim: expected 1 to {width} (the width of r1) or None, got {dim}")
    return dim


def _check_temperature(temperature, r1: Tensor, negatives: str) -> tuple[float, Tensor | None]:
    """(value, None) for a number, (1.0, tensor) for a tensor."""
    if not isinstance(temperature, Tensor):
        if not _is_number(temperature):
            raise TypeError(
                "temperature: expected a positive number or a tensor of one element, "
                f"got {type(temperature).__name__}"
            )
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a positive finite number, got {temperature}")
        return float(temperature), None
    if negatives == "same":
        raise ValueError(
            "temperature: expected a number with negatives='same', which does not use it, "
            "got a tensor"
        )
    if temperature.numel() != 1 or not temperature.is_floating_point():
        raise ValueError(
            "temperature: expected a floating-point tensor of one element, got shape "
            f"{tuple(temperature.shape)} of {_name(temperature.dtype)}"
        )
    if temperature.device != r1.device and temperature.device.type != "cpu":
        raise ValueError(
            f"temperature: expected device {r1.device} like r1, or cpu, got {temperature.device}"
        )
    # Its gradient comes back through the reshape, in its own shape.
    return 1.0, temperature if temperature.dim() == 0 else temperature.reshape(())


def _index_tensor(columns) -> Tensor:
    try:
        index = columns if isinstance(columns, Tensor) else torch.tensor(columns, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"columns: expected an int64 tensor or a list of ints: {error}") from None
    if index.dtype != torch.int64:
        raise TypeError(f"columns: expected int64, got {_name(index.dtype)}")
    if index.dim() not in (1, 2) or index.numel() == 0:
        raise ValueError(
            f"columns: expected shape (d,) or (G, d), not empty, got {tuple(index.shape)}"
        )
    return index


def _check_columns(columns, r1: Tensor) -> Tensor | None:
    """(G, d) index on the device of r1, or None."""
    if columns is None:
        return None
    index = _index_tensor(columns)
    # Values are read only where that waits for no device; a compiled call's op reads them.
    if index.is_cpu and not dispatched(index):
        readable("columns", index)
        ops.check_columns(index, r1.shape[1])
    return index.reshape(-1, index.shape[-1]).contiguous().to(r1.device)
