"""The loss over several processes: Gloo, on this machine, against one process with all rows.

One set of four processes runs everything (starting them is what costs): this file as a script is
one of them. Groups of 1, 2, 3 and 4 run every case of CASES with both ways to gather, then the
scenarios below; the tests compare what they wrote.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import waiting

from directclr_fast import (
    DirectCLRLoss,
    LossStats,
    dispatch,
    distributed,
    fast_directclr_loss,
    info_nce,
    last_backend,
    world,
)
from directclr_fast.backends.base import Weights
from directclr_fast.problem import Problem
from directclr_fast.testing import bound, evaluate, make_views, relative_error
from directclr_fast.world import Ring

sent_bytes = runpy.run_path(str(Path(__file__).parents[1] / "docs/scaling.py"))["sent_bytes"]
WORLD = 4
SIZES = (1, 2, 3, 4)
pytestmark = pytest.mark.xdist_group("four processes")  # whose start is what costs
GATHERS = ("all", "ring")
PATIENCE = timedelta(minutes=40)
UNEVEN = (37, 1, 20, 64)  # one process with a single row; no total that W divides
EVEN = (16, 16, 16, 16)
# Of twelve, in all processes; every fifth row has none.
LABELS = torch.randint(12, (sum(UNEVEN),), generator=torch.Generator().manual_seed(3))
LABELS[::5] = -1


@dataclass(frozen=True)
class Case:
    """One call, its rows split over W processes by the first W entries of ``counts``."""

    name: str
    options: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    counts: tuple[int, ...] = UNEVEN
    width: int = 48
    kind: str = "views"
    groups: int = 0
    labelled: bool = False

    def views(self, size: int):
        """Both views, all rows."""
        rows = sum(self.counts[:size])
        return make_views(rows, self.width, dtype=self.dtype, kind=self.kind, seed=rows)

    def own(self, size: int, rank: int) -> slice:
        """The rows of one process."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[:size][rank])

    def arguments(self, rows: slice = slice(None)) -> dict:
        """Keyword arguments of the call with ``rows``, without upstream gradient and group."""
        options = {"dim": 40, "temperature": 0.1} | self.options
        if self.labelled:
            options["labels"] = LABELS[rows]
        if self.groups:
            generator = torch.Generator().manual_seed(1)
            options["columns"] = torch.stack(
                [torch.randperm(self.width, generator=generator)[:17] for _ in range(self.groups)]
            )
        return options

    def upstream(self, size: int) -> torch.Tensor:
        """Not one; for reduction "none", different in every row."""
        if self.options.get("reduction") != "none":
            return torch.tensor(-1.7)
        rows = sum(self.counts[:size])
        return torch.randn(rows, generator=torch.Generator().manual_seed(2)) + 0.5

    @property
    def temperature(self) -> float:
        """As a number."""
        return float(self.arguments()["temperature"])


def exact_cases() -> list[Case]:
    """Through the torch backend in fp64, where one process and many differ by rounding alone."""
    common = {"backend": "torch"}
    cases = []
    for negatives in ("cross", "both"):
        for symmetric in (True, False):
            options = common | {"negatives": negatives, "symmetric": symmetric}
            name = f"{negatives}-{'two' if symmetric else 'one'}"
            cases += [
                Case(name, options | {"temperature": torch.tensor(0.1, dtype=torch.float64)}),
                Case(f"{name}-cold", options | {"temperature": 0.005}, kind="unrelated"),
                Case(f"{name}-frozen", options | {"temperature": 0.001}, kind="unrelated"),
                Case(f"{name}-sum", options | {"reduction": "sum"}, counts=EVEN),
                Case(f"{name}-none", options | {"reduction": "none", "temperature": _t(0.2)}),
                Case(f"{name}-groups", options | {"temperature": _t(0.2)}, groups=3),
                Case(f"{name}-labels", options | {"temperature": _t(0.2)}, labelled=True),
                Case(
                    f"{name}-ignored",
                    options | {"same_label": "ignore", "reduction": "none"},
                    labelled=True,
                ),
            ]
    return [Case(**(vars(case) | {"dtype": torch.float64})) for case in cases]


def _t(value: float | list[float]) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


