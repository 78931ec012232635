r"""The loss over several processes: each holds a block of rows, together they hold the whole batch.

Process k of W has rows n_k of both views, N = sum n_k; row i's candidates are all N rows. It
computes the block row S_k = z1_k z2^T (n_k, N) of the similarities and nothing else:

.. code-block:: text

    forward   row sums of S_k are whole; its column sums are one of W parts:
              process b receives the W parts of its own n_b columns, log-sum-exp over them
              -> per-row losses and column log-sums, gathered: N numbers each
    backward  G_k from S_k and the gathered statistics; dz1_k = G_k z2 is whole,
              G_k^T z1_k (N, d) one of W parts of dz2, added up where its rows live

so a process does 8c/W operations (flops.distributed). The column parts travel as logarithms in
fp64, which is exact enough at every temperature and needs no common shift, and are added in the
order of ranks, so that nothing depends on arrival. Column maxima travel likewise, where any process
wants statistics. "both" adds the block rows z1_k z1^T and
z2_k z2^T, whose transposes another process computes: 20c/W.

How z2 reaches everyone is ``gather``:

======= ===================================================== ==============================
"all"   all-gather of z2; dz2 by one reduce-scatter           memory O(N d) in each process
"ring"  the blocks of z2 travel from process to process, the  memory O(N d / W)
        next one under way while one is used; so do their dz2
======= ===================================================== ==============================

Gradients: every process receives the derivative of the *sum over processes* of upstream x loss by
its own rows. Where all return the same mean (or sum) that is W times the derivative of one loss,
and DistributedDataParallel, which takes the mean, has exactly the gradient of the whole batch,
unequal blocks included. With ``reduction="none"`` the sum runs over everyone's own rows. A tensor
temperature receives, in every process alike, that derivative divided by W: the full one.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import dispatch, flops, ops, reference
from . import problem as problems
from .address import memory, unwrapped
from .backends.stages import Pair, Stages, Tops, _with_positive
from .problem import Problem

# "auto" takes the ring where the gathered views and dz2 would be larger: 3 % of an H200's memory, N
# = 2 million at d = 360 in fp16. Below, "all" is the faster by the model of docs/scaling.md.
ALL_GATHER_BYTES = 4 * 2**30
_MESSAGE_BYTES = 1024


def size(group) -> int:
    """Number of processes of ``group``: None (one), a ``ProcessGroup`` or "world".

    Raises ``TypeError`` or ``ValueError`` where it is none of these, torch.distributed is not
    initialised, or this process is not a member.
    """
    if group is None:
        return 1
    if isinstance(group, str) and group != "world":
        raise ValueError(f"group: expected None, a ProcessGroup or 'world', got {group!r}")
    if isinstance(group, SavedGroup):
        raise ValueError(
            f"group: expected a ProcessGroup of this job, got that of ranks {list(group.ranks)} "
            "of the job that saved the module; set options['group']"
        )
    if not dist.is_available() or not isinstance(group, str | dist.ProcessGroup):
        raise TypeError(
            f"group: expected None, a ProcessGroup or 'world', got {type(group).__name__}"
        )
    if not dist.is_initialized():
        raise ValueError("group: expected torch.distributed to be initialised, it is not")
    found = dist.get_world_size(None if group == "world" else group)
    if found < 1:
        raise ValueError("group: expected a group this process is a member of, it is not")
    return found


@dataclass(frozen=True)
class SavedGroup:
    """A process group as a module that holds one is pickled: what other processes know it by."""

    name: str
    ranks: tuple[int, ...]


class _Carried:
    """A process group inside the state of a module: copies hold it, pickles a ``SavedGroup``."""

    def __init__(self, group) -> None:
        self.group = group

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        if dist.is_initialized() and self.group is dist.group.WORLD:
            return str, ("world",)
        return SavedGroup, (self.group.group_name, tuple(dist.get_process_group_ranks(self.group)))


def portable(group):
    """``group`` as the state of a module may hold it; :func:`found` is its inverse."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        return group
    return _Carried(group)


