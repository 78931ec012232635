"""The processes of a run under torchrun, and the few words they exchange beside gradients.

No rank waits for another longer than a stated time. One that has waited in vain puts its number on
a list in the store where they met, gives the others a little time to do so, and says who did not.
Nothing that arrives is run: ranks send each other tensors, and files of torch.save as bytes, read
with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..world import all_gather
from .supervise import FAILED

# How much later than this one another rank may give up: a tenth of the timeout, no less seconds.
LATER, LEAST = 0.1, 2.0


class _NoAnswer(Exception):
    """A call to the ranks' store has not returned in time."""


class RanksLost(RuntimeError):
    """Another rank did not answer in time, or is gone; the sentence says which and when."""

    exit_code = FAILED


@contextlib.contextmanager
def launched(timeout: float) -> Iterator[None]:
    """Joins the processes that torchrun started, for the time of the block; alone, does nothing.

    Tensors on the CPU travel by Gloo, those on a GPU by NCCL, each rank on the GPU of its
    LOCAL_RANK. ``timeout``: seconds that a rank waits for others, here and in each collective;
    :class:`RanksLost` then.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        torch.cuda.set_device(local % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = _meeting(timeout)
    limit = {"timeout": timedelta(seconds=timeout)}
    ranks = Ranks(rank, size, store, timeout)
    with ranks.watched(lambda: "before the first step"):
        ranks.meet()
        join = {"store": store, "rank": rank, "world_size": size, **limit}
        _within(timeout + LEAST, lambda: dist.init_process_group(backend, **join))
        yield
    # What holds the group in a cycle (DistributedDataParallel) would outlive it, and its threads
    # would end an interpreter that is ending by an abort: every third run with PyTorch 2.11.
    gc.collect()
    dist.destroy_process_group()  # not after an error: the others may be waiting for this one


def _meeting(timeout: float) -> tuple[dist.Store, int, int]:
    """The store where the ranks find each other, this rank, and how many they are.

    The agent of torchrun keeps one store for all restarts, in which the ranks of a restarted job
    may read the addresses of their dead predecessors (seen with torch 2.15: every second restart
    under Gloo failed or hung). On one node the number of the restart keeps them apart; nodes count
    their restarts each for itself, so there it takes a store of each start's own.
    """
    environment = os.environ
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    of_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # Not rendezvous("env://"), which waits until all are there but cannot say who is not.
    how = {"is_master": rank == 0 and not of_agent, "wait_for_workers": False}
    how |= {"multi_tenant": True, "timeout": timedelta(seconds=timeout)}
    try:
        store = _within(timeout + LEAST, lambda: dist.TCPStore(host, port, **how))
    except (RuntimeError, _NoAnswer) as error:
        raise RanksLost(
            f"no answer from {host}:{port}, where rank 0 is and the ranks meet, for rank {rank} of "
            f"{size} within {timeout:g} s{_cause(error)}"
        ) from error
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is not None and environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]:
        store = dist.PrefixStore(f"restart {attempt}", store)
    elif of_agent and environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        warnings.warn(
            "max_restarts: expected TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of "
            "torchrun with it, where there are several nodes; a restart may fail",
            stacklevel=2,
        )
    return store, rank, size


def _within(seconds: float, call: Callable[[], object]) -> object:
    """What ``call`` returns or raises; ``_NoAnswer`` after ``seconds``.

    PyTorch's store waits for ever for an answer whose link is cut, whatever its own timeout.
    """
    ended: list[tuple[object, Exception | None]] = []

    def run() -> None:
        try:
            ended.append((call(), None))
        except Exception as error:
            ended.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise _NoAnswer
    result, error = ended[0]
    if error is not None:
        raise error
    return result


def _cause(error: Exception) -> str:
    """What the network said first, in brackets, without the place in Gloo's source."""
    said = re.sub(r"^\[\S*\] ", "", str(error)).split("\n")[0].split(". ")[0]
    return f" ({said[:200]})" if said else ""


