"""One step of the loss: column groups, blocks of candidates and pairs of views, for every backend
and every world.

The heavy stages are the backend's (``backends.base``); where the other rows of the batch are is the
world's (``world``); this module forms the per-row terms between them, all O(N) work. The
mathematics is in ``directclr_fast.reference`` and docs/design.md.

The sums leave the positive out and hand its logit a s_ip(i) on; with the log-sum of the others it
makes nll_i = -log p_i, log-sums and the entries of G at the positives, all without cancellation for
p_i near 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.base import Backend, Saved, Statistics, Tops, Weights
from .labels import Labels, PositiveDots, PositiveShares
from .problem import Problem
from .reference import reduce
from .world import World, cut


def forward(
    backend: Backend,
    problem: Problem,
    world: World,
    r1: Tensor,
    r2: Tensor,
    columns: Tensor | None,
    scale: float | Tensor,
    labels: Tensor | None = None,
) -> tuple[Tensor, list[Saved], Statistics | None]:
    """Loss (scalar or (M,)), what the backward pass of each group needs, and the statistics where
    the problem asks for them. ``columns`` is (G, d) or None for the slice, ``labels`` int64, one
    for each row of r2."""
    if world.processes == 1 and labels is None and backend.fuses(problem):
        return backend.forward(problem, r1, r2, columns, scale)
    per_row, states, statistics = None, [], []
    same = None if labels is None else Labels(problem, world, labels)
    for index in [None] if columns is None else columns:
        losses, saved, stats = _group(backend, problem, world, r1, r2, index, scale, same)
        per_row = losses if per_row is None else per_row + losses
        states.append(saved)
        statistics.append(stats)
    loss = reduce(problem, per_row).to(problem.compute_dtype)
    if not problem.return_stats:
        return loss, states, None
    return loss, states, Statistics(*(torch.stack(of) for of in zip(*statistics, strict=True)))


def _group(backend, problem, world, r1, r2, index, scale, same):
    """Per-row losses of one column group, its Saved, and its Statistics or None. ``same``: its
    :class:`Labels` or None."""
    both, symmetric = problem.negatives == "both", problem.symmetric
    z1, rnorm1 = backend.normalize(problem, r1, index)
    z2, rnorm2 = backend.normalize(problem, r2, index)
    logits = z1.new_empty(problem.rows, dtype=problem.statistics_dtype)
    tops = Tops.none_yet(problem, z1, world.candidates(problem)) if problem.return_stats else None
    held = world.hold(problem, [z2, z1] if both else [z2])
    rest_row = rest_self = ids = dots = None
    col_parts = []
    if same is not None and not problem.ignores:
        dots = PositiveDots(same, *(backend.unit_rows(problem, z) for z in (z1, z2)))
    for where, offset, *blocks in world.blocks(problem, held):
        part = world.part(problem, where, offset)
        kept = backend.kept_buffer(part, z1)
        of_block = tops and (tops._replace(col=tops.col[where]) if symmetric else tops)
        if dots is not None:
            dots.add(where, [backend.unit_rows(problem, block) for block in blocks])
        elif same is not None:
            ids = same.ignored(where)
        row, col = backend.sums(part, z1, blocks[0], scale, kept, logits, of_block, ids)
        rest_row = _add_logs(rest_row, row)
        col_parts.append((where, col))
        if both:
            row = _self_sums(backend, world, part, z1, blocks[1], scale, tops and tops.row, ids)
            rest_row = _add_logs(rest_row, row)
        if both and symmetric:
            top = tops and tops.col[world.own(problem)]
            row = _self_sums(backend, world, part, z2, blocks[0], scale, top, ids)
            rest_self = _add_logs(rest_self, row)

    nll_row, row_lse = _with_positive(rest_row, logits)
    # Two tensors: outputs of the registered op must not share memory.
    nll_col, col_lse, rest_col = logits.new_empty(0), logits.new_empty(0), None
    if symmetric:
        rest_col = world.whole(problem, col_parts)
        own_col = world.to_owners(problem, rest_col, torch.logsumexp)
        if both:
            own_col = torch.logaddexp(own_col, rest_self)
        nll_col, col_lse = _with_positive(own_col, logits)
    of_row, of_col = nll_row, nll_col
    if dots is not None:
        of_row, of_col = dots.losses(scale, nll_row, row_lse, nll_col, col_lse)
    per_row = 0.5 * (of_row + of_col) if symmetric else of_row
    per_row, all_row, all_col = world.share(problem, per_row, row_lse, col_lse, rest_col)
    z1, z2 = held[1] if both else z1, held[0]
    saved = Saved(z1, z2, rnorm1, rnorm2, all_row, all_col, nll_row, nll_col, kept)
    if tops is None:
        return per_row, saved, None
    if symmetric:
        tops = tops._replace(col=world.to_owners(problem, tops.col, torch.amax))
    col_lse = all_col if world.processes == 1 else col_lse
    return per_row, saved, Statistics(row_lse, col_lse, logits, tops.top1(nll_row, nll_col))


def backward(
    backend: Backend,
    problem: Problem,
    world: World,
    dloss: Tensor,
    states: list[Saved],
    columns: Tensor | None,
    scale: float | Tensor,
    need: tuple[bool, bool, bool],
    labels: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (r1, r2, temperature) where ``need`` says so, else None.

    What processes exchange follows ``world.need``, so that all take part in the same order.
    """
    if world.processes == 1 and labels is None and backend.fuses(problem):
        return backend.backward(problem, dloss, states, columns, scale, need)
    both = problem.negatives == "both"
    same = None if labels is None else Labels(problem, world, labels)
    _, anyone2, temperature = world.need(need)
    # The factor a of dz = a G z joins the weights, where it costs O(N).
    share = 0.5 * scale if problem.symmetric else scale
    weights = world.weights(problem, dloss.to(problem.statistics_dtype)) * share
    # sum_i z1_i . dz1_i is the temperature's gradient for "cross", and so is view 2's where that is
    # whole here; "both" needs either view's.
    whole2 = anyone2 and world.processes == 1
    want = (need[0] or (temperature and (both or not whole2)), anyone2 or (temperature and both))
    dr1 = backend.gradient_buffer(problem, problem.rows, dloss.device) if need[0] else None
    dr2 = backend.gradient_buffer(problem, world.rows2(problem), dloss.device) if need[1] else None
    total = 0.0
    for state, index in zip(states, [None] if columns is None else columns):
        dz1, dz2 = _products(backend, problem, world, state, weights, scale, want, same)
        dots = []
        for z, rnorm, dz, dr in (
            (state.z1, state.rnorm1, dz1, dr1),
            (state.z2, state.rnorm2, dz2, dr2),
        ):
            if dz is not None and (dr is not None or (temperature and (both or not dots))):
                z = world.own_rows(problem, z)
                dots.append(backend.finish(problem, z, rnorm, dz, dr, index))
        if temperature:
            total = total + ((dots[0] + dots[1]) / 2 if both else dots[0])
    if not need[2] and not (temperature and world.processes > 1):
        return dr1, dr2, None
    # A dot is a dloss/da (for "both", the mean of the two is), and da/dtemperature = -a^2.
    total = world.total(problem, total, dloss)
    return dr1, dr2, -total * scale if need[2] else None