EXACT = exact_cases()
FLOAT = [
    Case(f"{backend}-{name}", options | {"backend": backend}, **more)
    for backend in ("torch", "cpu")
    for name, options, more in (
        ("cross", {"temperature": _t(0.1)}, {}),
        ("both", {"negatives": "both", "temperature": _t(0.1)}, {}),
        ("one", {"symmetric": False}, {"counts": EVEN}),
        ("cold", {"temperature": 0.005}, {"kind": "unrelated"}),
        ("frozen", {"temperature": 0.001}, {"kind": "unrelated", "counts": EVEN}),
        ("converged", {}, {"kind": "converged"}),
        ("groups", {"reduction": "none"}, {"groups": 2}),
        ("bf16-input", {}, {"dtype": torch.bfloat16}),
        ("fp16-input", {"negatives": "both"}, {"dtype": torch.float16}),
        ("one-column", {"dim": 1}, {}),
        ("no-workspace", {"workspace_bytes": 0}, {}),
        ("labels", {"negatives": "both"}, {"labelled": True}),
        ("ignored", {"same_label": "ignore"}, {"labelled": True}),
    )
]
# Equal rows in different processes; a library may round its product with one row otherwise.
FLOAT.append(
    Case("cpu-ties", {"backend": "cpu", "negatives": "both", "temperature": 0.005}, kind="ties")
)
ROUNDED = [
    Case("cross", {"backend": "cpu", "precision": "bf16"}),
    Case("both", {"backend": "cpu", "precision": "bf16", "negatives": "both"}),
    Case("converged", {"backend": "cpu", "precision": "bf16"}, kind="converged", counts=EVEN),
]


def runnable(case: Case) -> bool:
    """Whether this machine has the backend and the precision."""
    views = Problem(
        rows=8, candidates=8, width=48, dim=40, dtype=case.dtype, device_type="cpu", temperature=0.1
    )
    precision = case.options.get("precision", "auto")
    return not dispatch.load(case.options["backend"]).why_not(replace(views, precision=precision))


CASES = (
    [("exact", c) for c in EXACT] + [("float", c) for c in FLOAT] + [("bf16", c) for c in ROUNDED]
)
CASES = {f"{kind}-{case.name}": case for kind, case in CASES if runnable(case)}


def expected(case: Case, size: int, dtype=None, **changes):
    """(loss, dr1, dr2, dtemperature, stats) of one process, in the convention of ``size``."""
    r1, r2 = (r if dtype is None else r.to(dtype) for r in case.views(size))
    arguments = case.arguments(slice(0, sum(case.counts[:size]))) | changes
    one = evaluate(fast_directclr_loss, r1, r2, upstream=case.upstream(size), **arguments)
    _, stats = fast_directclr_loss(r1, r2, return_stats=True, **arguments)
    none = case.options.get("reduction") == "none"
    factor, part = (1, 1 / size) if none else (size, 1)
    temperature = one.dtemperature
    return (
        one.loss,
        factor * one.dr1.double(),
        factor * one.dr2.double(),
        None if temperature is None else part * temperature,
        stats,
    )


def joined(processes, case: Case, size: int, gather: str):
    """The same from the files of the processes."""
    parts = [processes[rank][size, gather, case_name(case)] for rank in range(size)]
    loss, dr1, dr2, dtemperature, stats = zip(*(part["result"] for part in parts))
    if case.options.get("reduction") == "none":
        loss = torch.cat(loss)
    else:
        assert all(torch.equal(other, loss[0]) for other in loss), "the loss is not one number"
        loss = loss[0]
    if dtemperature[0] is not None:
        assert all(torch.equal(other, dtemperature[0]) for other in dtemperature)
    stats = [None if s[0] is None else torch.cat(s, -1) for s in zip(*stats)]
    return loss, torch.cat(dr1), torch.cat(dr2), dtemperature[0], stats


def case_name(case: Case) -> str:
    return next(name for name, other in CASES.items() if other is case)


def flat(result) -> dict[str, torch.Tensor]:
    """Named tensors of a result, statistics included."""
    names = ("loss", "dr1", "dr2", "dtemperature", *LossStats._fields)
    values = (*result[:4], *result[4])
    return {name: value for name, value in zip(names, values) if value is not None}


def on_tiles() -> bool:
    """Whether the CPU's kernels multiply in a matrix unit, or in an emulated one."""
    try:
        from directclr_fast import _cpu
    except ImportError:
        return False
    return _cpu.has_tiles()


parametrize = pytest.mark.parametrize
over_groups = parametrize("size,gather", [(w, g) for w in SIZES for g in GATHERS])


