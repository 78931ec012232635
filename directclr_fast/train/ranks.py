"""The processes of a run under torchrun, and the few words they exchange beside gradients.

Everything random in a step is drawn alike on every rank for the whole batch, and each rank takes
its rows: W ranks make the batches and views of one process, so that a run may go on with another W.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """Joins the processes that torchrun started, for the time of the block; alone, does nothing.

    Tensors on the CPU travel by Gloo, those on a GPU by NCCL, each rank on the GPU of its
    LOCAL_RANK.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, **_meeting())
    yield
    # What holds the group in a cycle (DistributedDataParallel) would outlive it, and its threads
    # would end an interpreter that is ending by an abort: every third run with PyTorch 2.11.
    gc.collect()
    dist.destroy_process_group()  # not after an error: the others may be waiting for this one


def _meeting() -> dict:
    """Where the ranks find each other, where that is not for torch to choose.

    The agent of torchrun keeps one store for all restarts, in which the ranks of a restarted job
    may read the addresses of their dead predecessors (seen with torch 2.15: every second restart
    under Gloo failed or hung). On one node the number of the restart keeps them apart; nodes count
    their restarts each for itself, so there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the way.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is None or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return {}
    store, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"restart {attempt}", store)
    return {"store": store, "rank": rank, "world_size": size}


class Ranks:
    """``size`` processes, of which this is number ``rank``."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def joined(cls) -> Ranks:
        """Those of torch.distributed, or this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def group(self) -> str | None:
        """``group`` of the loss."""
        return "world" if self.size > 1 else None

    def device(self, device: torch.device) -> torch.device:
        """``device``, where it is a GPU without a number that of this rank."""
        if self.size > 1 and device.type == "cuda" and device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, of a tensor without gradient, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on one rank at least; a message between the hosts."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag))))

    def first(self, call: Callable[[], object]) -> object:
        """What ``call`` returns on rank 0, the only one that calls it, or raises there."""
        if self.size == 1:
            return call()
        result, error = None, None
        if self.rank == 0:
            try:
                result = call()
            except Exception as caught:  # the others wait to hear of it
                error = caught
        told = [result, _portable(error)]
        dist.broadcast_object_list(told, 0)
        if error is not None:
            raise error
        if told[1] is not None:
            raise told[1]
        return told[0]

    def gather(self, value: object) -> list:
        """``value`` of each rank, on rank 0; elsewhere nothing of use."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.gather_object(value, values if self.rank == 0 else None)
        return values


def _portable(error: Exception | None) -> Exception | None:
    """The error itself where it can be sent and read, otherwise its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(str(error))
    return error