def _products(backend, problem, world, state, weights, scale, want, same):
    """dz1 and dz2 of this process's rows in one column group; None where nobody wants them."""
    both, symmetric = problem.negatives == "both", problem.symmetric
    z1, z2 = world.own_rows(problem, state.z1), world.own_rows(problem, state.z2)
    own = world.own(problem)
    w, row_lse = cut(weights, own), world.own_rows(problem, state.row_lse)
    diagonal = w * torch.expm1(-state.nll_row)
    if symmetric:
        diagonal = diagonal + w * torch.expm1(-state.nll_col)
    v = col_lse = dz1 = local2 = ids = shares = None
    if same is not None and not problem.ignores:
        shares = PositiveShares(same, weights, *(backend.unit_rows(problem, z) for z in (z1, z2)))
        diagonal = diagonal + shares.joining
    home = world.homeward(problem)
    held = [state.z2, state.z1] if both else [state.z2]
    for where, offset, *blocks in world.blocks(problem, held):
        part = world.part(problem, where, offset)
        if symmetric:
            v, col_lse = cut(weights, where), cut(state.col_lse, where)
            if problem.ignores:  # a column with nothing left has no weight, but 0 exp(inf) is NaN
                col_lse = col_lse.masked_fill(col_lse == -torch.inf, 2.0**60)
        pair = Weights(w, row_lse, v, col_lse, diagonal)
        if same is not None:
            ids, rows = same.ignored(where), [backend.unit_rows(problem, block) for block in blocks]
        part1, part2 = backend.products(part, z1, blocks[0], scale, pair, state.kept, want, ids)
        dz1 = _add(dz1, part1)
        if shares is not None:
            shares.take(dz1, part2, where, rows)
        if part2 is not None:
            local2 = _add(local2, home.add(part2))
        if both and want[0]:
            lse = state.row_lse
            dz1 = _self_products(
                backend, world, part, z1, blocks[1], scale, weights, lse, where, dz1, ids
            )
        if both and want[1] and symmetric:
            lse = state.col_lse
            local2 = _self_products(
                backend, world, part, z2, blocks[0], scale, weights, lse, where, local2, ids
            )
            if shares is not None:
                shares.take_own(local2, where, rows[0])
    return dz1, _add(home.sum(), local2)


def _self_sums(backend, world, part, z, block, scale, top, ids):
    """A view with itself, by row: the triangle where ``block`` is all of it, else the rectangle."""
    if world.processes == 1:
        return backend.self_sums(part, z, scale, top, ids)
    alone = part.replace(symmetric=False, differentiable=False)
    kept = backend.kept_buffer(alone, z)
    tops = None if top is None else Tops(top, None, None)
    return backend.sums(alone, z, block, scale, kept, None, tops, ids)[0]


def _self_products(backend, world, part, z, block, scale, weights, lse, where, dz, ids):
    """``dz`` plus (H + H^T) z of these rows by those of ``block``: rows of H^T are columns of
    everyone's H, whose log-sums are in ``lse``."""
    if world.processes == 1:
        backend.add_self_products(part, z, scale, weights, lse, dz, ids)
        return dz
    alone = part.replace(symmetric=True, differentiable=False)
    w, own_lse = world.own_rows(part, weights), world.own_rows(part, lse)
    pair = Weights(w, own_lse, cut(weights, where), cut(lse, where), torch.zeros_like(w))
    kept = backend.kept_buffer(alone, z)
    return _add(dz, backend.products(alone, z, block, scale, pair, kept, (True, False), ids)[0])


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total.add_(part)


def _add_logs(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else torch.logaddexp(total, part)


def _with_positive(rest: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """(nll, lse) from the log-sum over the other candidates and the positive logit."""
    nll = torch.logaddexp(rest - logits, torch.zeros_like(logits))
    return nll, logits + nll
