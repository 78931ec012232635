r"""Where the other rows of a batch are: the worlds that ``driver`` walks through.

:class:`Alone` is one process with M anchors and N candidates. In the two others process k of W has
n_k rows of both views, N = sum n_k, and computes the block row S_k = z1_k z2^T (n_k, N) of the
similarities and nothing else:

.. code-block:: text

    forward   row sums of S_k are whole; its column sums are one of W parts:
              process b receives the W parts of its own n_b columns, log-sum-exp over them
              -> per-row losses and column log-sums, gathered: N numbers each
    backward  G_k from S_k and the gathered statistics; dz1_k = G_k z2 is whole,
              G_k^T z1_k (N, d) one of W parts of dz2, added up where its rows live

so a process does 8c/W operations. The column parts travel as logarithms in
fp64, which is exact enough at every temperature and needs no common shift, and are added in the
order of ranks, so that nothing depends on arrival. Column maxima travel likewise, where any process
wants statistics. "both" adds the block rows z1_k z1^T and z2_k z2^T, whose transposes another
process computes: 20c/W.

:class:`Gathered`: all-gather of z2 and one reduce-scatter of dz2 (under Gloo an all-to-all and a
sum, half its bytes); memory O(N d) in each process.
:class:`Ring`: the blocks of z2 travel from process to process, the next one under way while one is
used, and so do their dz2; memory O(N d / W).

Gradients: every process receives the derivative of the *sum over processes* of upstream x loss by
its own rows. Where all return the same mean (or sum) that is W times the derivative of one loss,
and DistributedDataParallel, which takes the mean, has exactly the gradient of the whole batch,
unequal blocks included. With ``reduction="none"`` the sum runs over everyone's own rows. A tensor
temperature receives, in every process alike, that derivative divided by W: the full one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .problem import Problem
from .reference import row_weights


def _either(new: str, old: str) -> Callable | None:
    """The collective by its name from PyTorch 2.14 on, which notes each use of the old one."""
    return getattr(dist, new, None) or getattr(dist, old, None)


all_gather = _either("all_gather_single", "all_gather_into_tensor")
reduce_scatter = _either("reduce_scatter_single", "reduce_scatter_tensor")
# Where Gloo sends, whose reduce-scatter is an all-reduce: twice the bytes.
SUMMED_BY_OWNERS = ("cpu",)


def cut(x: Tensor, where: slice) -> Tensor:
    """``x[where]``; a slice that is all of it costs nothing."""
    return x if x.shape[0] == where.stop - where.start else x[where]


class Alone:
    """One process: every candidate is here. Small batches feel every operation."""

    processes = 1

    def need(self, need: tuple[bool, bool, bool]) -> tuple[bool, bool, bool]:
        """Which gradients any process wants, of (r1, r2, temperature)."""
        return need

    def candidates(self, problem: Problem) -> int:
        """N."""
        return problem.candidates

    def rows2(self, problem: Problem) -> int:
        """Rows of r2 in this process."""
        return problem.candidates

    def own(self, problem: Problem) -> slice:
        """Where this process's positives are among the N candidates."""
        return slice(0, problem.rows)

    def own_rows(self, problem: Problem, x: Tensor) -> Tensor:
        """This process's rows of a tensor that may hold those of all. z2 stays as it is: all of it
        is here."""
        return x

    def everyone(self, x: Tensor) -> Tensor:
        """(N, ...) from what each process has for its rows of r2."""
        return x

    def hold(self, problem: Problem, views: list[Tensor]) -> list[Tensor]:
        """What this process keeps of all candidates, from its own unit rows."""
        return views

    def blocks(self, problem: Problem, held: list[Tensor]) -> Iterator[tuple]:
        """Yields (where, row_offset, *blocks): candidates ``where`` among all N, their unit rows,
        and where this process's positives begin among them."""
        yield slice(0, problem.candidates), 0, *held

    def part(self, problem: Problem, where: slice, offset: int) -> Problem:
        """This process's rows against the candidates ``where``."""
        return problem

    def whole(self, problem: Problem, parts: list[tuple[slice, Tensor]]) -> Tensor:
        """(N,) from what the blocks gave, by their place."""
        return parts[0][1]

    def to_owners(self, problem: Problem, x: Tensor, join: Callable) -> Tensor:
        """(N, ...) sums or maxima of everyone's parts to those of this process's positives,
        (M, ...), ``join``\\ ed over processes in their order."""
        return cut(x, self.own(problem))

    def share(self, problem: Problem, per_row, row_lse, col_lse, rest_col):
        """(losses to be reduced, row log-sums, column log-sums (N,)) as the backward pass reads
        them. ``col_lse`` (M,) are those with a positive, ``rest_col`` (N,) without."""
        if problem.symmetric and problem.rows < problem.candidates:
            whole = rest_col.clone()
            whole[: problem.rows] = col_lse
            col_lse = whole
        return per_row, row_lse, col_lse

    def weights(self, problem: Problem, dloss: Tensor) -> Tensor:
        """The upstream gradient with the reduction's factor, one for each candidate's row of r1;
        for one direction (M,)."""
        weights = row_weights(problem, dloss)
        if not problem.symmetric or problem.rows == problem.candidates:
            return weights
        padded = weights.new_zeros(problem.candidates)
        padded[: problem.rows] = weights
        return padded

    def total(self, problem: Problem, value, like: Tensor):
        """Sum of everyone's 0-dim ``value`` divided by W, the same bits in all."""
        return value

    def homeward(self, problem: Problem) -> _Stays:
        """Where parts of dz2 are added up."""
        return _Stays()