@over_groups
@parametrize("name", [name for name in CASES if name.startswith("exact")])
def test_many_processes_equal_the_reference_in_fp64(processes, name, size, gather):
    case = CASES[name]
    truth = flat(expected(case, size, backend="reference"))
    ours = flat(joined(processes, case, size, gather))
    assert ours.keys() == truth.keys()
    for key, want in truth.items():
        assert relative_error(ours[key], want) < 1e-13 / case.temperature, key


@over_groups
@parametrize("name", [name for name in CASES if not name.startswith("exact")])
def test_many_processes_err_no_more_than_one(processes, name, size, gather):
    case = CASES[name]
    exactly = {"backend": "reference", "precision": "auto"}
    truth = flat(expected(case, size, torch.float64, **exactly))
    one = flat(expected(case, size))
    ours = flat(joined(processes, case, size, gather))
    for key, want in truth.items():
        if key.endswith("top1"):  # a near tie may be rounded either way, here as there
            # On a matrix unit each block of the ring has digits of its own: ties between them, too.
            if not (gather == "ring" and case.kind == "ties" and on_tiles()):
                assert torch.equal(ours[key], one[key]), key
            continue
        dtype = case.dtype if key in ("dr1", "dr2") else torch.float32
        error = relative_error(ours[key], want)
        assert error <= bound(relative_error(one[key], want), dtype), key
        if case.temperature == 0.1 and case.dtype == torch.float32 and case.kind == "views":
            exact = "precision" not in case.options
            assert relative_error(ours[key], one[key]) < (1e-6 if exact else 3e-3), key


@over_groups
def test_repeat_runs_are_bitwise_equal(processes, size, gather):
    for name in CASES:
        for rank in range(size):
            assert processes[rank][size, gather, name]["repeats"], (name, rank)


@parametrize("size", SIZES[1:])
def test_operations_fall_as_one_over_the_processes(processes, size):
    for negatives in ("cross", "both"):
        for gather in GATHERS:
            for rank in range(size):
                step = processes[rank]["operations", size, gather, negatives]
                c = sum(EVEN[:size]) ** 2 * 40
                total = (20 if negatives == "both" else 8) * c // size  # world.py has why
                assert step["operations"] == total, (gather, negatives)
                most = sum(EVEN[:size]) if gather == "all" else EVEN[0]
                assert step["rows held"] == most


@parametrize("gather", GATHERS)
def test_bytes_sent_are_those_of_the_model(processes, gather):
    for negatives in ("cross", "both"):
        for rank in range(WORLD):
            sent = processes[rank]["operations", WORLD, gather, negatives]["sent"]
            pitch = sent.pop("pitch")
            counted = sent_bytes(sum(EVEN), pitch, WORLD, gather, 4, negatives)
            # The upstream gradient and the agreement are a few bytes more.
            assert counted <= sum(sent.values()) <= counted + 8 * WORLD, sent


SCENARIOS = {}


def scenario(function):
    """Registers what every process runs; it returns what the test needs."""
    SCENARIOS[function.__name__] = function
    return function


def part_of(rank: int, counts=UNEVEN, width=24, dtype=torch.float32, seed=5):
    """(this process's two views, all of them); leaves without gradient."""
    r1, r2 = make_views(sum(counts), width, dtype=dtype, seed=seed)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    return r1[own].clone(), r2[own].clone(), r1, r2, own


REFUSED = {
    "width": lambda r1, r2, rank: ((r1[:, : 20 + rank], r2[:, : 20 + rank]), {}),
    "dim": lambda r1, r2, rank: ((r1, r2), {"dim": 10 + (rank == 2)}),
    "dtype": lambda r1, r2, rank: (
        (r1.double(), r2.double()) if rank else (r1, r2),
        {"backend": "torch"},
    ),
    "temperature": lambda r1, r2, rank: ((r1, r2), {"temperature": 0.1 + 0.01 * rank}),
    "tensor": lambda r1, r2, rank: ((r1, r2), {"temperature": _t(0.1) if rank == 1 else 0.1}),
    "columns": lambda r1, r2, rank: ((r1, r2), {"columns": [0, 1 + rank]}),
    "labels": lambda r1, r2, rank: (
        (r1, r2),
        {"labels": torch.arange(len(r1)) if rank != 1 else None},
    ),
    "symmetric": lambda r1, r2, rank: ((r1, r2), {"symmetric": rank != 1}),
    "gather": lambda r1, r2, rank: ((r1, r2), {"gather": "ring" if rank == 3 else "all"}),
    "backend": lambda r1, r2, rank: (
        (r1, r2),
        {"backend": "torch" if rank == 0 else "cpu"},
    ),
    "views": lambda r1, r2, rank: ((r1[: 1 if rank == 3 else None], r2), {}),
    "rows": lambda r1, r2, rank: ((r1[:0], r2[:0]) if rank == 1 else (r1, r2), {}),
    "kind": lambda r1, r2, rank: ((r1.int() if rank == 1 else r1, r2), {}),
    "same": lambda r1, r2, rank: ((r1, r2), {"negatives": "same"}),
    "reference": lambda r1, r2, rank: ((r1, r2), {"backend": "reference"}),
    "option": lambda r1, r2, rank: ((r1, r2), {"gather": "both"}),
    "recording": lambda r1, r2, rank: ((r1.requires_grad_(rank > 0), r2), {}),
}
if not runnable(FLOAT[-1]):
    del REFUSED["backend"]  # this machine has but one