def found(group):
    """The group of this process that ``portable`` spoke of, or the ``SavedGroup`` where none is."""
    if isinstance(group, _Carried):
        return group.group
    if isinstance(group, SavedGroup) and dist.is_available() and dist.is_initialized():
        for own in dist.distributed_c10d._world.pg_names:
            if SavedGroup(own.group_name, tuple(dist.get_process_group_ranks(own))) == group:
                return own
    return group


@dataclass(frozen=True)
class Call:
    """What the processes have agreed on. ``problem`` is the square one of this process's rows."""

    group: dist.ProcessGroup
    rank: int
    counts: tuple[int, ...]  # rows of each process
    problem: Problem
    ring: bool
    need: tuple[bool, bool, bool]  # whether any process wants a gradient of r1, r2, temperature

    @property
    def total(self) -> int:
        """N."""
        return sum(self.counts)

    def rows_of(self, rank: int) -> slice:
        """Where the rows of one process lie among all N."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    @property
    def own(self) -> slice:
        """Where the rows of this process lie among all N."""
        return self.rows_of(self.rank)


class State(NamedTuple):
    """What the backward pass of one column group needs, in the manner of ``stages.Saved``.

    z2, and for "both" z1, have all N rows where they were gathered, else n. col_lse (N,), empty for
    one direction; row_lse (n,), for "both" (N,).
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


