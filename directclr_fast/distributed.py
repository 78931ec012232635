"""The loss over several processes: what they agree on before a step, and how a group is named.

Each process holds a block of rows, together they hold the whole batch. Hosts exchange row counts,
options and who needs gradients, so that a mismatch or one process's bad argument is an error in all
of them. Then the step runs in a :class:`world.Gathered` or a :class:`world.Ring`.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import dispatch, flops, ops
from .address import memory
from .backends.base import Statistics
from .problem import AGREED, Call, Problem
from .world import Gathered, Ring, all_gather

# "auto" takes the ring where the gathered views and dz2 would be larger: 3 % of an H200's memory, N
# = 2 million at d = 360 in fp16. "all" sends half the bytes (docs/scaling.md).
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
    processes = dist.get_world_size(None if group == "world" else group)
    if processes < 1:
        raise ValueError("group: expected a group this process is a member of, it is not")
    return processes


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
    """``group`` as the state of a module may hold it; :func:`restored` is its inverse."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        return group
    return _Carried(group)


def restored(group):
    """The group of this process that a ``portable`` one names; the ``SavedGroup`` if none is."""
    if isinstance(group, _Carried):
        return group.group
    if isinstance(group, SavedGroup) and dist.is_available() and dist.is_initialized():
        for own in dist.distributed_c10d._world.pg_names:
            if SavedGroup(own.group_name, tuple(dist.get_process_group_ranks(own))) == group:
                return own
    return group


def loss(group, even_batches: bool, check: Callable[[], Call]) -> tuple[Tensor, Statistics | None]:
    """Loss, and the statistics of this process's rows where it asks for them.

    An error of ``check`` in one process is sent to the others, which would otherwise wait for it.
    A compiled caller breaks its graph here.
    """
    run = _loss
    if torch.compiler.is_compiling():  # as a decorator it would make every import load dynamo
        run = torch.compiler.disable(_loss)
    return run(group, even_batches, check)


def _loss(group, even_batches, check):
    group = dist.group.WORLD if group == "world" else group
    own, refused = {}, None
    try:
        given = check()
        problem = _locally(given)
        own = _message(problem, given)
    except Exception as error:
        if even_batches:
            raise
        refused = error
        own = {"refused": str(error).encode("ascii", "replace").decode()[:300]}
    everyone = [own] * dist.get_world_size(group) if even_batches else _exchange(group, own)
    if refused is not None:
        raise refused
    _compare(everyone)

    counts = tuple(message["rows"] for message in everyone)
    need = tuple(any(flags) for flags in zip(*(message["need"] for message in everyone)))
    problem = problem.replace(
        differentiable=any(need), return_stats=any(message["stats"] for message in everyone)
    )
    kind = Ring if _takes_ring(problem, sum(counts)) else Gathered
    world = kind(group, dist.get_rank(group), counts, need)
    # Every process must run the backward pass, even if none of its own inputs needs a gradient.
    anchor = given.r1.new_empty(0).requires_grad_() if any(need) else None
    value, *statistics = ops.Loss.apply(*given[:5], anchor, problem, world)
    return value, Statistics(*statistics) if given.options.return_stats else None


def _locally(given: Call) -> Problem:
    """The problem of this process's own rows; raises every error that it can see alone."""
    r1, r2, columns, temperature, labels, options = given
    if r1.shape[0] != r2.shape[0]:
        raise ValueError(
            f"r2: expected {r1.shape[0]} rows like r1 over several processes, got {r2.shape[0]}"
        )
    if ops.transformed():
        raise NotImplementedError("torch.func and forward-mode AD run in one process only")
    for name, value in (("r1", r1), ("r2", r2), ("temperature", temperature), ("labels", labels)):
        if value is not None:
            memory(name, value)
    if options.negatives == "same":
        raise NotImplementedError(
            "negatives 'same' runs in one process only: it materialises the matrix"
        )
    problem = dispatch.choose(ops.problem_of(options, r1, r2, columns, labels))
    if problem.backend == "reference":
        raise NotImplementedError(
            "backend 'reference' runs in one process only: it materialises the matrix"
        )
    ops.scale_of(problem, temperature)  # a temperature on the host must be in range
    return problem


def _message(problem: Problem, given: Call) -> dict:
    """What this process sends to the others. Nothing here waits for a device."""
    r1, r2, columns, temperature, *_ = given
    grad = torch.is_grad_enabled()
    same = {
        "width": problem.width,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "device": problem.device_type,
        "columns": None,
        "labels": "given" if problem.labelled else None,
    }
    same |= {name: getattr(problem, name) for name in AGREED}
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
# through the group itself where it takes CPU tensors, else (NCCL alone) through Gloo between the
# same processes, connected at the first call. Reading them from the device would stall it once per
# step; remembering earlier answers would hang where one process knows a shape and another does not.
_hosts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_connected: Counter[str] = Counter()


def _host(group):
    """Gloo of the processes of ``group``, or the group where it takes CPU tensors."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    if group not in _hosts:
        if not dist.is_gloo_available():
            raise NotImplementedError(
                "group: exchanging row counts needs Gloo, which this PyTorch lacks; pass "
                "even_batches=True where every process has the same number of rows"
            )
        # Not new_group(use_local_synchronization=True): up to PyTorch 2.13 each member names such a
        # group by how many groups it is in, and where these differ they wait for each other for
        # ever. All members know ``group`` by one name, and by how often that was connected.
        name = f"directclr_fast/{group.group_name}"
        store = dist.PrefixStore(
            f"{name}/{_connected[name]}", dist.distributed_c10d._get_default_store()
        )
        _connected[name] += 1
        # Waits as long as the group does, not for Gloo's half hour.
        limit = group._get_backend(next(iter(group._device_types))).options._timeout
        _hosts[group] = dist.ProcessGroupGloo(
            store, dist.get_rank(group), dist.get_world_size(group), limit
        )
    return _hosts[group]


def _exchange(group, own: dict) -> list[dict]:
    """The message of every process, by one all-gather of a fixed number of bytes."""
    text = json.dumps(own).encode().ljust(_MESSAGE_BYTES)
    size = dist.get_world_size(group) * _MESSAGE_BYTES
    with torch._C._DisableFuncTorch():  # a transform, refused after this, would wrap the tensors
        everyone = torch.empty(size, dtype=torch.uint8, device="cpu")
        sent = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        host = _host(group)
        if host is group:
            all_gather(everyone, sent, group=group)
        else:
            host._allgather_base(everyone, sent).wait()
        texts = [bytes(message.numpy()) for message in everyone.split(_MESSAGE_BYTES)]
    return [own if other == text else json.loads(other) for other in texts]


def _compare(everyone: list[dict]) -> None:
    """Raises the same error in every process if one refused or if their arguments differ."""
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
    pitch, dtype = dispatch.load(problem.backend).packed(problem)
    held = flops.gathered_bytes(total, pitch, dtype.itemsize, problem.negatives, problem.groups)
    return held > ALL_GATHER_BYTES