SAID = {
    "width": (ValueError, "width: expected the same in every process, got 20 on rank 0, 21 on"),
    "dim": (ValueError, "dim: expected the same in every process, got 10 on rank 0, 11 on rank 2"),
    "dtype": (ValueError, "dtype: .* got 'float32' on rank 0, 'float64' on rank 1"),
    "temperature": (ValueError, "temperature: .* got 0.1 on rank 0, 0.11 on rank 1"),
    "tensor": (ValueError, "temperature: .* got 0.1 on rank 0, .*tensor.* on rank 1"),
    "columns": (ValueError, "columns: expected the same in every process"),
    "labels": (ValueError, "labels: .* got 'given' on rank 0, None on rank 1"),
    "symmetric": (ValueError, "symmetric: .* got True on rank 0, False on rank 1"),
    "gather": (ValueError, "gather: .* got 'all' on rank 0, 'ring' on rank 3"),
    "backend": (ValueError, "backend: .* got 'torch' on rank 0, 'cpu' on rank 1"),
    "views": (ValueError, "r2: expected 1 rows like r1 over several processes, got 64"),
    "rows": (ValueError, "r1: expected at least one row and column"),
    "kind": ((TypeError, ValueError), "r1: expected float16"),
    "same": (NotImplementedError, "negatives 'same' runs in one process only"),
    "reference": (NotImplementedError, "backend 'reference' runs in one process only"),
    "option": (ValueError, "gather: expected one of 'auto', 'all', 'ring', got 'both'"),
    "recording": (ValueError, "group: expected gradients to be recorded in every process"),
}


@scenario
def refused(rank):
    errors = {}
    for name, change in REFUSED.items():
        r1, r2, *_ = part_of(rank)
        (r1, r2), options = change(r1, r2, rank)
        recording = name != "recording" or rank != 2
        try:
            with torch.set_grad_enabled(recording):
                fast_directclr_loss(r1, r2, **{"dim": 16, "group": "world"} | options)
        except Exception as error:
            errors[name] = error
    return errors


@parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_one_error_in_every_process(processes, name):
    kind, message = SAID[name]
    for rank in range(WORLD):
        error = processes[rank]["refused"][name]
        with pytest.raises(kind, match=message):
            raise error


@scenario
def wishes(rank):
    """Gradients wanted here of r1, there of r2, in one process of nothing."""
    gradients = {}
    for gather in GATHERS:
        for negatives in ("cross", "both"):
            r1, r2, *_ = part_of(rank)
            r1.requires_grad_(rank in (0, 3))
            r2.requires_grad_(rank in (1, 3))
            t = torch.tensor(0.1, requires_grad=rank == 1)
            loss = fast_directclr_loss(
                r1, r2, 16, t, negatives=negatives, gather=gather, group="world"
            )
            loss.backward()
            gradients[gather, negatives] = (r1.grad, r2.grad, t.grad)
    return gradients


@parametrize("gather", GATHERS)
@parametrize("negatives", ["cross", "both"])
def test_processes_may_want_different_gradients(processes, gather, negatives):
    r1, r2 = part_of(0)[2:4]
    one = evaluate(fast_directclr_loss, r1, r2, 16, temperature=_t(0.1), negatives=negatives)
    for rank in range(WORLD):
        own = part_of(rank)[4]
        dr1, dr2, dt = processes[rank]["wishes"][gather, negatives]
        assert (dr1 is None) == (rank not in (0, 3)) and (dr2 is None) == (rank not in (1, 3))
        assert (dt is None) == (rank != 1)
        assert dr1 is None or relative_error(dr1, WORLD * one.dr1[own]) < 1e-6
        assert dr2 is None or relative_error(dr2, WORLD * one.dr2[own]) < 1e-6
        assert dt is None or relative_error(dt, one.dtemperature) < 1e-6


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 30), torch.nn.Tanh(), torch.nn.Linear(30, 24))