def loss(
    group, even_batches: bool, check: Callable[[], problems.Call]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(loss, row_lse (G, n), col_lse (G, n) or (G, 0), logits of the positives (G, n), top1).

    top1 (G, directions, n) bool, None where no process wants statistics.

    What ``check`` raises in one process is told to the others, which would otherwise wait for it.
    A compiled caller breaks its graph here.
    """
    run = _loss
    if torch.compiler.is_compiling():  # as a decorator it would make every import load dynamo
        run = torch.compiler.disable(_loss)
    return run(group, even_batches, check)


def _loss(group, even_batches, check):
    group = dist.group.WORLD if group == "world" else group
    mine, refused = {}, None
    try:
        given = check()
        problem = _locally(given)
        mine = _message(problem, given)
    except Exception as error:
        if even_batches:
            raise
        refused = error
        mine = {"refused": str(error).encode("ascii", "replace").decode()[:300]}
    everyone = [mine] * dist.get_world_size(group) if even_batches else _exchange(group, mine)
    if refused is not None:
        raise refused
    _compare(everyone)

    counts = tuple(message["rows"] for message in everyone)
    need = tuple(any(flags) for flags in zip(*(message["need"] for message in everyone)))
    call = Call(
        group,
        dist.get_rank(group),
        counts,
        problem.replace(
            differentiable=any(need), return_stats=any(message["stats"] for message in everyone)
        ),
        _takes_ring(problem, sum(counts)),
        need,
    )
    # A process none of whose inputs wants a gradient still has its part in those of the others.
    anchor = given.r1.new_empty(0).requires_grad_() if any(need) else None
    return DistributedLoss.apply(*given[:4], anchor, call)


def _locally(given: problems.Call) -> Problem:
    """The problem of this process's own rows; raises what needs no other's word."""
    r1, r2, columns, temperature, options = given
    if r1.shape[0] != r2.shape[0]:
        raise ValueError(
            f"r2: expected {r1.shape[0]} rows like r1 over several processes, got {r2.shape[0]}"
        )
    if ops.transformed():
        raise NotImplementedError("torch.func and forward-mode AD run in one process only")
    for name, value in (("r1", r1), ("r2", r2), ("temperature", temperature)):
        if value is not None:
            memory(name, value)
    if options.negatives == "same":
        raise NotImplementedError(
            "negatives 'same' runs in one process only: it materialises the matrix"
        )
    problem = dispatch.choose(ops.problem_of(options, r1, r2, columns))
    if problem.backend == reference.NAME:
        raise NotImplementedError(
            "backend 'reference' runs in one process only: it materialises the matrix"
        )
    ops._scale(problem, temperature)  # a temperature on the host must be in range
    return problem


def _message(problem: Problem, given: problems.Call) -> dict:
    """What this process tells the others. Nothing in it waits for a device."""
    r1, r2, columns, temperature, _ = given
    grad = torch.is_grad_enabled()
    same = {
        "width": problem.width,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": problem.device_type,
        "columns": None,
    }
    same |= {name: getattr(problem, name) for name in problems.AGREED}
    if columns is not None:
        same["columns"] = list(columns.shape)
        if columns.device.type == "cpu":
            same["columns"].append(hashlib.sha1(columns.numpy().tobytes()).hexdigest()[:12])
    if temperature is not None:
        on_host = temperature.device.type == "cpu"
        same["temperature"] = ["tensor", float(temperature.detach()) if on_host else None]
    wanted = [grad and t is not None and t.requires_grad for t in (r1, r2, temperature)]
    message = {"rows": problem.rows, "need": wanted, "grad": grad, "stats": problem.return_stats}
    return message | {"same": same}


# Row counts are host numbers that sizes of tensors depend on, so they are exchanged between hosts:
# through the group itself where it takes CPU tensors, else (NCCL alone) through a Gloo group of the
# same processes made at the first call. Reading them from the device would stall it once per step;
# remembering earlier answers would hang where one process knows a shape and another does not.
_host_groups: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _host_group(group):
    if "cpu:" in dist.get_backend_config(group):
        return group
    if group not in _host_groups:
        if not dist.is_gloo_available():
            raise NotImplementedError(
                "group: exchanging row counts needs Gloo, which this PyTorch lacks; pass "
                "even_batches=True where every process has the same number of rows"
            )
        ranks = dist.get_process_group_ranks(group)
        _host_groups[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _host_groups[group]


def _exchange(group, mine: dict) -> list[dict]:
    """The message of every process, by one all-gather of a fixed number of bytes."""
    text = json.dumps(mine).encode().ljust(_MESSAGE_BYTES)
    size = dist.get_world_size(group) * _MESSAGE_BYTES
    with torch._C._DisableFuncTorch():  # a transform, which is refused by it, wraps what is made
        everyone = torch.empty(size, dtype=torch.uint8, device="cpu")
        own = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        dist.all_gather_into_tensor(everyone, own, group=_host_group(group))
        texts = [bytes(message.numpy()) for message in everyone.split(_MESSAGE_BYTES)]
    return [mine if other == text else json.loads(other) for other in texts]


def _compare(everyone: list[dict]) -> None:
    """Raises, in every process alike, where one has refused or they do not ask the same."""
    for rank, message in enumerate(everyone):
        if "refused" in message:
            raise ValueError(f"group: rank {rank} refused its arguments: {message['refused']}")
    first = everyone[0]["same"]
    for rank, message in enumerate(everyone):
        if message["same"] != first:
            name = next(name for name in first if message["same"][name] != first[name])
            raise ValueError(
                f"{name}: expected the same in every process, got {first[name]!r} on rank 0, "
                f"{message['same'][name]!r} on rank {rank}"
            )
    if any(any(m["need"]) for m in everyone) and not all(m["grad"] for m in everyone):
        raise ValueError(
            "group: expected gradients to be recorded in every process or in none, got both"
        )


def _takes_ring(problem: Problem, total: int) -> bool:
    """The same answer in every process: it depends on the options and on N alone."""
    if problem.gather != "auto":
        return problem.gather == "ring"
    pitch, dtype = dispatch.load(problem.backend).stages().packed(problem)
    held = flops.gathered_bytes(total, pitch, dtype.itemsize, problem.negatives, problem.groups)
    return held > ALL_GATHER_BYTES


class DistributedLoss(torch.autograd.Function):
    """(loss, *statistics) with gradients for r1, r2 and a tensor temperature."""

    @staticmethod
    def forward(ctx, r1, r2, columns, temperature, anchor, call):
        with torch.no_grad(), ops.plain(call.problem):
            scale = ops._scale(call.problem, temperature)
            value, states, *statistics, top1 = _forward(call, r1, r2, columns, scale)
        dispatch.note(call.problem.backend)
        if any(call.need):
            tensors = list(chain(*states))
            ctx.save_for_backward(columns, temperature, *tensors)
            ctx.call, ctx.made = call, [(v.shape, v.dtype, v.device) for v in tensors]
        ctx.mark_non_differentiable(*statistics)
        return value, *statistics, top1

    @staticmethod
    def backward(ctx, dloss, *_):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True: the loss over several processes has no second derivative"
            )
        columns, temperature, *tensors = ctx.saved_tensors
        if [(v.shape, v.dtype, v.device) for v in tensors] != ctx.made:  # a hook's doing
            raise ValueError(
                "saved tensors: expected shapes, dtypes and devices of the forward pass, got others"
            )
        for value in (columns, temperature, *tensors):
            if value is not None:
                memory("saved tensors", value)
        dloss, tensors = unwrapped("upstream", dloss), [v.contiguous() for v in tensors]
        fields = len(State._fields)
        states = [State(*tensors[i : i + fields]) for i in range(0, len(tensors), fields)]
        here = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        with ops.plain(ctx.call.problem):
            scale = ops._scale(ctx.call.problem, temperature)
            dr1, dr2, dtemperature = _backward(ctx.call, dloss, states, columns, scale, here)
        if dtemperature is not None:
            dtemperature = dtemperature.to(temperature)
        return dr1, dr2, None, dtemperature, None, None


def _forward(call: Call, r1: Tensor, r2: Tensor, columns: Tensor | None, scale):
    """Loss, one State per column group, and the statistics of this process's rows."""
    problem, wanted = call.problem, any(call.need)
    both = problem.negatives == "both"
    stages = dispatch.load(call.problem.backend).stages()
    indices = [None] if columns is None else columns
    states, tops, *sums = zip(*(_sums(call, stages, r1, r2, index, scale) for index in indices))
    logits, rest_row, rest_col, rest_self = (torch.stack(values) for values in sums)

    nll_row, row_lse = _with_positive(rest_row, logits)
    per_row, nothing = nll_row, row_lse[:0]
    nll_col, col_lse = row_lse.new_empty(2, problem.groups, 0)
    if problem.symmetric:
        rest_col = torch.logaddexp(_combine(call, rest_col, torch.logsumexp), rest_self)
        nll_col, col_lse = _with_positive(rest_col, logits)
        per_row = 0.5 * (nll_row + nll_col)
    per_row = per_row.sum(0)
    top1 = None
    if problem.return_stats:
        tops = Tops(*(None if of[0] is None else torch.stack(of) for of in zip(*tops)))
        if problem.symmetric:
            tops = tops._replace(col=_combine(call, tops.col, torch.amax))
        top1 = tops.top1(slice(None), nll_row, nll_col)

    reduced = problem.reduction != "none"
    all_losses, all_col, all_row = _gather_statistics(
        call,
        per_row[None] if reduced else nothing,
        col_lse if wanted and problem.symmetric else nothing,
        row_lse if wanted and both else nothing,
    )
    # Every process reduces the same numbers in the same order: the loss is the same bits in all.
    value = reference.reduce(problem, all_losses[0] if reduced else per_row)
    value = value.to(problem.compute_dtype)
    if not wanted:
        return value, [], row_lse, col_lse, logits, top1
    fields = zip(
        all_row if both else row_lse, all_col if len(all_col) else col_lse, nll_row, nll_col
    )
    states = [
        state._replace(row_lse=a, col_lse=b, nll_row=c, nll_col=d)
        for state, (a, b, c, d) in zip(states, fields)
    ]
    return value, states, row_lse, col_lse, logits, top1


def _sums(call: Call, stages: Stages, r1: Tensor, r2: Tensor, index: Tensor | None, scale):
    """One column group: its State without the log-sums; Tops, (N,) by column in part, or None; the
    positives' logits (n,); log-sums of the others (n,) by row, (N,) by column in part, (n,) over
    view 2's own rows ("both", else -inf)."""
    problem = call.problem
    z1, rnorm1 = stages.normalize(problem, r1, index)
    z2, rnorm2 = stages.normalize(problem, r2, index)
    logits = z1.new_empty(problem.rows, dtype=problem.statistics_dtype)
    rest_row = torch.full_like(logits, -torch.inf)
    rest_self = rest_row.clone()
    rest_col = rest_row.new_empty(call.total)
    tops = of_part = of_view1 = of_view2 = None
    if problem.return_stats:
        tops = of_part = Tops.none_yet(problem, z1, call.total)
        of_view1 = Tops(tops.row, None, None)
        of_view2 = problem.symmetric and Tops(tops.col[call.own], None, None)
    views = [z2] if problem.negatives == "cross" else [z2, z1]
    held = views if call.ring else [_gather(call, z) for z in views]
    for where, offset, *blocks in _blocks(call, held):
        part, alone = _part(call, where, offset)
        kept = stages.kept_buffer(part, z1)
        if problem.return_stats and problem.symmetric:
            of_part = tops._replace(col=tops.col[where])
        row, col = stages.sums(part, z1, blocks[0], scale, kept, logits, of_part)
        rest_row = torch.logaddexp(rest_row, row)
        if problem.symmetric:
            rest_col[where] = col
        if problem.negatives == "both":
            none = stages.kept_buffer(alone, z1)
            row, _ = stages.sums(alone, z1, blocks[1], scale, none, None, of_view1)
            rest_row = torch.logaddexp(rest_row, row)
            if problem.symmetric:
                row, _ = stages.sums(alone, z2, blocks[0], scale, none, None, of_view2)
                rest_self = torch.logaddexp(rest_self, row)
    later = [rest_row] * 4  # filled in when the column sums are whole
    state = State(held[1] if len(held) > 1 else z1, held[0], rnorm1, rnorm2, *later, kept)
    return state, tops, logits, rest_row, rest_col, rest_self


def _backward(call: Call, dloss: Tensor, states: list[State], columns, scale, here):
    """Gradients of (r1, r2, temperature) where ``here``, this process's own wishes, says so.

    What is exchanged follows ``call.need`` alone, so all processes take part in the same order.
    """
    problem = call.problem
    both = problem.negatives == "both"
    stages = dispatch.load(call.problem.backend).stages()
    dloss = dloss.to(problem.statistics_dtype)
    if problem.reduction == "none":
        weights = _gather(call, dloss.contiguous())
    else:
        weights = _total(call, dloss).expand(call.total)
        if problem.reduction == "mean":
            weights = weights / call.total
    # The factor a of dz = a G z joins the weights, where it costs O(N).
    weights = weights * (0.5 * scale if problem.symmetric else scale)
    # sum_i z1_i . dz1_i is the temperature's gradient for "cross"; "both" needs either view's.
    want = (here[0] or call.need[2], call.need[1] or (call.need[2] and both))
    dr1, dr2 = (
        stages.gradient_buffer(problem, problem.rows, dloss.device) if wanted else None
        for wanted in here[:2]
    )
    dot = 0.0
    for state, index in zip(states, [None] if columns is None else columns):
        dz1, dz2 = _products(call, stages, state, weights, scale, want)
        if dz1 is not None:
            z1 = _own_rows(call, state.z1)
            dot1 = stages.finish(problem, z1, state.rnorm1, dz1, dr1, index)
            dot = dot + (dot1 / 2 if both else dot1)
        if dz2 is not None and (dr2 is not None or (call.need[2] and both)):
            z2 = _own_rows(call, state.z2)
            dot2 = stages.finish(problem, z2, state.rnorm2, dz2, dr2, index)
            dot = dot + (dot2 / 2 if both else 0.0)
    dtemperature = None
    if call.need[2]:
        # A dot is a dloss/da, and da/dtemperature = -a^2.
        dot = torch.as_tensor(dot, dtype=dloss.dtype, device=dloss.device)
        dtemperature = _total(call, dot) * (-scale / len(call.counts))
    return dr1, dr2, dtemperature if here[2] else None


def _products(call: Call, stages: Stages, state: State, weights: Tensor, scale, want):
    """dz1 and dz2 of this process's rows in one column group, None where ``want`` says so."""
    symmetric, both = call.problem.symmetric, call.problem.negatives == "both"
    z1, z2 = _own_rows(call, state.z1), _own_rows(call, state.z2)
    w, row_lse = weights[call.own], _own_rows(call, state.row_lse)
    diagonal = w * torch.expm1(-state.nll_row)
    if symmetric:
        diagonal = diagonal + w * torch.expm1(-state.nll_col)
    v = col_lse = dz1 = self2 = None
    home = _Homeward(call)
    for where, offset, *blocks in _blocks(call, [state.z2, state.z1] if both else [state.z2]):
        part, alone = _part(call, where, offset)
        if symmetric:
            v, col_lse = weights[where], state.col_lse[where]
        pair = Pair(w, row_lse, v, col_lse, diagonal)
        part1, part2 = stages.products(part, z1, blocks[0], scale, pair, state.kept, want)
        dz1 = _plus(dz1, part1)
        if part2 is not None:
            home.add(part2)
        if not both:
            continue
        # (H + H^T)_k z: rows of H^T are columns of everyone's H, whose log-sums are here.
        for view, z, block, lse in (
            (0, z1, blocks[1], state.row_lse),
            (1, z2, blocks[0], state.col_lse),
        ):
            if want[view] and (view == 0 or symmetric):
                pair = Pair(w, lse[call.own], weights[where], lse[where], torch.zeros_like(w))
                none = stages.kept_buffer(alone, z)
                alike = alone.replace(symmetric=True)
                found, _ = stages.products(alike, z, block, scale, pair, none, (True, False))
                if view == 0:
                    dz1 = _plus(dz1, found)
                else:
                    self2 = _plus(self2, found)
    return dz1, _plus(home.sum(), self2)


def _plus(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part)


def _own_rows(call: Call, whole: Tensor) -> Tensor:
    """The rows of this process of a tensor that may hold those of all."""
    return whole if whole.shape[0] == call.problem.rows else whole[call.own]


def _part(call: Call, where: slice, offset: int) -> tuple[Problem, Problem]:
    """This process's rows against the candidates ``where``: the pair of views, and a view with
    itself (sums by row only, nothing kept)."""
    part = call.problem.replace(
        candidates=where.stop - where.start,
        row_offset=offset,
        negatives="cross",
        differentiable=call.problem.differentiable and not call.ring,
    )
    return part, part.replace(symmetric=False, differentiable=False)


def _blocks(call: Call, held: list[Tensor]) -> Iterator[tuple]:
    """Yields (where, row_offset, *blocks): candidates ``where`` among all N, and their tensors.

    "all": once, all of them. "ring": W times, this process's own first, then its predecessor's and
    so on, each with the next under way. A block without this process's positives has its
    ``row_offset`` at its end, where no row's positive is left out.
    """
    if not call.ring:
        yield slice(0, call.total), call.own.start, *held
        return
    size = len(call.counts)
    for step in range(size):
        owner = (call.rank - step) % size
        arriving, works = [], []
        if step + 1 < size:
            coming = call.counts[owner - 1]
            arriving = [z.new_empty(coming, *z.shape[1:]) for z in held]
            works = _shift(call, held, arriving)
        yield call.rows_of(owner), 0 if step == 0 else call.counts[owner], *held
        for work in works:
            work.wait()
        held = arriving


class _Homeward:
    """The sum of everyone's parts of dz2, in the process whose rows they are.

    "all": one reduce-scatter. "ring": a block's sum follows the block, one step behind, and is
    under way while the next part is computed; the owner adds first, then its successors in order.
    """

    def __init__(self, call: Call) -> None:
        self.call, self.step = call, 0
        self.sent = self.arriving = None
        self.works = []

    def add(self, part: Tensor) -> None:
        """Adds this process's part to the block that :func:`_blocks` has just yielded."""
        call = self.call
        if not call.ring:
            self.arriving = _reduce_scatter(call, part)
            return
        self.sent = part if self.step == 0 else self.sum().add_(part)
        owner = (call.rank - self.step) % len(call.counts)
        self.arriving = part.new_empty(call.counts[owner - 1], *part.shape[1:])
        self.works = _shift(call, [self.sent], [self.arriving])
        self.step += 1

    def sum(self) -> Tensor | None:
        """What has arrived: after the last part, the whole sum of this process's own rows."""
        for work in self.works:
            work.wait()
        return self.arriving


def _shift(call: Call, leaving: list[Tensor], arriving: list[Tensor]) -> list:
    """Starts sending to the next process and receiving from the one before."""
    size = len(call.counts)
    after, before = (call.rank + 1) % size, (call.rank - 1) % size
    sends = [dist.P2POp(dist.isend, t, group=call.group, group_peer=after) for t in leaving]
    receives = [dist.P2POp(dist.irecv, t, group=call.group, group_peer=before) for t in arriving]
    return dist.batch_isend_irecv(sends + receives)


def _gather(call: Call, x: Tensor) -> Tensor:
    """(n, ...) of every process to (N, ...) in all."""
    most = max(call.counts)
    padded = x
    if x.shape[0] < most:
        padded = torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
    whole = x.new_empty(most * len(call.counts), *x.shape[1:])
    dist.all_gather_into_tensor(whole, padded, group=call.group)
    if min(call.counts) == most:
        return whole
    return torch.cat([rows[:count] for rows, count in zip(whole.split(most), call.counts)])


def _reduce_scatter(call: Call, x: Tensor) -> Tensor:
    """(N, ...) in every process to the sum over processes of this one's rows, (n, ...)."""
    most = max(call.counts)
    if min(call.counts) < most:
        padded = x.new_zeros(len(call.counts), most, *x.shape[1:])
        for into, rows in zip(padded, x.split(call.counts)):
            into[: len(rows)] = rows
        x = padded.flatten(0, 1)
    found = x.new_empty(most, *x.shape[1:])
    dist.reduce_scatter_tensor(found, x, group=call.group)
    return found[: call.problem.rows]


def _combine(call: Call, parts: Tensor, join: Callable) -> Tensor:
    """(G, N) log-sums or maxima of everyone's parts to those of this process's columns, (G, n)."""
    size, rows = len(call.counts), call.problem.rows
    leaving = parts.T.contiguous()
    arriving = leaving.new_empty(size * rows, parts.shape[0])
    dist.all_to_all_single(arriving, leaving, [rows] * size, list(call.counts), group=call.group)
    return join(arriving.view(size, rows, -1), 0).T.contiguous()


def _gather_statistics(call: Call, *values: Tensor) -> list[Tensor]:
    """(K, n) tensors, K >= 0, to (K, N), by one collective."""
    told = torch.cat(values)
    if not len(told):
        return list(values)
    whole = _gather(call, told.T.contiguous())
    return [rows.T.contiguous() for rows in whole.split([len(v) for v in values], 1)]


def _total(call: Call, value: Tensor) -> Tensor:
    """Sum of everyone's 0-dim ``value``, the same bits in all."""
    everyone = value.new_empty(len(call.counts))
    dist.all_gather_into_tensor(everyone, value.reshape(1), group=call.group)
    return everyone.sum()
