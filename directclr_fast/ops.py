"""One logical op per direction, registered with torch.library: schema, fake, autograd.

``directclr_fast::loss_forward`` and ``directclr_fast::loss_backward`` are what compiled graphs
hold. Eager calls run the same two bodies through :class:`Loss`, an ``autograd.Function``, which
spares them the dispatcher and adds double backward. Backends are bodies under both.
"""

from __future__ import annotations

import contextlib
import functools
from itertools import chain

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, driver, reference
from .address import dispatched, readable, unwrapped
from .backends.base import Backend, Saved, Statistics
from .problem import AUTOCAST, SCHEMA, Call, Options, Problem, check_columns
from .products import fp32_products, may_round
from .world import ALONE, World

# Version of what `loss_forward` saves and of the code that is traced around it. Add one when either
# changes: compiled graphs are cached on disk.
_VERSION = 7
_SCHEMA = f"{SCHEMA}, int version"
_SAVED = ", ".join(f"Tensor {name}" for name in Saved._fields)


def arguments(options: Options) -> tuple:
    """The last arguments of both ops."""
    return *options.values(), _VERSION


def problem_of(
    options: Options,
    r1: Tensor,
    r2: Tensor,
    columns: Tensor | None,
    labels: Tensor | None = None,
    differentiable: bool = True,
) -> Problem:
    """The record of a forward call on these tensors."""
    (rows, width), n = r1.shape, r2.shape[0]
    taken, labelled = None if columns is None else columns.shape, labels is not None
    return Problem.of(options, rows, n, width, r1.dtype, r1.device, taken, labelled, differentiable)


# Most eager calls ask what an earlier one asked.
_known = functools.lru_cache(maxsize=256)(Problem.of)


def _autocast_is_on(kind: str) -> bool:
    return kind in AUTOCAST and torch.is_autocast_enabled(kind)


def without_autocast(problem: Problem):
    """A context without autocast and, for precision="highest", without reduced fp32 products.

    "auto" leaves torch's own float32 matmul setting in force.
    """
    stack = contextlib.ExitStack()
    kind = problem.device_type
    if _autocast_is_on(kind):
        stack.enter_context(torch.autocast(kind, enabled=False))
    if problem.precision == "highest" and may_round(kind):
        stack.enter_context(fp32_products(kind, "ieee"))
    return stack


def _alone(problem: Problem, function, *arguments):
    """``function`` without autograd and :func:`without_autocast`; contexts take time, and most
    calls need none."""
    asked = problem.precision == "highest" or _autocast_is_on(problem.device_type)
    if not asked and not torch.is_grad_enabled():
        return function(*arguments)
    with torch.no_grad(), without_autocast(problem):
        return function(*arguments)


def scale_of(problem: Problem, temperature: Tensor | None):
    """1/temperature: a float where the host may know it, else a 0-dim tensor on the device."""
    if temperature is None:
        return 1.0 / problem.temperature
    if temperature.device.type == "cpu":
        value = float(temperature.detach())
        if not 0.0 < value < float("inf"):
            raise ValueError(f"temperature: expected a positive finite number, got {value}")
        return 1.0 / value
    return temperature.detach().to(problem.compute_dtype).reciprocal()


def forward_body(
    problem: Problem,
    world: World,
    r1: Tensor,
    r2: Tensor,
    columns: Tensor | None,
    temperature: Tensor | None,
    labels: Tensor | None = None,
) -> tuple[Tensor, list[Saved], Statistics | None]:
    """Loss (scalar or (M,)), what the backward pass needs of each group, and the statistics where
    the problem, which names its backend, asks for them."""
    readable("r1 r2 columns temperature labels", r1, r2, columns, temperature, labels)
    scale, backend = scale_of(problem, temperature), dispatch.load(problem.backend)
    given = r1, r2, columns, scale, labels
    result = _alone(problem, driver.forward, backend, problem, world, *given)
    dispatch.note(problem.backend)
    return result