class Ranks:
    """``size`` processes, of which this is number ``rank``."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        store: dist.Store | None = None,
        timeout: float = 0.0,
    ) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.patience = max(LEAST, LATER * timeout)
        if size > 1:
            self.store = dist.PrefixStore("directclr_fast", store)
            with contextlib.suppress(Exception):  # of a store that keeps no lists
                _within(LEAST, lambda: self._note("present", socket.gethostname()))

    @classmethod
    def joined(cls, timeout: float = 0.0) -> Ranks:
        """Those of torch.distributed, or this process alone. ``timeout``: as of its group."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            store = dist.distributed_c10d._get_default_store()
            return cls(dist.get_rank(), dist.get_world_size(), store, timeout)
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
        result, refusal, error = None, None, None
        if self.rank == 0:
            try:
                result = call()
            except Exception as caught:  # the others wait to hear of it
                error = caught
                kind = next((kind for kind in KINDS if isinstance(caught, kind)), RuntimeError)
                refusal = [kind.__name__, str(caught)]
        whole = _packed([result, refusal])
        size = torch.tensor(len(whole))
        dist.broadcast(size, 0)
        if self.rank > 0:
            whole = whole.new_empty(int(size))
        dist.broadcast(whole, 0)
        if error is not None:
            raise error
        if self.rank > 0:
            result, refusal = _unpacked(whole)
        if refusal is not None:
            raise {kind.__name__: kind for kind in KINDS}[refusal[0]](refusal[1])
        return result

    def gather(self, value: object) -> list:
        """``value`` of each rank, on rank 0; elsewhere nothing of use."""
        if self.size == 1:
            return [value]
        own = _packed(value)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        most = int(self.sum(sizes).max())
        padded = torch.cat((own, own.new_zeros(most - len(own))))
        everyone = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        dist.gather(padded, everyone, 0)
        return [_unpacked(x[:size]) for x, size in zip(everyone or (), sizes.tolist())]

    # ------------------------------------------------------------------------ who is missing

    def meet(self) -> None:
        """Returns once all ranks are there; :class:`RanksLost` for those who are not in time."""
        present = _within(self.timeout + LEAST, lambda: self._list("present", self.timeout))
        if absent := self._others(present, present):
            with contextlib.suppress(Exception):  # rank 0 may hold what the others still ask
                _within(self.patience + LEAST, lambda: self._roll_call(self.patience))
            raise RanksLost(f"{absent} of {self.size} did not come within {self.timeout:g} s")

    @contextlib.contextmanager
    def watched(self, where: Callable[[], str], rest: Callable[[], str] = str) -> Iterator[None]:
        """Turns an error of the network in the block into :class:`RanksLost`; of any other error
        the ranks that will miss this one are told.

        ``where()``: what the run was at; ``rest()``: what the sentence ends with.
        """
        try:
            yield
        except RanksLost:
            raise
        except Exception as error:
            if self.size == 1:
                raise
            if isinstance(error, dist.DistError | _NoAnswer) or "gloo" in str(error):
                raise RanksLost(
                    f"{self._missing()} {where()}, with a timeout of {self.timeout:g} s"
                    f"{_cause(error)}{rest()}"
                ) from error
            why = str(error)[:200] or type(error).__name__
            with contextlib.suppress(Exception):
                _within(LEAST, lambda: self._note("ended", why))
            raise

    def _missing(self) -> str:
        """Subject and verb of the sentence."""
        try:
            ended = _within(self.patience + LEAST, lambda: self._roll_call(self.patience))
            hosts = _within(LEAST, lambda: self._notes("present"))
        except Exception:
            if self.rank == 0:
                return "no answer from the ranks' store"
            place = os.environ.get("MASTER_ADDR", "its host")
            return f"no answer from rank 0 at {place}, where the ranks' store is,"
        left = [rank for rank, why in ended.items() if why and rank != self.rank]
        if left:
            return f"{_name(left[0], hosts)} ended ({ended[left[0]]})"
        if absent := self._others(ended, hosts):
            return f"no answer from {absent}"
        return "a connection between the ranks broke or was too slow, though all of them are there,"

    def _others(self, there: dict[int, str], hosts: dict[int, str]) -> str:
        """Names of the ranks that are not there, empty if none; at most three."""
        names = [_name(rank, hosts) for rank in range(self.size) if rank not in there]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def _roll_call(self, patience: float) -> dict[int, str]:
        """The ranks that have given up, each with its error if that was of its own."""
        self._note("ended", "")
        return self._list("ended", patience)

    def _list(self, name: str, patience: float) -> dict[int, str]:
        """What was noted by each rank, waiting for all of them for so many seconds."""
        end = time.monotonic() + patience
        while len(notes := self._notes(name)) < self.size and time.monotonic() < end:
            time.sleep(0.05 + self.size / 1000)  # one store answers all
        return notes

    def _note(self, name: str, text: str) -> None:
        self.store.append(name, json.dumps([self.rank, text]) + "\n")

    def _notes(self, name: str) -> dict[int, str]:
        return dict(map(json.loads, self.store.get(name).decode().splitlines()))


def mean_in_order(_, bucket):
    """Mean over the ranks of a ``GradBucket``, added in their order, in a future: a hook of
    DistributedDataParallel for Gloo. (It takes no annotations that are strings.)

    Gloo adds in an order that depends on the place in the bucket, and a process lays its buckets
    out anew after its first step: with three ranks or more a resumed run would have other bits.
    """
    values, size = bucket.buffer(), dist.get_world_size()
    padded = torch.nn.functional.pad(values, (0, -len(values) % size))
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded)
    first, *others = parts.chunk(size)
    for other in others:
        first += other
    all_gather(padded, first / size)
    done = torch.futures.Future()
    done.set_result(padded[: len(values)])
    return done


def _name(rank: int, hosts: dict[int, str]) -> str:
    return f"rank {rank}" + (f" on {hosts[rank]}" if rank in hosts else "")


KINDS = (ValueError, TypeError, OSError, ImportError, RuntimeError)


def _packed(value: object) -> Tensor:
    """Plain containers and tensors as bytes (n,) uint8."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> object:
    return torch.load(io.BytesIO(packed.numpy().tobytes()), weights_only=True)