class _Stays:
    """dz2 of one process is whole as it comes."""

    def add(self, part: Tensor) -> Tensor | None:
        """Adds a part of the block just yielded; returns what is whole already."""
        return part

    def sum(self) -> Tensor | None:
        """What came from elsewhere."""
        return None


@dataclass(frozen=True)
class Shared:
    """Several processes, what they have agreed on, and their collectives; of the methods of
    :class:`Alone`. The problem is the square one of this process's rows."""

    group: dist.ProcessGroup
    rank: int
    counts: tuple[int, ...]  # rows of each process
    anyone: tuple[bool, bool, bool]  # whether any process wants a gradient of r1, r2, temperature

    @property
    def processes(self) -> int:
        """W."""
        return len(self.counts)

    def need(self, need):
        return self.anyone

    def candidates(self, problem: Problem) -> int:
        return sum(self.counts)

    def rows2(self, problem: Problem) -> int:
        return problem.rows

    def rows_of(self, rank: int) -> slice:
        """Where the rows of one process lie among all N."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def own(self, problem: Problem) -> slice:
        return self.rows_of(self.rank)

    def own_rows(self, problem: Problem, x: Tensor) -> Tensor:
        return cut(x, self.rows_of(self.rank))

    def part(self, problem: Problem, where: slice, offset: int) -> Problem:
        return problem.replace(
            candidates=where.stop - where.start, row_offset=offset, negatives="cross"
        )

    def to_owners(self, problem: Problem, x: Tensor, join: Callable) -> Tensor:
        size, rows = self.processes, problem.rows
        arriving = x.new_empty(size * rows, *x.shape[1:])
        sent, received = list(self.counts), [rows] * size
        dist.all_to_all_single(arriving, x.contiguous(), received, sent, group=self.group)
        return join(arriving.unflatten(0, (size, rows)), 0)

    def share(self, problem: Problem, per_row, row_lse, col_lse, rest_col):
        # Every process reduces the same numbers in the same order: the same bits of loss in all.
        asked = [problem.reduction != "none"]
        asked += [problem.differentiable and problem.negatives == "both"]
        asked += [problem.differentiable and problem.symmetric]
        values = [per_row, row_lse, col_lse]
        leaving = [value for value, wanted in zip(values, asked) if wanted]
        if leaving:
            arrived = iter(self.everyone(torch.stack(leaving, 1)).unbind(1))
            values = [
                next(arrived).contiguous() if wanted else value
                for value, wanted in zip(values, asked)
            ]
        return tuple(values)

    def weights(self, problem: Problem, dloss: Tensor) -> Tensor:
        if problem.reduction == "none":
            return self.everyone(dloss.contiguous())
        total = sum(self.counts)
        weights = self._sum(dloss).expand(total)
        return weights / total if problem.reduction == "mean" else weights

    def total(self, problem: Problem, value, like: Tensor):
        value = torch.as_tensor(value, dtype=problem.statistics_dtype, device=like.device)
        return self._sum(value) / self.processes

    def _sum(self, value: Tensor) -> Tensor:
        everyone = value.new_empty(self.processes)
        all_gather(everyone, value.reshape(1), group=self.group)
        return everyone.sum()

    def everyone(self, x: Tensor) -> Tensor:
        most = max(self.counts)
        padded = x
        if x.shape[0] < most:
            padded = torch.cat([x, x.new_zeros(most - x.shape[0], *x.shape[1:])])
        whole = x.new_empty(most * self.processes, *x.shape[1:])
        all_gather(whole, padded, group=self.group)
        if min(self.counts) == most:
            return whole
        return torch.cat([rows[:count] for rows, count in zip(whole.split(most), self.counts)])


class Gathered(Shared):
    """Every process holds z2 of all."""

    def hold(self, problem: Problem, views: list[Tensor]) -> list[Tensor]:
        return [self.everyone(z) for z in views]

    def blocks(self, problem: Problem, held: list[Tensor]) -> Iterator[tuple]:
        yield slice(0, sum(self.counts)), self.own(problem).start, *held

    def whole(self, problem: Problem, parts: list[tuple[slice, Tensor]]) -> Tensor:
        return parts[0][1]

    def homeward(self, problem: Problem) -> _Scattered:
        return _Scattered(self, problem)


class _Scattered:
    """The sum of everyone's dz2 in the process whose rows they are, by one collective."""

    def __init__(self, world: Gathered, problem: Problem) -> None:
        self.world, self.problem, self.rows = world, problem, None

    def add(self, part: Tensor) -> None:
        """Adds this process's part, (N, d)."""
        world, most = self.world, max(self.world.counts)
        if part.device.type in SUMMED_BY_OWNERS:
            self.rows = world.to_owners(self.problem, part, torch.sum)
            return
        if min(world.counts) < most:
            padded = part.new_zeros(world.processes, most, *part.shape[1:])
            for into, rows in zip(padded, part.split(world.counts)):
                into[: len(rows)] = rows
            part = padded.flatten(0, 1)
        rows = part.new_empty(most, *part.shape[1:])
        reduce_scatter(rows, part, group=world.group)
        self.rows = rows[: world.counts[world.rank]]

    def sum(self) -> Tensor | None:
        """The sum of this process's own rows, (n, d)."""
        return self.rows


