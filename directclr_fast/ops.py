"""One logical op per direction, registered with torch.library: schema, fake, autograd.

``directclr_fast::loss_forward`` and ``directclr_fast::loss_backward`` are what compiled graphs
hold. Eager calls run the same two bodies through :class:`Loss`, an ``autograd.Function``, which
spares them the dispatcher and adds double backward. Backends are bodies under both.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, reference
from .address import dispatched, readable, unwrapped
from .backends import stages
from .backends.stages import Saved
from .problem import SCHEMA, Call, Options, Problem, check_columns
from .products import fp32_products, may_round

# Compiled graphs are cached on disk with the shapes of what `loss_forward` saves and with what was
# traced around it: raised by one whenever either changes.
_VERSION = 5
_SCHEMA = f"{SCHEMA}, int version"
_READ = " ".join(("upstream", "columns", "temperature", *Saved._fields))
_SAVED = ", ".join(f"Tensor {name}" for name in Saved._fields)


def arguments(options: Options) -> tuple:
    """The last arguments of both ops."""
    return *options.values(), _VERSION


def problem_of(
    options: Options, r1: Tensor, r2: Tensor, columns: Tensor | None, differentiable: bool = True
) -> Problem:
    """The record of a forward call on these tensors."""
    (rows, width), device = r1.shape, r1.device.type
    return Problem.of(options, rows, r2.shape[0], width, r1.dtype, device, columns, differentiable)


def plain(problem: Problem):
    """A context without autocast and, for precision="highest", without reduced fp32 products.

    "auto" leaves torch's own float32 matmul setting in force.
    """
    stack = contextlib.ExitStack()
    kind = problem.device_type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        stack.enter_context(torch.autocast(kind, enabled=False))
    if problem.precision == "highest" and may_round(kind):
        stack.enter_context(fp32_products(kind, "ieee"))
    return stack


def _scale(problem: Problem, temperature: Tensor | None):
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
    problem: Problem, r1: Tensor, r2: Tensor, columns: Tensor | None, temperature: Tensor | None
) -> tuple[Tensor, Saved, Tensor | None]:
    """Loss (scalar or (M,)), what the backward pass needs, and top-1 where that is asked for.

    ``problem`` names its backend.
    """
    readable("r1 r2 columns temperature", r1, r2, columns, temperature)
    backend = dispatch.load(problem.backend)
    with torch.no_grad(), plain(problem):
        scale = _scale(problem, temperature)
        result = stages.forward(backend.stages(), problem, r1, r2, columns, scale)
    dispatch.note(problem.backend)
    return result


def backward_body(
    problem: Problem,
    dloss: Tensor,
    saved: Saved,
    columns: Tensor | None,
    temperature: Tensor | None,
    need: tuple[bool, bool, bool],
    untouched: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dr1, dr2, dtemperature), None where not needed.

    ``untouched`` says that ``saved`` lies where the forward pass left it, which spares a look at
    each: small batches feel that.
    """
    dloss = unwrapped("upstream", dloss)
    readable(_READ, dloss, columns, temperature, *(() if untouched else saved))
    backend = dispatch.load(problem.backend).stages()
    if not untouched:
        saved = _as_saved(backend, problem, dloss, columns, saved)
    with torch.no_grad(), plain(problem):
        scale = _scale(problem, temperature)
        dr1, dr2, dtemperature = stages.backward(
            backend, problem, dloss, saved, columns, scale, need
        )
    if dtemperature is not None:
        dtemperature = torch.as_tensor(
            dtemperature, dtype=temperature.dtype, device=temperature.device
        )
    return dr1, dr2, dtemperature