def backward_body(
    problem: Problem,
    world: World,
    dloss: Tensor,
    states: list[Saved],
    columns: Tensor | None,
    temperature: Tensor | None,
    need: tuple[bool, bool, bool],
    labels: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dr1, dr2, dtemperature), None where not needed."""
    scale, backend = scale_of(problem, temperature), dispatch.load(problem.backend)
    dr1, dr2, dtemperature = _alone(
        problem, driver.backward, backend, problem, world, dloss, states, columns, scale, need,
        labels,
    )  # fmt: skip
    if dtemperature is not None:
        dtemperature = torch.as_tensor(
            dtemperature, dtype=temperature.dtype, device=temperature.device
        )
    return dr1, dr2, dtemperature


def _as_made(
    made: list[tuple],
    dloss: Tensor,
    columns: Tensor | None,
    temperature: Tensor | None,
    labels: Tensor | None,
    saved,
) -> list[Tensor]:
    """``saved``, contiguous: a hook may have unpacked others than those that were ``made``, a list
    of (dtype, shape)."""
    names = Saved._fields * (len(made) // len(Saved._fields))
    read = " ".join(("upstream", "columns", "temperature", "labels", *names))
    readable(read, dloss, columns, temperature, labels, *saved)
    if (
        [(value.dtype, value.shape) for value in saved] != made
        or any(value.device != dloss.device for value in saved)
        or any(v is not None and v.device != dloss.device for v in (columns, labels))
    ):
        got = (f"{k} {tuple(v.shape)} {v.dtype} {v.device}" for k, v in zip(names, saved))
        expected = (f"{k} {tuple(shape)} {dtype}" for k, (dtype, shape) in zip(names, made))
        raise ValueError(
            f"saved tensors: expected {', '.join(expected)}, all on {dloss.device}, got "
            f"{', '.join(got)}, columns on {None if columns is None else columns.device}"
        )
    return [value.contiguous() for value in saved]


def _made(backend: Backend, problem: Problem, z: Tensor | None = None) -> list[tuple]:
    """(dtype, shape) of each stacked ``Saved`` of one process. ``z`` are its packed rows."""
    g, m, n = problem.groups, problem.rows, problem.candidates
    columns, own = (n, m) if problem.symmetric else (0, 0)
    row, packed = backend.packed(problem, z)
    norm, statistic = problem.compute_dtype, problem.statistics_dtype
    fields = Saved(
        z1=(packed, (g, m, row)),
        z2=(packed, (g, n, row)),
        rnorm1=(norm, (g, m)),
        rnorm2=(norm, (g, n)),
        row_lse=(statistic, (g, m)),
        col_lse=(statistic, (g, columns)),
        nll_row=(statistic, (g, m)),
        nll_col=(statistic, (g, own)),
        kept=(packed, (g, *backend.kept_shape(problem))),
    )
    return list(fields)


class Loss(torch.autograd.Function):
    """The eager route: (loss, *Statistics where asked for) with gradients for r1, r2 and a tensor
    temperature. ``anchor`` is None or a tensor that wants a gradient where other processes do."""

    @staticmethod
    def forward(ctx, r1, r2, columns, temperature, labels, anchor, problem, world):
        loss, states, statistics = forward_body(
            problem, world, r1, r2, columns, temperature, labels
        )
        if problem.differentiable:
            saved, alone = list(chain(*states)), world is ALONE
            # The views are for a backward pass with create_graph=True only, and what wants no
            # gradient is none of autograd's business: the formula would not have kept it.
            need1, need2, *_ = ctx.needs_input_grad
            ctx.save_for_backward(
                r1 if need1 and alone else None, r2 if need2 and alone else None,
                columns, temperature, labels, *saved,
            )  # fmt: skip
            if alone:
                ctx.constants = None if need1 else _version(r1), None if need2 else _version(r2)
            ctx.problem, ctx.world = problem, world
            ctx.places = _places([columns, labels, *saved])
        ctx.set_materialize_grads(False)
        if statistics is None:
            return (loss,)
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    def backward(ctx, dloss, *_):
        nothing, world = (None,) * 4, ctx.world
        if dloss is None and world is ALONE:
            return None, None, None, None, *nothing
        r1, r2, columns, temperature, labels, *saved = ctx.saved_tensors
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        if not torch.is_grad_enabled():
            if type(dloss) is not Tensor or dloss.is_neg():
                dloss = unwrapped("upstream", dloss)
            places = _places([columns, labels, *saved])
            if places != ctx.places:
                made = [(dtype, shape) for _, dtype, shape, *_ in ctx.places[-len(saved) :]]
                saved = _as_made(made, dloss, columns, temperature, labels, saved)
            else:
                readable("upstream columns temperature labels", dloss, columns, temperature, labels)
            fields = len(Saved._fields)
            states = [Saved(*saved[i : i + fields]) for i in range(0, len(saved), fields)]
            grads = backward_body(
                ctx.problem, world, dloss, states, columns, temperature, need, labels
            )
        elif world is ALONE:
            r1 = _unchanged("r1", ctx.constants[0]) if r1 is None else r1
            r2 = _unchanged("r2", ctx.constants[1]) if r2 is None else r2
            grads = _differentiable_gradients(
                ctx.problem, dloss, r1, r2, columns, temperature, labels, need
            )
        else:
            raise NotImplementedError(
                "create_graph=True: the loss over several processes has no second derivative"
            )
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.constants = None  # as the saved tensors
        return grads[0], grads[1], None, grads[2], *nothing


def _places(tensors) -> list[tuple]:
    """Where tensors lie and how they are read there: what a hook can change about one."""
    return [
        (v.data_ptr(), v.dtype, v.shape, v.stride(), v.is_neg()) for v in tensors if v is not None
    ]


def _version(r: Tensor) -> tuple[Tensor, int | None]:
    """A tensor and how often it has been written to. Inference tensors count no versions."""
    return r, None if r.is_inference() else r._version


def _unchanged(name: str, kept: tuple[Tensor, int | None]) -> Tensor:
    """What autograd does for the tensors it saves."""
    r, version = kept
    if version is not None and r._version != version:
        raise RuntimeError(
            f"{name}: needed unchanged for create_graph=True, but it has been modified by an "
            f"inplace operation: it is at version {r._version}, expected {version}"
        )
    return r


def _differentiable_gradients(problem, dloss, r1, r2, columns, temperature, labels, need):
    """Gradients that carry a graph (create_graph=True): through the reference formula, in N^2."""
    with torch.enable_grad():
        # New nodes, so that loss(r, r) gets two gradients and not their sum twice.
        inputs = [value.view_as(value) if n else value for value, n in zip((r1, r2), need[:2])]
        inputs.append(temperature.view_as(temperature) if need[2] else temperature)
        with without_autocast(problem):
            loss = reference.loss(problem, inputs[0], inputs[1], columns, inputs[2], labels)[0]
            wanted = [value for value, n in zip(inputs, need) if n]
            grads = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=True))
    return [next(grads) if n else None for n in need]


def run(call: Call) -> tuple[Tensor, Statistics | None]:
    """Loss and, where asked for, statistics: by the registered op, eagerly, or by the formula."""
    r1, r2, index, temperature, labels, options = call
    # Asked here as well: a function of its own may be compiled where this one is not.
    compiling, inside_transform = torch.compiler.is_compiling(), transformed()
    if compiling or (not inside_transform and dispatched(r1, r2, index, temperature, labels)):
        if options.backend != "reference" and not options.reference_only():
            if inside_transform:  # without fullgraph=True the call then runs outside the graph
                raise NotImplementedError(
                    "torch.func or forward-mode AD inside a compiled graph: expected "
                    "backend='reference', got another; or leave the transform out of the graph"
                )
            given = r1, r2, index, temperature, labels, True
            return _of_outputs(options, loss_forward(*given, *arguments(options)))
        if index is not None:
            index = checked_columns(index, r1.shape[1])
        problem = problem_of(options, r1, r2, index, labels)
        return _of_formula(problem, r1, r2, index, temperature, labels)
    wanted = r1.requires_grad or r2.requires_grad
    wanted = wanted or (temperature is not None and temperature.requires_grad)
    differentiable = inside_transform or (wanted and torch.is_grad_enabled())
    (rows, width), taken = r1.shape, None if index is None else index.shape
    views = rows, r2.shape[0], width, r1.dtype, r1.device
    problem = _known(options, *views, taken, labels is not None, differentiable)
    problem = dispatch.choose(problem)
    if problem.backend == "reference":
        readable("r1 r2 columns temperature labels", r1, r2, index, temperature, labels)
        with without_autocast(problem):
            result = _of_formula(problem, r1, r2, index, temperature, labels)
        dispatch.note(problem.backend)
        return result
    if inside_transform:
        values = options.replace(backend=problem.backend).values()  # dynamo takes no record here
        return _of_outputs(
            options, TransformedLoss.apply(r1, r2, index, temperature, labels, values)
        )
    loss, *statistics = Loss.apply(r1, r2, index, temperature, labels, None, problem, ALONE)
    return loss, Statistics(*statistics) if statistics else None


def _of_formula(problem: Problem, *tensors) -> tuple[Tensor, Statistics | None]:
    loss, *statistics = reference.loss(problem, *tensors)
    return loss, Statistics(*statistics) if problem.return_stats else None


def _of_outputs(options: Options, outputs: tuple) -> tuple[Tensor, Statistics | None]:
    """What :func:`run` returns, of (loss, *Saved, logits, top1)."""
    loss, *saved, logits, top1 = outputs
    saved = Saved(*saved)
    if not options.return_stats:
        return loss, None
    return loss, Statistics(saved.row_lse, saved.col_lse, logits, top1)


def transformed() -> bool:
    """Whether ``torch.func`` or forward-mode AD is at work, which :class:`Loss` is not made for."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class TransformedLoss(torch.autograd.Function):
    """(loss, *Saved, logits, top1) by the same bodies under ``torch.func`` and forward-mode AD.

    vmap takes one call after the other. A derivative of the gradient goes through the reference
    formula, in N^2; so does nothing else.
    """

    @staticmethod
    def forward(r1, r2, columns, temperature, labels, options):
        problem = problem_of(Options(*options), r1, r2, columns, labels)
        return _outputs(problem, forward_body(problem, ALONE, r1, r2, columns, temperature, labels))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:-2])
        ctx.save_for_forward(*tensors, *output[1:-2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 6
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        tensors, saved = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        grads = iter(TransformedGradient.apply(dloss, *tensors, need, ctx.options, *saved))
        dr1, dr2, dtemperature = (next(grads) if n else None for n in need)
        return dr1, dr2, None, dtemperature, None, None

    @staticmethod
    def jvp(ctx, dr1, dr2, _, dtemperature, *__):
        if Options(*ctx.options).reduction == "none":
            raise NotImplementedError(
                "forward-mode AD: expected reduction 'mean' or 'sum', got 'none', of which "
                "backend='reference' has the derivative"
            )
        tangents = [dr1, dr2, dtemperature]
        need = tuple(tangent is not None for tangent in tangents)
        tensors, saved = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        like = saved[Saved._fields.index("rnorm1")]
        one = torch.ones((), dtype=like.dtype, device=like.device)
        grads = TransformedGradient.apply(one, *tensors, need, ctx.options, *saved)
        tangents = [tangent for tangent in tangents if tangent is not None]
        total = sum((g.to(one.dtype) * t.to(one.dtype)).sum() for g, t in zip(grads, tangents))
        return total, *(None,) * (len(saved) + 2)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _one_by_one(TransformedLoss, info, in_dims, args)


class TransformedGradient(torch.autograd.Function):
    """Those of (r1, r2, temperature) that ``need`` says, a tuple."""

    @staticmethod
    def forward(dloss, r1, r2, columns, temperature, labels, need, options, *saved):
        problem = problem_of(Options(*options), r1, r2, columns, labels)
        grads = _of_stacked(problem, dloss, saved, columns, temperature, labels, need)
        return tuple(grad for grad in grads if grad is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.need, ctx.options = inputs[:8]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *upstream):
        problem, function, primals = _formula_of(ctx)
        with without_autocast(problem):
            gradients = iter(torch.func.vjp(function, *primals)[1](upstream))
        ddloss, ddr1, ddr2 = next(gradients), next(gradients), next(gradients)
        return ddloss, ddr1, ddr2, None, next(gradients, None), *(None,) * (3 + len(Saved._fields))

    @staticmethod
    def jvp(ctx, dloss, dr1, dr2, _, dtemperature, *__):
        problem, function, primals = _formula_of(ctx)
        tangents = tuple(
            torch.zeros_like(primal) if tangent is None else tangent
            for primal, tangent in zip(primals, (dloss, dr1, dr2, dtemperature))
        )
        with without_autocast(problem):
            return torch.func.jvp(function, primals, tangents)[1]

    @staticmethod
    def vmap(info, in_dims, *args):
        return _one_by_one(TransformedGradient, info, in_dims, args)


def _formula_of(ctx):
    """(problem, function, its arguments): the formula's gradients by dloss, r1, r2, temperature."""
    dloss, r1, r2, columns, temperature, labels = ctx.saved_tensors
    problem, need = problem_of(Options(*ctx.options), r1, r2, columns, labels), ctx.need

    def gradients(dloss, r1, r2, temperature=None):
        inputs = (r1, r2, temperature)

        def loss(*wanted):
            wanted = iter(wanted)
            a, b, t = (next(wanted) if n else value for value, n in zip(inputs, need))
            return reference.loss(problem, a, b, columns, t, labels)[0]

        return torch.func.vjp(loss, *(v for v, n in zip(inputs, need) if n))[1](dloss)

    given = () if temperature is None else (temperature,)
    return problem, gradients, (dloss, r1, r2, *given)


def _one_by_one(function, info, in_dims, args):
    results = [
        function.apply(
            *(
                value.select(dim, i) if isinstance(value, Tensor) and dim is not None else value
                for value, dim in zip(args, in_dims)
            )
        )
        for i in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(values) for values in zip(*results))
    return stacked, (0,) * len(stacked)


def _outputs(problem: Problem, result: tuple) -> tuple[Tensor, ...]:
    """(loss, *Saved stacked over groups, logits, top1), tensors all: the last two are empty where
    nobody asks for them."""
    loss, states, statistics = result
    if len(states) == 1:
        saved = [value[None] for value in states[0]]
    else:
        saved = [torch.stack(values) for values in zip(*states, strict=True)]
    if statistics is None:
        logits, top1 = saved[4].new_empty(0), loss.new_empty(0, dtype=torch.bool)
        return loss, *saved, logits, top1
    return loss, *saved, statistics.logits, statistics.top1


def _of_stacked(problem: Problem, dloss: Tensor, saved, columns, temperature, labels, need):
    """``backward_body`` of one process, whose ``Saved`` are stacked over groups and may be
    anything: a graph's are what its hooks have unpacked."""
    dloss = unwrapped("upstream", dloss)
    upstream = (problem.rows,) if problem.reduction == "none" else ()
    if dloss.shape != upstream:
        raise ValueError(f"upstream: expected shape {upstream}, got {tuple(dloss.shape)}")
    made = _made(dispatch.load(problem.backend), problem, saved[0])
    saved = _as_made(made, dloss, columns, temperature, labels, saved)
    states = [Saved(*(value[group] for value in saved)) for group in range(problem.groups)]
    return backward_body(problem, ALONE, dloss, states, columns, temperature, need, labels)


@torch.library.custom_op(
    "directclr_fast::loss_forward",
    mutates_args=(),
    schema=(
        "(Tensor r1, Tensor r2, Tensor? columns, Tensor? learned, Tensor? labels, "
        "bool differentiable, "
        f"{_SCHEMA}) -> ({', '.join(['Tensor'] * (3 + len(Saved._fields)))})"
    ),
)
def loss_forward(r1, r2, columns, temperature, labels, differentiable, *rest):
    options = Options(*rest[:-1])
    _check_inputs(r1, r2, columns, labels, options)
    r1, r2 = r1.resolve_neg(), r2.resolve_neg()
    problem = dispatch.choose(problem_of(options, r1, r2, columns, labels, differentiable))
    return _outputs(problem, forward_body(problem, ALONE, r1, r2, columns, temperature, labels))


# Negated views come as they are: PyTorch's own fallback would resolve them while tracing, by a copy
# for which Inductor writes code that forgets the negation.
_library = torch.library.Library("directclr_fast", "FRAGMENT")
_library.impl("loss_forward", torch.library.fallthrough_kernel, "Negative")


def _check_inputs(
    r1: Tensor, r2: Tensor, columns: Tensor | None, labels: Tensor | None, options: Options
) -> None:
    """What a graph that holds the op has not checked, or its guards no longer hold."""
    alike = r1.dtype == r2.dtype and r1.device == r2.device and r1.dim() == r2.dim() == 2
    if not alike or r1.shape[1] != r2.shape[1] or len(r1) > len(r2):
        raise ValueError(
            "r2: expected dtype, device and width of r1 and a positive for each of its rows, got "
            f"{tuple(r1.shape)} of {r1.dtype} and {tuple(r2.shape)} of {r2.dtype}"
        )
    if columns is not None and columns.is_cpu:
        check_columns(columns, r1.shape[1])
    elif columns is None and not 0 < options.dim <= r1.shape[1]:
        raise ValueError(f"dim: expected 1 to {r1.shape[1]}, got {options.dim}")
    if labels is not None and (labels.shape != r2.shape[:1] or labels.device != r2.device):
        raise ValueError(
            f"labels: expected shape ({len(r2)},) on {r2.device}, got {tuple(labels.shape)} on "
            f"{labels.device}"
        )


@torch.library.custom_op("directclr_fast::checked_columns", mutates_args=())
def checked_columns(columns: Tensor, width: int) -> Tensor:
    """A copy of the index, for compiled graphs of the formula: they could not raise otherwise."""
    if columns.is_cpu:
        check_columns(columns, width)
    return columns.clone()


@checked_columns.register_fake
def _(columns, width):
    return torch.empty_like(columns)


@loss_forward.register_fake
def _(r1, r2, columns, temperature, labels, differentiable, *rest):
    problem = problem_of(Options(*rest[:-1]), r1, r2, columns, labels, differentiable)
    problem = dispatch.choose(problem)
    backend, rows = dispatch.load(problem.backend), problem.rows
    saved = [r1.new_empty(shape, dtype=dtype) for dtype, shape in _made(backend, problem)]
    loss = r1.new_empty((rows,) if problem.reduction == "none" else (), dtype=problem.compute_dtype)
    logits = top1 = (0,)
    if problem.return_stats:
        logits, top1 = (problem.groups, rows), (problem.groups, 1 + problem.symmetric, rows)
    return (
        loss,
        *saved,
        r1.new_empty(logits, dtype=problem.statistics_dtype),
        r1.new_empty(top1, dtype=torch.bool),
    )


@torch.library.custom_op(
    "directclr_fast::loss_backward",
    mutates_args=(),
    schema=(
        f"(Tensor dloss, {_SAVED}, Tensor? columns, Tensor? learned, Tensor? labels, SymInt width, "
        f"ScalarType dtype, bool need1, bool need2, bool need_temperature, {_SCHEMA}) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def loss_backward(dloss, *args):
    if _makes_a_graph():  # which AOTAutograd would leave this op out of, without a word
        _no_second_derivative()
    saved, rest = Saved(*args[: len(Saved._fields)]), args[len(Saved._fields) :]
    columns, temperature, labels, width, dtype, *need = rest[:8]
    rows, candidates = saved.z1.shape[1], saved.z2.shape[1]
    options, device = Options(*rest[8:-1]), dloss.device
    taken, labelled = None if columns is None else columns.shape, labels is not None
    problem = Problem.of(options, rows, candidates, width, dtype, device, taken, labelled)
    problem = dispatch.choose(problem)
    grads = _of_stacked(problem, dloss, saved, columns, temperature, labels, tuple(need))
    return tuple(dloss.new_empty(0) if grad is None else grad for grad in grads)


@loss_backward.register_fake
def _(dloss, *args):
    saved, rest = Saved(*args[: len(Saved._fields)]), args[len(Saved._fields) :]
    _, temperature, _, width, dtype, need1, need2, need_temperature = rest[:8]

    def gradient(rows, need):
        return dloss.new_empty((rows, width), dtype=dtype) if need else dloss.new_empty(0)

    return (
        gradient(saved.z1.shape[1], need1),
        gradient(saved.z2.shape[1], need2),
        torch.empty_like(temperature) if need_temperature else dloss.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    r1, _, columns, temperature, labels, _, *rest = inputs
    ctx.save_for_backward(columns, temperature, labels, *output[1:-2])
    ctx.width, ctx.dtype, ctx.rest = r1.shape[1], r1.dtype, rest
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    nothing = (None,) * (2 + len(ctx.rest))
    if dloss is None:
        return None, None, None, None, *nothing
    columns, temperature, labels, *saved = ctx.saved_tensors
    need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    grads = loss_backward(
        dloss, *saved, columns, temperature, labels, ctx.width, ctx.dtype, *need, *ctx.rest
    )
    dr1, dr2, dtemperature = (grad if n else None for grad, n in zip(grads, need))
    return dr1, dr2, None, dtemperature, *nothing


def _makes_a_graph() -> bool:
    """Whether a backward pass with create_graph=True is what runs.

    Nothing says so to an op in a compiled backward pass, which AOTAutograd runs either as it is,
    with gradients recorded, or inside an ``autograd.Function``, which switches forward-mode off.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    keeps = torch._C._autograd._get_current_graph_task_keep_graph()
    return torch.is_grad_enabled() or (keeps and not torch._C._is_fwd_grad_enabled())


def _no_second_derivative(*_):
    raise NotImplementedError(
        "create_graph=True: the compiled loss has no second derivative; call it in eager mode, or "
        "compile it with backend='reference'"
    )


torch.library.register_autograd("directclr_fast::loss_backward", _no_second_derivative)
torch.library.register_autograd(
    "directclr_fast::loss_forward", _backward, setup_context=_setup_context
)
