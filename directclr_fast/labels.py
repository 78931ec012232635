r"""What equal labels do to a step, in memory O(N d): further positives, or pairs that are left out.

With P(i) the candidates that have the label of anchor i, its own positive p(i) among them, and
``same_label="positive"``,

.. code-block:: text

    l_i = lse_i - mean_p a s_ip            = nll_i + a s_ip(i) - mean_p a s_ip
    G_ij = w_i (exp(a s_ij - lse_i) - [j in P(i)] / |P(i)|) + ...

so the kernels' sums stay as they are, p(i) joins their products as one of the others, and the means
are sums of unit rows by label: no pair is visited. Sums by label are fp64, since one label may have
all rows, a few columns at a time. An anchor whose P(i) is p(i) alone takes the terms that do not
cancel (docs/design.md section 2), and nothing of this module but zeros. Over several processes
everyone knows all N labels, gathered in either pass, and sums those of a block.

With "ignore" the kernels themselves leave out what has equal ids: a sum taken off again would leave
nothing of candidates that are far from the anchor beside a copy of its positive.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .problem import Problem
from .reference import distinct

COLUMNS = 64  # summed at a time: (rows, COLUMNS) in fp64 is what a step takes beyond O(N)


class Labels:
    """The labels of one step's batch. ``first`` (N,): where each candidate's label stands first."""

    def __init__(self, problem: Problem, world, labels: Tensor) -> None:
        self.problem, self.world = problem, world
        labels, order = distinct(world.everyone(labels)).sort(stable=True)
        place = torch.arange(len(labels), device=labels.device)
        new = torch.ones_like(labels, dtype=torch.bool)
        torch.ne(labels[1:], labels[:-1], out=new[1:])
        start = torch.where(new, place, 0).cummax(0).values
        self.first = torch.empty_like(order).scatter_(0, order, order[start])
        self.ids = self.first.int() if problem.ignores else None

    def ignored(self, where: slice) -> tuple[Tensor, Tensor] | None:
        """Ids (M,) of this process's rows and (n,) of the candidates ``where``, int32: pairs that
        have the same are left out. None where equal labels are positives."""
        if self.ids is None:
            return None
        return self.ids[self.world.own(self.problem)], self.ids[where]

    @cached_property
    def counts(self) -> tuple[Tensor, Tensor]:
        """|P| of the anchors of view 1 and of view 2 with the label of each candidate, (N,)."""
        n, paired = len(self.first), len(self.first) - self.problem.candidates + self.problem.rows
        one = torch.ones_like(self.first)
        of1, of2 = (
            torch.zeros_like(one).scatter_add_(0, self.first[:rows], one[:rows])[self.first]
            for rows in (paired, n)
        )
        if self.problem.negatives == "both":
            return 2 * of1 - 1, 2 * of1 - 1
        return of2, of1

    def dots(self, to: slice, z: Tensor, there: slice, rows: Tensor) -> Tensor:
        """sum of z_i . rows_j over the j ``there`` with the label of i, for the i of ``to``."""
        places, total = self._places(there, to), 0.0
        for k in _columns(z):
            x = z[:, k].to(self.problem.statistics_dtype)
            total = total + torch.linalg.vecdot(x, self._sums(places, rows[:, k]))
        return total

    def subtract(
        self,
        dz: Tensor,
        to: slice,
        w: Tensor | None,
        there: slice,
        rows: Tensor,
        v: Tensor | None,
    ) -> None:
        """dz_i -= sum of (w_i + v_j) rows_j over the same; one of both weights may be None."""
        places = self._places(there, to)
        for k in _columns(rows):
            x, total = rows[:, k].to(self.problem.statistics_dtype), 0.0
            if w is not None:
                total = self._sums(places, x).mul_(w[:, None])
            if v is not None:
                total += self._sums(places, x * v[:, None])
            dz[:, k] -= total

    def _places(self, there: slice, to: slice) -> tuple[Tensor, Tensor, int]:
        """Where in a table the rows ``there`` are added up and those of ``to`` find their label's
        sum, and the table's length: of a block it is that of the block."""
        at, find = self.first[there], self.first[to]
        rows = len(at)
        if rows == len(self.first):
            return at, find, rows
        place = torch.full_like(self.first, rows)  # the last one stays zero: no such label there
        place[at] = torch.arange(rows, device=at.device)  # whichever of a label's rows
        return place[at], place[find], rows + 1

    def _sums(self, places: tuple[Tensor, Tensor, int], rows: Tensor) -> Tensor:
        """(rows of ``to``, columns): the sum of the ``rows`` of each one's label."""
        at, find, length = places
        rows = rows.to(self.problem.statistics_dtype)
        table = rows.new_zeros(length, rows.shape[1])
        if rows.is_cpu:
            table.scatter_add_(0, at[:, None].expand_as(rows), rows)
        else:
            table.index_put_((at,), rows, accumulate=True)  # in a fixed order on a GPU as well
        return table[find]