class Trained(torch.nn.Module):
    """A model and its loss with a learned temperature, as one would wrap them."""

    def __init__(self, **options):
        super().__init__()
        self.model = small_model()
        self.loss = DirectCLRLoss(16, learnable_temperature=True, **options)

    def forward(self, x1, x2):
        return self.loss(*self.model(torch.cat([x1, x2])).chunk(2))


@scenario
def parallel(rank):
    results = {}
    for gather in GATHERS:
        x1, x2, *_ = part_of(rank, width=12)
        model = torch.nn.parallel.DistributedDataParallel(Trained(group="world", gather=gather))
        loss = model(x1, x2)
        loss.backward()
        results[gather] = [loss.detach()] + [p.grad for p in model.parameters()]
    return results


@parametrize("gather", GATHERS)
def test_ddp_has_the_gradient_of_the_whole_batch(processes, gather):
    _, _, x1, x2, _ = part_of(0, width=12)
    model = Trained()
    loss = model(x1, x2)
    loss.backward()
    want = [loss.detach()] + [p.grad for p in model.parameters()]
    for rank in range(WORLD):
        for got, value in zip(processes[rank]["parallel"][gather], want, strict=True):
            assert relative_error(got, value) < 1e-6


@scenario
def autograd(rank):
    """What the loss does as a citizen of PyTorch, world-wide."""
    r1, r2, *_ = part_of(rank)
    results = {}

    def call(**options):
        inputs = [r.clone().requires_grad_() for r in (r1, r2)]
        return inputs, fast_directclr_loss(*inputs, 16, group="world", **options)

    inputs, loss = call()
    results["first"] = torch.autograd.grad(loss, inputs, retain_graph=True)
    results["again"] = torch.autograd.grad(loss, inputs, retain_graph=True)
    results["scaled"] = torch.autograd.grad(-3.0 * loss, inputs, retain_graph=True)
    # One process asks for less; the others have to get theirs all the same.
    results["narrow"] = torch.autograd.grad(loss, inputs[: 1 + (rank != 2)], retain_graph=True)
    weighed = torch.tensor(float(rank))  # sum over processes of upstream x loss: 0 + 1 + 2 + 3
    results["weighed"] = torch.autograd.grad(loss, inputs, weighed, retain_graph=True)
    try:
        torch.autograd.grad(loss, inputs, create_graph=True)
    except NotImplementedError as error:
        results["double"] = str(error)

    inputs, loss = call(backend="torch")
    results["outside"] = torch.autograd.grad(loss, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inputs, loss = call(backend="torch")
        results["autocast"] = torch.autograd.grad(loss, inputs)
    with torch.no_grad():
        inputs, loss = call()
        results["no_grad"] = (loss.requires_grad, loss)
    results["backend"] = last_backend()

    def compilable(a, b):
        return 2 * fast_directclr_loss(3 * a, b, 16, group="world")

    for name in ("uncompiled", "compiled"):
        if (name, rank) == ("compiled", 0):  # loading the compiler takes as long as all the rest
            compilable = torch.compile(compilable, backend="eager")
        inputs = [r.clone().requires_grad_() for r in (r1, r2)]
        loss = compilable(*inputs)
        results[name] = (loss.detach(), *torch.autograd.grad(loss, inputs))

    scalars = [_t(0.1).requires_grad_(), _t([0.1]).requires_grad_()]
    results["scalars"] = [
        torch.autograd.grad(call(temperature=t)[1], t)[0].reshape(()) for t in scalars
    ]
    try:
        torch.func.grad(lambda a: fast_directclr_loss(a, r2, 16, group="world"))(r1)
    except NotImplementedError as error:
        results["transformed"] = str(error)

    loss, stats = info_nce(r1, r2, group="world", gather="ring", return_stats=True)
    results["info_nce"] = (loss, stats.col_lse)
    alone = fast_directclr_loss(r1, r2, 16, group="world", return_stats=rank == 0)
    results["alone"] = alone[1].col_top1 if rank == 0 else alone
    return results


def test_autograd_over_processes(processes):
    _, _, r1, r2, _ = part_of(0)
    for rank in range(WORLD):
        results, own = processes[rank]["autograd"], part_of(rank)[4]
        one = evaluate(fast_directclr_loss, r1, r2, 16)
        for got, want in zip(results["first"], (one.dr1[own], one.dr2[own])):
            assert relative_error(got, WORLD * want) < 1e-6
        for name, factor in (("again", 1), ("narrow", 1), ("scaled", -3)):
            for got, want in zip(results[name], results["first"]):
                assert relative_error(got, factor * want) < (1e-6 if factor < 0 else 1e-9), name
        assert all(map(torch.equal, results["autocast"], results["outside"]))
        for got, want in zip(results["weighed"], results["first"]):
            assert relative_error(got, 6 / WORLD * want) < 1e-6
        assert "no second derivative" in results["double"]
        requires_grad, loss = results["no_grad"]
        assert not requires_grad and relative_error(loss, one.loss) < 1e-6
        assert results["backend"] == last_backend()
        assert all(map(torch.equal, results["compiled"], results["uncompiled"]))
        assert torch.equal(*results["scalars"])
        assert "torch.func and forward-mode AD run in one process only" in results["transformed"]
        loss, col_lse = results["info_nce"]
        assert relative_error(loss, info_nce(r1, r2)) < 1e-6 and col_lse is None
    _, stats = fast_directclr_loss(r1, r2, 16, return_stats=True)
    assert torch.equal(processes[0]["autograd"]["alone"], stats.col_top1[part_of(0)[4]])
    assert relative_error(processes[1]["autograd"]["alone"], one.loss) < 1e-6


@scenario
def gathers(rank):
    """Which way "auto" takes, the promise of even batches, other groups."""
    r1, r2, *_ = part_of(rank, EVEN)
    results = {}
    with counted(Ring, "shift") as shifts:
        fast_directclr_loss(r1, r2, 16, group="world")
    results["below"] = len(shifts)
    limit, distributed.ALL_GATHER_BYTES = distributed.ALL_GATHER_BYTES, 100
    with counted(Ring, "shift") as shifts:
        fast_directclr_loss(r1, r2, 16, group="world")
    results["above"] = len(shifts)
    distributed.ALL_GATHER_BYTES = limit

    # As on GPUs: by a reduce-scatter, of even rows and of uneven ones.
    here, world.SUMMED_BY_OWNERS = world.SUMMED_BY_OWNERS, ()
    with counted(world, "reduce_scatter") as scatters:
        results["scattered"] = [evaluate(fast_directclr_loss, r1, r2, 16, group="world")]
        s1, s2, *_ = part_of(rank)
        results["scattered"] += [evaluate(fast_directclr_loss, s1, s2, 16, group="world")]
    world.SUMMED_BY_OWNERS = here
    results["scatters"] = len(scatters)

    with counted(distributed, "_exchange") as exchanges:
        promised = evaluate(fast_directclr_loss, r1, r2, 16, group="world", even_batches=True)
    results["promised"] = (len(exchanges), promised.loss, promised.dr1)

    # As with NCCL, which takes no host tensors: through a group of its own, made once.
    config, dist.get_backend_config = dist.get_backend_config, lambda group: "cuda:nccl"
    with counted(dist, "ProcessGroupGloo") as made:
        losses = [fast_directclr_loss(r1, r2, 16, group="world") for _ in range(2)]
    dist.get_backend_config = config
    results["companion"] = (len(made), *losses)
    results["patience"] = made[0][3:]  # not Gloo's half hour

    alone = dist.new_group([rank], use_local_synchronization=True)
    with counted(distributed, "loss") as calls:
        losses = [fast_directclr_loss(r1, r2, 16, group=group) for group in (alone, None)]
    results["one"] = (len(calls), *losses)

    pair = dist.new_group([1, 3])
    if rank in (1, 3):
        result = evaluate(fast_directclr_loss, r1, r2, 16, group=pair, gather="ring")
        results["pair"] = (result.loss, result.dr1, result.dr2)
    return results


def test_auto_takes_the_ring_above_the_limit(processes):
    for rank in range(WORLD):
        assert processes[rank]["gathers"]["below"] == 0
        assert processes[rank]["gathers"]["above"] == WORLD - 1


def test_dz2_by_a_reduce_scatter_is_the_same(processes):
    for number, counts in enumerate((EVEN, UNEVEN)):
        _, _, r1, r2, _ = part_of(0, counts)
        one = evaluate(fast_directclr_loss, r1, r2, 16)
        for rank in range(WORLD):
            got, own = processes[rank]["gathers"]["scattered"][number], part_of(rank, counts)[4]
            assert relative_error(got.dr2, WORLD * one.dr2[own]) < 1e-6
            assert processes[rank]["gathers"]["scatters"] == 2


def test_promised_even_batches_exchange_nothing_first(processes):
    _, _, r1, r2, _ = part_of(0, EVEN)
    one = evaluate(fast_directclr_loss, r1, r2, 16)
    for rank in range(WORLD):
        exchanges, loss, dr1 = processes[rank]["gathers"]["promised"]
        assert exchanges == 0 and relative_error(loss, one.loss) < 1e-6
        assert relative_error(dr1, WORLD * one.dr1[part_of(rank, EVEN)[4]]) < 1e-6


def test_a_group_without_host_tensors_gets_a_companion(processes):
    for rank in range(WORLD):
        made, first, second = processes[rank]["gathers"]["companion"]
        assert made == 1 and torch.equal(first, second)
        assert processes[rank]["gathers"]["patience"] == (PATIENCE,)
        assert torch.equal(first, processes[rank]["gathers"]["promised"][1])


def test_a_group_of_some_of_the_processes(processes):
    views = [part_of(rank, EVEN)[:2] for rank in (1, 3)]
    r1, r2 = (torch.cat(rows) for rows in zip(*views))
    one = evaluate(fast_directclr_loss, r1, r2, 16)
    for rank, own in ((1, slice(0, 16)), (3, slice(16, 32))):
        loss, dr1, dr2 = processes[rank]["gathers"]["pair"]
        assert relative_error(loss, one.loss) < 1e-6
        assert relative_error(dr1, 2 * one.dr1[own]) < 1e-6
        assert relative_error(dr2, 2 * one.dr2[own]) < 1e-6


BLOCKS = [
    Case(
        f"{backend}-{precision}-{temperature}",
        {"backend": backend, "precision": precision, "temperature": temperature},
    )
    for backend in ("torch", "cpu", "triton")  # triton: where it interprets its kernels
    for precision, temperature in (("auto", 0.1), ("auto", 0.005), ("bf16", 0.1))
]


@parametrize("case", [pytest.param(c, id=c.name) for c in BLOCKS if runnable(c)])
def test_a_block_without_positives_leaves_nothing_out(case):
    """``row_offset`` = candidates: what the ring passes for the blocks of other processes."""
    backend, precision, temperature = case.options.values()
    rows, candidates, dim = 13, 37, 20
    problem = Problem(
        rows=rows, candidates=candidates, width=24, dim=dim, dtype=torch.float32,
        device_type="cpu", temperature=temperature, row_offset=candidates, precision=precision,
    )  # fmt: skip
    stages = dispatch.load(backend)
    r1, r2 = make_views(rows, 24, candidates=candidates)
    z1, z2 = (stages.normalize(problem, r, None)[0] for r in (r1, r2))
    scale = 1 / temperature
    none = stages.kept_buffer(problem, z1)
    row, col = stages.sums(problem, z1, z2, scale, none)
    unit1, unit2 = (stages.unit_rows(problem, z).double() for z in (z1, z2))
    if backend == "triton" and precision == "bf16":  # of a row's parts the first is multiplied
        unit1, unit2 = (z[:, :dim].double() / stages._layout(problem, z).unit for z in (z1, z2))
    s = (unit1 @ unit2.T) * scale
    loose = 1e-6 * scale if precision == "auto" else 2e-3 * scale
    assert (row - s.logsumexp(1)).abs().max() < loose
    assert (col - s.logsumexp(0)).abs().max() < loose
    w, v = torch.rand(rows, dtype=torch.float64), torch.rand(candidates, dtype=torch.float64)
    pair = Weights(w, s.logsumexp(1), v, s.logsumexp(0), torch.full_like(w, 1e6))
    dz1, dz2 = stages.products(problem, z1, z2, scale, pair, none, (True, True))
    g = w[:, None] * s.softmax(1) + v * s.softmax(0)
    loose = 1e-5 if precision == "auto" else 3e-2
    assert relative_error(dz1[:, :dim], g @ unit2) < loose * max(1, scale / 100)
    assert relative_error(dz2[:, :dim], g.T @ unit1) < loose * max(1, scale / 100)


def test_a_group_of_one_takes_the_ordinary_path(processes):
    for rank in range(WORLD):
        calls, alone, ungrouped = processes[rank]["gathers"]["one"]
        assert calls == 0 and torch.equal(alone, ungrouped)


@contextlib.contextmanager
def counted(owner, name):
    """The calls of ``owner.name`` in a list."""
    calls, function = [], getattr(owner, name)

    def counting(*args, **kw):
        calls.append(args)
        return function(*args, **kw)

    setattr(owner, name, counting)
    try:
        yield calls
    finally:
        setattr(owner, name, function)


class Counting:
    """A backend that counts the operations it is asked for and the largest z it sees."""

    def __init__(self, backend):
        self.backend, self.operations, self.held, self.pitch = backend, 0, 0, 0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def sums(self, problem, z1, z2, *rest):
        self.operations += 2 * len(z1) * len(z2) * problem.dim
        self.held, self.pitch = max(self.held, len(z2)), z2.shape[1]
        return self.backend.sums(problem, z1, z2, *rest)

    def products(self, problem, z1, z2, scale, pair, kept, need, *rest):
        self.operations += 2 * (1 + sum(need)) * len(z1) * len(z2) * problem.dim
        return self.backend.products(problem, z1, z2, scale, pair, kept, need, *rest)


def operations(rank, size, group, gather, negatives):
    """One step under a counter."""
    case = Case("", counts=EVEN)
    own = case.own(size, rank)
    r1, r2 = (r[own].requires_grad_() for r in case.views(size))
    load, counter = dispatch.load, Counting(dispatch.load("torch"))
    dispatch.load = lambda name: counter
    owners = {
        "all_gather": world,
        "reduce_scatter": world,
        "all_to_all_single": dist,
        "P2POp": dist,
    }
    with contextlib.ExitStack() as stack:
        calls = {n: stack.enter_context(counted(owner, n)) for n, owner in owners.items()}
        stack.enter_context(counted(distributed, "_exchange"))
        loss = fast_directclr_loss(
            r1, r2, 40, group=group, gather=gather, negatives=negatives, backend="torch",
            even_batches=True, workspace_bytes=0,
        )  # fmt: skip
        loss.backward()
    dispatch.load = load
    sent = {"pitch": counter.pitch}
    for name, arguments in calls.items():
        for first, second, *_ in arguments:
            if name == "P2POp":
                sent[name] = sent.get(name, 0) + (first is dist.isend) * second.nbytes
            else:  # (output, input): what leaves is the input, to or for the size - 1 others
                whole = max(first.nbytes, second.nbytes)
                sent[name] = sent.get(name, 0) + whole * (size - 1) // size
    return {"operations": counter.operations, "rows held": counter.held, "sent": sent}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of the four processes has written: a dict per rank."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this PyTorch has no Gloo")
    folder = tmp_path_factory.mktemp("distributed")
    commands = [[sys.executable, __file__, rank, folder] for rank in range(WORLD)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = waiting.together(commands, folder, env=environment)
    for rank, done in enumerate(ended):
        assert done.returncode in (0, -signal.SIGKILL), f"rank {rank}:\n{done.stderr[-4000:]}"
    assert not any(done.returncode for done in ended)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def main(rank: int, folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    meeting = {"init_method": f"file://{folder}/init", "world_size": WORLD, "rank": rank}
    dist.init_process_group("gloo", timeout=PATIENCE, **meeting)
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    results = {}
    for size in SIZES[rank:]:
        for name, case in CASES.items():
            print(size, name, flush=True)  # who waits for this process sees that it gets on
            own = case.own(size, rank)
            r1, r2 = (r[own] for r in case.views(size))
            upstream = case.upstream(size)
            upstream = upstream[own] if upstream.dim() else upstream
            arguments = case.arguments(own) | {"group": groups[size]}
            for gather in GATHERS:
                runs = [
                    evaluate(
                        fast_directclr_loss, r1, r2, upstream=upstream, gather=gather, **arguments
                    )
                    for _ in range(2)
                ]
                _, stats = fast_directclr_loss(
                    r1, r2, gather=gather, return_stats=True, **arguments
                )
                same = all(a is None or torch.equal(a, b) for a, b in zip(*runs))
                results[size, gather, name] = {"result": (*runs[0], stats), "repeats": same}
        for gather in GATHERS:
            for negatives in ("cross", "both") if size > 1 else ():
                results["operations", size, gather, negatives] = operations(
                    rank, size, groups[size], gather, negatives
                )
    for name, function in SCENARIOS.items():
        print(name, flush=True)
        results[name] = function(rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