def _as_saved(
    backend: stages.Stages, problem: Problem, dloss: Tensor, columns: Tensor | None, saved: Saved
) -> Saved:
    """The tensors as the forward pass made them, contiguous: a hook may have unpacked others."""
    g, m, n = problem.groups, problem.rows, problem.candidates
    of_col, of_own = (n, m) if problem.symmetric else (0, 0)
    row, packed = backend.packed(problem, saved.z1)
    shapes = (
        *((g, m, row), (g, n, row), (g, m), (g, n), (g, m), (g, m), (g, of_col), (g, m)),
        *((g, of_own), (g, *backend.kept_shape(problem))),
    )
    norm, statistic = problem.compute_dtype, problem.statistics_dtype
    dtypes = (packed, packed, norm, norm, *(statistic,) * 5, packed)
    upstream = (m,) if problem.reduction == "none" else ()
    if (
        dloss.shape != upstream
        or tuple(value.shape for value in saved) != shapes
        or tuple(value.dtype for value in saved) != dtypes
        or any(value.device != dloss.device for value in saved)
        or (columns is not None and columns.device != dloss.device)
    ):
        got = (f"{k} {tuple(v.shape)} {v.dtype} {v.device}" for k, v in saved._asdict().items())
        raise ValueError(
            f"saved tensors: expected those of {m} x {n} rows in {g} groups and an upstream "
            f"gradient {upstream} on {dloss.device}, got {', '.join(got)}, upstream "
            f"{tuple(dloss.shape)}, columns on {None if columns is None else columns.device}"
        )
    return Saved(*(value.contiguous() for value in saved))


class Loss(torch.autograd.Function):
    """The eager route: (loss, *statistics) with gradients for r1, r2 and a tensor temperature."""

    @staticmethod
    def forward(ctx, r1, r2, columns, temperature, problem):
        loss, saved, top1 = forward_body(problem, r1, r2, columns, temperature)
        if problem.differentiable:
            # The views are for a backward pass with create_graph=True only, and what wants no
            # gradient is none of autograd's business: the formula would not have kept it.
            views = [r if n else None for r, n in zip((r1, r2), ctx.needs_input_grad)]
            ctx.save_for_backward(*views, columns, temperature, *saved)
            ctx.constants = [
                None if n else (r, None if r.is_inference() else r._version)
                for r, n in zip((r1, r2), ctx.needs_input_grad)
            ]
            ctx.problem = problem
            ctx.places = _places([columns, *saved])
        statistics = (saved.row_lse, saved.col_lse, saved.positives)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        return loss, *statistics, top1

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 5
        r1, r2, columns, temperature, *saved = ctx.saved_tensors
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        if torch.is_grad_enabled():
            r1 = _unchanged("r1", ctx.constants[0]) if r1 is None else r1
            r2 = _unchanged("r2", ctx.constants[1]) if r2 is None else r2
            grads = _differentiable_gradients(
                ctx.problem, dloss, r1, r2, columns, temperature, need
            )
        else:
            untouched = ctx.places == _places([columns, *saved])
            grads = backward_body(
                ctx.problem, dloss, Saved(*saved), columns, temperature, need, untouched
            )
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.constants = None  # as the saved tensors
        return grads[0], grads[1], None, grads[2], None


def _places(tensors) -> list[tuple]:
    """Where tensors lie and how they are read there: what a hook can change about one."""
    return [
        (v.data_ptr(), v.dtype, v.shape, v.stride(), v.is_neg()) for v in tensors if v is not None
    ]


def _unchanged(name: str, kept: tuple[Tensor, int | None]) -> Tensor:
    """What autograd does for the tensors it saves. Inference tensors count no versions."""
    r, version = kept
    if version is not None and r._version != version:
        raise RuntimeError(
            f"{name}: needed unchanged for create_graph=True, but it has been modified by an "
            f"inplace operation: it is at version {r._version}, expected {version}"
        )
    return r