class PositiveDots:
    """sum over P(i) of z_i . z_p, for the anchors of one column group, block after block.

    All unit rows are those of ``Backend.unit_rows``.
    """

    def __init__(self, labels: Labels, z1: Tensor, z2: Tensor) -> None:
        self.labels, self.z1, self.z2 = labels, z1, z2
        self.own = labels.world.own(labels.problem)
        self.both, self.symmetric = labels.problem.negatives == "both", labels.problem.symmetric
        self.row = self.col = 0.0
        self.parts = []
        if self.both:  # no anchor is its own positive
            dtype = labels.problem.statistics_dtype
            squares = (torch.linalg.vector_norm(z, dim=1, dtype=dtype).square() for z in (z1, z2))
            self.row, self.col = (-square for square in squares)

    def add(self, where: slice, blocks: list[Tensor]) -> None:
        """With the candidates ``where``, of which ``blocks`` are the rows of view 2 and, for
        "both", of view 1."""
        dots, own = self.labels.dots, self.own
        self.row = self.row + dots(own, self.z1, where, blocks[0])
        if self.symmetric:
            self.parts.append((where, dots(where, blocks[0], own, self.z1)))
        if self.both:
            self.row += dots(own, self.z1, where, blocks[1])
        if self.both and self.symmetric:
            self.col += dots(own, self.z2, where, blocks[0])

    def losses(self, scale, nll_row: Tensor, row_lse: Tensor, nll_col: Tensor, col_lse: Tensor):
        """Losses (M,) of the anchors of either direction; ``nll_col`` is what it is for one."""
        of1, of2 = (count[self.own] for count in self.labels.counts)
        of_row = torch.where(of1 > 1, row_lse - scale * (self.row / of1), nll_row)
        if not self.symmetric:
            return of_row, nll_col
        world, problem = self.labels.world, self.labels.problem
        col = world.to_owners(problem, world.whole(problem, self.parts), torch.sum) + self.col
        return of_row, torch.where(of2 > 1, col_lse - scale * (col / of2), nll_col)


class PositiveShares:
    """What the positives take off the gradients of one column group: 1 / |P(i)| of an anchor's
    weight each, in dz as in :class:`base.Weights`.

    ``joining`` (M,) is the weight of those whose p(i) is one of several, to be added where G has
    it.
    """

    def __init__(self, labels: Labels, weights: Tensor, z1: Tensor, z2: Tensor) -> None:
        self.labels, self.z1, self.z2 = labels, z1, z2
        self.own = own = labels.world.own(labels.problem)
        self.both = labels.problem.negatives == "both"
        counts = [count[: len(weights)] for count in labels.counts]
        taking = [torch.where(count > 1, weights, 0.0) for count in counts]
        self.w, self.v = (weight / count.clamp_min(1) for weight, count in zip(taking, counts))
        self.joining = taking[0][own]
        if labels.problem.symmetric:
            self.joining = self.joining + taking[1][own]
        else:
            self.v = None

    def take(
        self, dz1: Tensor | None, dz2: Tensor | None, where: slice, blocks: list[Tensor]
    ) -> None:
        """Off this process's dz1 and the dz2 of the candidates ``where``, as ``blocks`` of
        :meth:`PositiveDots.add`."""
        own, w, v, subtract = self.own, self.w, self.v, self.labels.subtract
        of_block = None if v is None else v[where]
        if dz1 is not None:
            subtract(dz1, own, w[own], where, blocks[0], of_block)
        if dz2 is not None:
            subtract(dz2, where, of_block, own, self.z1, w[own])
        if dz1 is not None and self.both:
            self._take_own(dz1, self.z1, w, where, blocks[1])

    def take_own(self, dz2: Tensor, where: slice, block: Tensor) -> None:
        """Off this process's dz2, with the rows ``where`` of its own view."""
        self._take_own(dz2, self.z2, self.v, where, block)

    def _take_own(self, dz, z, w, where, block) -> None:
        own = self.own
        self.labels.subtract(dz, own, w[own], where, block, w[where])
        if where.start <= own.start < where.stop:  # no anchor is its own positive
            dz[:, : z.shape[1]] += 2.0 * w[own, None] * z


def _columns(rows: Tensor) -> list[slice]:
    return [slice(k, min(k + COLUMNS, rows.shape[1])) for k in range(0, rows.shape[1], COLUMNS)]