class Ring(Shared):
    """The blocks of z2 travel: W blocks, this process's own first, then its predecessor's and so
    on, each with the next under way. A block without this process's positives has its
    ``row_offset`` at its end, where no row's positive is left out."""

    def hold(self, problem: Problem, views: list[Tensor]) -> list[Tensor]:
        return views

    def blocks(self, problem: Problem, held: list[Tensor]) -> Iterator[tuple]:
        size = self.processes
        for step in range(size):
            owner = (self.rank - step) % size
            arriving, works = [], []
            if step + 1 < size:
                coming = self.counts[owner - 1]
                arriving = [z.new_empty(coming, *z.shape[1:]) for z in held]
                works = self.shift(held, arriving)
            yield self.rows_of(owner), 0 if step == 0 else self.counts[owner], *held
            for work in works:
                work.wait()
            held = arriving

    def part(self, problem: Problem, where: slice, offset: int) -> Problem:
        return super().part(problem, where, offset).replace(differentiable=False)

    def whole(self, problem: Problem, parts: list[tuple[slice, Tensor]]) -> Tensor:
        x = parts[0][1].new_empty(sum(self.counts))
        for where, values in parts:
            x[where] = values
        return x

    def homeward(self, problem: Problem) -> _Returning:
        return _Returning(self)

    def shift(self, leaving: list[Tensor], arriving: list[Tensor]) -> list:
        """Starts sending to the next process and receiving from the one before."""
        size, group = self.processes, self.group
        after, before = (self.rank + 1) % size, (self.rank - 1) % size
        sends = [dist.P2POp(dist.isend, t, group=group, group_peer=after) for t in leaving]
        receives = [dist.P2POp(dist.irecv, t, group=group, group_peer=before) for t in arriving]
        return dist.batch_isend_irecv(sends + receives)


class _Returning:
    """A block's dz2 follows the block, one step behind, and is under way while the next part is
    computed; the owner adds first, then its successors in order."""

    def __init__(self, world: Ring) -> None:
        self.world, self.step = world, 0
        self.sent = self.arriving = None
        self.works = []

    def add(self, part: Tensor) -> None:
        """Adds this process's part to the block that ``Ring.blocks`` has just yielded."""
        world = self.world
        self.sent = part if self.step == 0 else self.sum().add_(part)
        owner = (world.rank - self.step) % world.processes
        self.arriving = part.new_empty(world.counts[owner - 1], *part.shape[1:])
        self.works = world.shift([self.sent], [self.arriving])
        self.step += 1

    def sum(self) -> Tensor | None:
        """What has arrived: after the last part, the whole sum of this process's own rows."""
        for work in self.works:
            work.wait()
        return self.arriving


World = Alone | Gathered | Ring
ALONE = Alone()