def _differentiable_gradients(problem, dloss, r1, r2, columns, temperature, need):
    """Gradients that carry a graph (create_graph=True): through the reference formula, in N^2."""
    with torch.enable_grad():
        # New nodes, so that loss(r, r) gets two gradients and not their sum twice.
        inputs = [value.view_as(value) if n else value for value, n in zip((r1, r2), need[:2])]
        inputs.append(temperature.view_as(temperature) if need[2] else temperature)
        with plain(problem):
            loss = reference.loss(problem, inputs[0], inputs[1], columns, inputs[2])[0]
            wanted = [value for value, n in zip(inputs, need) if n]
            grads = iter(torch.autograd.grad(loss, wanted, dloss, create_graph=True))
    return [next(grads) if n else None for n in need]


def run(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss, row_lse, col_lse, positive logits, top1) by the registered op, eagerly, or by the
    formula. The last two are None unless statistics are asked for: they are launches more."""
    r1, r2, index, temperature, options = call
    # Asked here as well: a function of its own may be compiled where this one is not.
    compiling, inside_transform = torch.compiler.is_compiling(), transformed()
    if compiling or (not inside_transform and dispatched(r1, r2, index, temperature)):
        if options.backend != reference.NAME and options.negatives != "same":
            if inside_transform:  # without fullgraph=True the call then runs outside the graph
                raise NotImplementedError(
                    "torch.func or forward-mode AD inside a compiled graph: expected "
                    "backend='reference', got another; or leave the transform out of the graph"
                )
            outputs = loss_forward(r1, r2, index, temperature, True, *arguments(options))
            return _statistics(outputs, temperature, options)
        if index is not None:
            index = checked_columns(index, r1.shape[1])
        return reference.loss(problem_of(options, r1, r2, index), r1, r2, index, temperature)
    wanted = any(v is not None and v.requires_grad for v in (r1, r2, temperature))
    differentiable = inside_transform or (wanted and torch.is_grad_enabled())
    problem = dispatch.choose(problem_of(options, r1, r2, index, differentiable))
    if problem.backend == reference.NAME:
        readable("r1 r2 columns temperature", r1, r2, index, temperature)
        with plain(problem):
            result = reference.loss(problem, r1, r2, index, temperature)
        dispatch.note(problem.backend)
        return result
    if inside_transform:
        outputs = TransformedLoss.apply(r1, r2, index, temperature, problem)
        return _statistics(outputs, temperature, options)
    loss, row_lse, col_lse, cosines, top1 = Loss.apply(r1, r2, index, temperature, problem)
    logits = _logits(cosines, temperature, options) if options.return_stats else None
    return loss, row_lse, col_lse, logits, top1


def _statistics(outputs, temperature: Tensor | None, options: Options):
    """What :func:`run` returns, of (loss, *Saved, top1)."""
    loss, *saved, top1 = outputs
    saved = Saved(*saved)
    logits = _logits(saved.positives, temperature, options) if options.return_stats else None
    return loss, saved.row_lse, saved.col_lse, logits, top1


def _logits(cosines: Tensor, temperature: Tensor | None, options: Options) -> Tensor:
    if temperature is None:
        return cosines.detach() / options.temperature
    return cosines.detach() / temperature.detach().to(cosines)


def transformed() -> bool:
    """Whether ``torch.func`` or forward-mode AD is at work, which :class:`Loss` is not made for."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class TransformedLoss(torch.autograd.Function):
    """(loss, *Saved, top1) by the same bodies under ``torch.func`` and forward-mode AD.

    vmap takes one call after the other. A derivative of the gradient goes through the reference
    formula, in N^2; so does nothing else.
    """

    @staticmethod
    def forward(r1, r2, columns, temperature, problem):
        return _outputs(forward_body(problem, r1, r2, columns, temperature))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.problem = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:-1])
        ctx.save_for_forward(*tensors, *output[1:-1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 5
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        tensors, saved = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        grads = iter(TransformedGradient.apply(dloss, *tensors, need, ctx.problem, *saved))
        dr1, dr2, dtemperature = (next(grads) if n else None for n in need)
        return dr1, dr2, None, dtemperature, None

    @staticmethod
    def jvp(ctx, dr1, dr2, _, dtemperature, *__):
        if ctx.problem.reduction == "none":
            raise NotImplementedError(
                "forward-mode AD: expected reduction 'mean' or 'sum', got 'none', of which "
                "backend='reference' has the derivative"
            )
        tangents = [dr1, dr2, dtemperature]
        need = tuple(tangent is not None for tangent in tangents)
        tensors, saved = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        like = saved[Saved._fields.index("rnorm1")]
        one = torch.ones((), dtype=like.dtype, device=like.device)
        grads = TransformedGradient.apply(one, *tensors, need, ctx.problem, *saved)
        tangents = [tangent for tangent in tangents if tangent is not None]
        total = sum((g.to(one.dtype) * t.to(one.dtype)).sum() for g, t in zip(grads, tangents))
        return total, *(None,) * (len(saved) + 1)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _one_by_one(TransformedLoss, info, in_dims, args)


class TransformedGradient(torch.autograd.Function):
    """Those of (r1, r2, temperature) that ``need`` says, a tuple."""

    @staticmethod
    def forward(dloss, r1, r2, columns, temperature, need, problem, *saved):
        grads = backward_body(problem, dloss, Saved(*saved), columns, temperature, need)
        return tuple(grad for grad in grads if grad is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.need, ctx.problem = inputs[:7]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *upstream):
        problem, function, primals = _formula_of(ctx)
        with plain(problem):
            found = iter(torch.func.vjp(function, *primals)[1](upstream))
        ddloss, ddr1, ddr2 = next(found), next(found), next(found)
        return ddloss, ddr1, ddr2, None, next(found, None), *(None,) * (2 + len(Saved._fields))

    @staticmethod
    def jvp(ctx, dloss, dr1, dr2, _, dtemperature, *__):
        problem, function, primals = _formula_of(ctx)
        tangents = tuple(
            torch.zeros_like(primal) if tangent is None else tangent
            for primal, tangent in zip(primals, (dloss, dr1, dr2, dtemperature))
        )
        with plain(problem):
            return torch.func.jvp(function, primals, tangents)[1]

    @staticmethod
    def vmap(info, in_dims, *args):
        return _one_by_one(TransformedGradient, info, in_dims, args)


def _formula_of(ctx):
    """(problem, function, its arguments): the formula's gradients by dloss, r1, r2, temperature."""
    dloss, r1, r2, columns, temperature = ctx.saved_tensors
    problem, need = ctx.problem, ctx.need

    def gradients(dloss, r1, r2, temperature=None):
        inputs = (r1, r2, temperature)

        def loss(*wanted):
            wanted = iter(wanted)
            a, b, t = (next(wanted) if n else value for value, n in zip(inputs, need))
            return reference.loss(problem, a, b, columns, t)[0]

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


def _outputs(found: tuple[Tensor, Saved, Tensor | None]) -> tuple[Tensor, ...]:
    """(loss, *Saved, top1), tensors all: top1 is empty where nobody asks for it."""
    loss, saved, top1 = found
    if top1 is None:
        top1 = loss.new_empty(0, dtype=torch.bool)
    return loss, *saved, top1


@torch.library.custom_op(
    "directclr_fast::loss_forward",
    mutates_args=(),
    schema=(
        "(Tensor r1, Tensor r2, Tensor? columns, Tensor? learned, bool differentiable, "
        f"{_SCHEMA}) -> ({', '.join(['Tensor'] * (2 + len(Saved._fields)))})"
    ),
)
def loss_forward(r1, r2, columns, temperature, differentiable, *rest):
    options = Options(*rest[:-1])
    _check_inputs(r1, r2, columns, options)
    r1, r2 = r1.resolve_neg(), r2.resolve_neg()
    problem = dispatch.choose(problem_of(options, r1, r2, columns, differentiable))
    return _outputs(forward_body(problem, r1, r2, columns, temperature))


# Negated views come as they are: PyTorch's own fallback would resolve them while tracing, by a copy
# for which Inductor writes code that forgets the negation.
_library = torch.library.Library("directclr_fast", "FRAGMENT")
_library.impl("loss_forward", torch.library.fallthrough_kernel, "Negative")


def _check_inputs(r1: Tensor, r2: Tensor, columns: Tensor | None, options: Options) -> None:
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
def _(r1, r2, columns, temperature, differentiable, *rest):
    problem = dispatch.choose(problem_of(Options(*rest[:-1]), r1, r2, columns, differentiable))
    backend = dispatch.load(problem.backend).stages()
    groups, m, n = problem.groups, problem.rows, problem.candidates

    def stat(*shape):
        return r1.new_empty(shape, dtype=problem.statistics_dtype)

    def compute(*shape):
        return r1.new_empty(shape, dtype=problem.compute_dtype)

    packed, dtype = backend.packed(problem)
    columns_of = n if problem.symmetric else 0
    saved = Saved(
        z1=r1.new_empty((groups, m, packed), dtype=dtype),
        z2=r1.new_empty((groups, n, packed), dtype=dtype),
        rnorm1=compute(groups, m),
        rnorm2=compute(groups, n),
        positives=stat(groups, m),
        row_lse=stat(groups, m),
        col_lse=stat(groups, columns_of),
        nll_row=stat(groups, m),
        nll_col=stat(groups, m if problem.symmetric else 0),
        kept=r1.new_empty((groups, *backend.kept_shape(problem)), dtype=dtype),
    )
    loss = compute(*((m,) if problem.reduction == "none" else ()))
    top1 = (groups, 1 + problem.symmetric, m) if problem.return_stats else (0,)
    return loss, *saved, r1.new_empty(top1, dtype=torch.bool)


@torch.library.custom_op(
    "directclr_fast::loss_backward",
    mutates_args=(),
    schema=(
        f"(Tensor dloss, {_SAVED}, Tensor? columns, Tensor? learned, SymInt width, "
        f"ScalarType dtype, bool need1, bool need2, bool need_temperature, {_SCHEMA}) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def loss_backward(dloss, *args):
    if _makes_a_graph():  # which AOTAutograd would leave this op out of, without a word
        _no_second_derivative()
    saved, rest = Saved(*args[: len(Saved._fields)]), args[len(Saved._fields) :]
    columns, temperature, width, dtype, *need = rest[:7]
    rows, candidates = saved.z1.shape[1], saved.z2.shape[1]
    options, device = Options(*rest[7:-1]), dloss.device.type
    problem = Problem.of(options, rows, candidates, width, dtype, device, columns)
    problem = dispatch.choose(problem)
    grads = backward_body(problem, dloss, saved, columns, temperature, tuple(need))
    return tuple(dloss.new_empty(0) if grad is None else grad for grad in grads)


@loss_backward.register_fake
def _(dloss, *args):
    saved, rest = Saved(*args[: len(Saved._fields)]), args[len(Saved._fields) :]
    _, temperature, width, dtype, need1, need2, need_temperature = rest[:7]

    def gradient(rows, need):
        return dloss.new_empty((rows, width), dtype=dtype) if need else dloss.new_empty(0)

    return (
        gradient(saved.z1.shape[1], need1),
        gradient(saved.z2.shape[1], need2),
        torch.empty_like(temperature) if need_temperature else dloss.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    r1, _, columns, temperature, _, *rest = inputs
    ctx.save_for_backward(columns, temperature, *output[1:-1])
    ctx.width, ctx.dtype, ctx.rest = r1.shape[1], r1.dtype, rest
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    nothing = (None,) * (1 + len(ctx.rest))
    if dloss is None:
        return None, None, None, None, *nothing
    columns, temperature, *saved = ctx.saved_tensors
    need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    grads = loss_backward(
        dloss, *saved, columns, temperature, ctx.width, ctx.dtype, *need, *ctx.rest
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
