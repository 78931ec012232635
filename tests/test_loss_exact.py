"""The blocked backends against the reference in fp64, and against eager PyTorch in each dtype."""

from __future__ import annotations

import itertools
import math
import random

import extended
import pytest
import torch

from directclr_fast import fast_directclr_loss
from directclr_fast.backends import torch_blocked
from directclr_fast.testing import (
    KINDS,
    backends,
    bound,
    eager_loss,
    evaluate,
    make_views,
    relative_error,
)

BACKENDS = backends()
TEMPERATURES = (0.001, 0.01, 0.05, 0.1, 0.5, 1.0, 10.0)
# One row, primes, one below, at and above the tile edges, and ragged pairs.
ROWS = (1, 2, 3, 5, 7, 16, 31, 63, 64, 65, 97)
DIMS = (1, 2, 3, 8, 15, 16, 17, 33)
CHUNKS = 20
CASES_PER_CHUNK = 110


def generated_case(seed: int) -> dict:
    """One call drawn from every option; the same seed gives the same case on every machine."""
    draw = random.Random(seed)
    rows = draw.choice(ROWS)
    negatives = draw.choice(("cross", "cross", "both"))
    extra = draw.choice((0, 0, 1, 9)) if negatives == "cross" else 0
    dim = draw.choice(DIMS)
    groups = draw.choice((0, 0, 0, 1, 3))
    return {
        "rows": rows,
        "candidates": rows + extra,
        "width": dim + draw.choice((0, 1, 13)),
        "dim": dim,
        "groups": groups,
        "kind": draw.choice(KINDS),
        "layout": draw.choice(("contiguous", "transposed", "offset", "strided", "expanded")),
        "temperature": draw.choice(TEMPERATURES),
        "tensor_temperature": draw.random() < 0.3,
        "negatives": negatives,
        "symmetric": draw.random() < 0.7,
        "reduction": draw.choice(("mean", "sum", "none")),
        "workspace": draw.choice((None, 0, 2 * 8 * 24 * 20, 2**24)),
        "seed": seed,
    }


def lay_out(r: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides; "expanded" makes all rows one row in memory."""
    if layout == "transposed":
        return r.T.contiguous().T
    if layout == "offset":
        return torch.cat([r[:1], r])[1:]
    if layout == "strided":
        return r.repeat_interleave(2, 1)[:, ::2]
    return r[:1].expand_as(r) if layout == "expanded" else r


def arguments_of(case: dict, dtype: torch.dtype):
    """(views, options) of a generated case."""
    r1, r2 = make_views(
        case["rows"],
        case["width"],
        candidates=case["candidates"],
        kind=case["kind"],
        seed=case["seed"],
    )
    r1, r2 = lay_out(r1, case["layout"]).to(dtype), lay_out(r2, case["layout"]).to(dtype)
    temperature = case["temperature"]
    if case["tensor_temperature"]:
        temperature = torch.tensor(temperature, dtype=torch.float64)
    generator = torch.Generator().manual_seed(case["seed"])
    options = {
        "temperature": temperature,
        "negatives": case["negatives"],
        "symmetric": case["symmetric"],
        "reduction": case["reduction"],
    }
    if case["groups"]:
        options["columns"] = torch.stack(
            [
                torch.randperm(case["width"], generator=generator)[: case["dim"]]
                for _ in range(case["groups"])
            ]
        )
        options["dim"] = None
    else:
        options["dim"] = case["dim"]
    upstream = torch.randn(
        case["rows"] if case["reduction"] == "none" else (), generator=generator
    ).double()
    return r1, r2, upstream, options


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_generated_cases_match_the_formula_in_fp64(backend, chunk):
    """Truth has more bits than fp64, and the bound is what any order of additions may leave."""
    for seed in range(chunk * CASES_PER_CHUNK, (chunk + 1) * CASES_PER_CHUNK, extended.STRIDE):
        case = generated_case(seed)
        r1, r2, upstream, options = arguments_of(case, torch.float64)
        ours = evaluate(
            fast_directclr_loss,
            r1,
            r2,
            upstream=upstream,
            backend=backend,
            workspace_bytes=case["workspace"],
            **options,
        )
        truth = extended.infonce(r1, r2, upstream, **options)
        allowed = extended.rounding(r1, r2, upstream, **options)
        for name, got, want, limit in zip(ours._fields, ours, truth, allowed):
            if got is not None:
                error = extended.distance(got, want)
                assert error <= limit, (error, limit, name, case)


def test_the_two_kinds_of_wide_numbers_agree():
    """long double and mpmath, in the smallest of the generated cases with every option."""
    if not extended.WIDE:
        pytest.skip("this platform's long double is no wider than a double")
    seen = set()
    for seed in range(400):
        case = generated_case(seed)
        if case["rows"] > 7 or case["dim"] > 8:
            continue
        r1, r2, upstream, options = arguments_of(case, torch.float64)
        seen.add((case["negatives"], case["symmetric"], case["reduction"], case["groups"] > 1))
        narrow = extended.rounding(r1, r2, upstream, **options)
        results = [
            extended.infonce(r1, r2, upstream, arithmetic=kind, **options)
            for kind in (extended.LONG_DOUBLE, extended.MPMATH)
        ]
        for got, want, limit in zip(*results, narrow):
            assert extended.distance(got, want) <= limit / 500, case
    assert len(seen) > 15


def conditioning(case: dict, r1, r2, upstream) -> dict[str, float]:
    """Rounding that every method is left with: that of a s, some ulps of a = 1/temperature.

    It moves the loss by its own size, a gradient by a (and 1/|x|) times it, and the gradient of the
    temperature, a^2 sum G s, by a^2 times it.
    """
    a = 1 / case["temperature"]
    total = float(upstream.abs().sum()) * max(1, case["groups"])
    total *= case["rows"] if case["reduction"] == "sum" else 1
    ulps = 8 * torch.finfo(torch.float64).eps * max(a, 1) * total
    if case["groups"]:
        shortest = min(float(r.abs().min()) for r in (r1, r2))
    else:
        shortest = min(float(r[:, : case["dim"]].norm(dim=1).min()) for r in (r1, r2))
    dr = ulps * a / max(shortest, 1e-12)
    return {"loss": ulps, "dr1": dr, "dr2": dr, "dtemperature": ulps * a * a}


EXACT_SHAPES = [
    pytest.param(1, 4, 3, id="one-row"),
    pytest.param(2, 17, 17, id="two-rows"),
    pytest.param(127, 64, 1, id="one-column"),
    pytest.param(129, 700, 360, id="slice-of-a-width-above-a-tile"),
    pytest.param(257, 130, 127, id="primes"),
    pytest.param(521, 400, 360, id="several-blocks"),
]


@pytest.mark.parametrize("kind", ["unrelated", "views", "converged", "clustered", "ties"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows,width,dim", EXACT_SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_at_most_twice_that_of_eager(backend, rows, width, dim, dtype, kind):
    r1, r2 = make_views(rows, width, kind=kind, dtype=dtype)
    for negatives, temperature in itertools.product(("cross", "both"), (0.1, 0.02)):
        options = {"dim": dim, "temperature": temperature, "negatives": negatives}
        upstream = torch.tensor(0.75)
        truth = evaluate(eager_loss, r1.double(), r2.double(), upstream=upstream, **options)
        eager = evaluate(eager_loss, r1, r2, upstream=upstream, **options)
        ours = evaluate(fast_directclr_loss, r1, r2, upstream=upstream, backend=backend, **options)
        assert ours.dr1.dtype == dtype and ours.dr2.dtype == dtype
        assert ours.loss.dtype == torch.float32
        for name, got, want, of_eager in zip(ours._fields[:3], ours, truth, eager):
            # One row and near-perfect positives leave gradients that are all rounding.
            allowed = bound(relative_error(of_eager, want), dtype)
            absolute = float((got.double() - want).norm())
            assert relative_error(got, want) <= allowed or absolute < 1e-12, (name, options)


def near_one_hot(rows, dim):
    """Views with one large entry each, in few places: s near 1, where products round most."""
    generator = torch.Generator().manual_seed(3)
    base = 0.02 * torch.randn(rows, dim, generator=generator)
    base[torch.arange(rows), torch.randint(0, dim // 2, (rows,), generator=generator)] += 1
    return (base + 0.005 * torch.randn(rows, dim, generator=generator) for _ in range(2))


TIE_SHAPES = [(17, 360), (40, 24), (65, 33), (129, 360), (521, 360)]


TIE_OPTIONS = [*itertools.product((0.1, 0.02, 0.005, 0.001), ("cross", "both"), (True, False))]


def assert_ties_are_kept(backend, r1, r2, options=TIE_OPTIONS):
    """Where equal rows have unequal products the error is a times their rounding, 1e-5 to 1e-3;
    eager PyTorch, with one product for all of them, errs by 1e-7 at every temperature."""
    for temperature, negatives, symmetric in options:
        options = {"temperature": temperature, "negatives": negatives, "symmetric": symmetric}
        truth = evaluate(eager_loss, r1.double(), r2.double(), None, **options)
        eager = evaluate(eager_loss, r1, r2, None, **options)
        ours = evaluate(fast_directclr_loss, r1, r2, None, backend=backend, **options)
        for name, got, want, of_eager in zip(ours._fields[:3], ours, truth, eager):
            allowed = bound(relative_error(of_eager, want), r1.dtype)
            assert relative_error(got, want) <= allowed, (name, options)


def library_keeps_ties(rows: int, dim: int) -> bool:
    """Whether torch's own products of equal rows are one number at the backend's block sizes."""
    sizes = set()
    for block in (torch_blocked.BLOCK_M, torch_blocked.BLOCK_N):
        parts = -(-rows // block)
        sizes |= {rows // parts, -(-rows // parts)}
    z = torch.nn.functional.normalize(torch.randn(1, dim)).repeat(rows, 1)
    products = [z[:m] @ z[:n].T for m in sizes for n in sizes]
    return all((s == products[0][0, 0]).all() for s in products)


@pytest.mark.parametrize("rows,dim", TIE_SHAPES)
@pytest.mark.parametrize("same", [False, True], ids=["views", "one-tensor"])
def test_equal_rows_stay_equal(rows, dim, same):
    if not library_keeps_ties(rows, dim):
        pytest.skip("this library's product does not give equal rows equal numbers")
    r1, r2 = make_views(rows, dim, kind="ties")
    assert_ties_are_kept("torch", r1, r1 if same else r2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [17, 513, 1025])
def test_one_row_many_times_is_log_of_their_number(backend, rows):
    """At the largest a, in every row: also where blocks would leave over one column, which
    libraries multiply in another way."""
    if backend == "torch" and not library_keeps_ties(rows, 40):
        pytest.skip("this library's product does not give equal rows equal numbers")
    r = make_views(1, 40)[0].repeat(rows, 1)
    options = {"temperature": 0.001, "reduction": "none", "backend": backend}
    loss = fast_directclr_loss(r, r, None, **options)
    assert (loss - math.log(rows)).abs().max() < 2e-6
    loss = fast_directclr_loss(r, r, None, negatives="both", **options)
    assert (loss - math.log(2 * rows - 1)).abs().max() < 2e-6


def loss_without_cancellation(r1, r2, temperature):
    """The symmetric loss as log1p of the other candidates' share, whose gradient needs no p - 1."""
    z1, z2 = (torch.nn.functional.normalize(r, dim=1) for r in (r1, r2))
    s = z1 @ z2.T / temperature
    positives = s.diagonal()
    others = s.masked_fill(torch.eye(len(s), dtype=torch.bool), float("-inf"))
    rows = torch.log1p(torch.exp(others - positives[:, None]).sum(1))
    columns = torch.log1p(torch.exp(others - positives[None, :]).sum(0))
    return ((rows + columns) / 2).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.02])
def test_a_converged_pair_keeps_its_relative_accuracy(backend, temperature):
    """With 1 - p_ii from 1e-2 to 1e-18: eager fp32 and even fp64 lose it to cancellation."""
    r1, r2 = make_views(96, 64, kind="converged", dtype=torch.float32)
    truth = evaluate(loss_without_cancellation, r1.double(), r2.double(), temperature=temperature)
    ours = evaluate(fast_directclr_loss, r1, r2, None, temperature=temperature, backend=backend)
    assert 0 < float(truth.loss) < 0.05
    # What is left is the rounding of a s_ij in fp32: that of z, and of a sum of 64 products, which
    # a library takes in the order it likes; eps sqrt(64) / 2 if its roundings are independent.
    allowed = 64**0.5 / 2 * torch.finfo(torch.float32).eps / temperature
    assert relative_error(ours.loss, truth.loss) < allowed
    for got, want in ((ours.dr1, truth.dr1), (ours.dr2, truth.dr2)):
        rows = (got.double() - want).norm(dim=1) / want.norm(dim=1)
        assert float(rows.max()) < 2 * allowed  # of the most converged row, too


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_hard_rows_stay_finite_and_right(backend, temperature):
    r1, r2 = make_views(40, 24, kind="unrelated", dtype=torch.float32)
    r1[3], r2[5] = 0.0, 0.0  # zero rows follow F.normalize
    r1[7] *= 1e19  # squares overflow fp32
    r2[9] *= 1e-25  # squares vanish in fp32; shorter than eps
    r1[11] = -r2[11]
    r1[12] = r1[13]
    options = {"dim": 20, "temperature": temperature}
    truth = evaluate(fast_directclr_loss, r1.double(), r2.double(), backend="reference", **options)
    ours = evaluate(fast_directclr_loss, r1, r2, backend=backend, **options)
    assert relative_error(ours.loss, truth.loss) < 1e-5
    for got, want in ((ours.dr1, truth.dr1), (ours.dr2, truth.dr2)):
        assert torch.isfinite(got).all()
        for row in range(40):  # by row: lengths differ by 40 orders of magnitude
            scale = float(want[row].norm())
            assert relative_error(got[row], want[row]) < 1e-4 / min(temperature, 1) or scale < 1e-30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("negatives", ["cross", "both"])
def test_rows_shorter_than_eps_are_divided_by_it(backend, negatives, eps=0.5):
    """Their gradient has no projection, as that of F.normalize; a large eps makes it matter."""
    r1, r2 = make_views(20, 12, dtype=torch.float32)
    r1[4] *= 0.8 * eps / r1[4].norm()
    r2[7] *= 0.4 * eps / r2[7].norm()
    options = {"dim": None, "negatives": negatives, "eps": eps}
    truth = evaluate(eager_loss, r1.double(), r2.double(), **options)
    ours = evaluate(fast_directclr_loss, r1, r2, backend=backend, **options)
    for got, want in zip(ours[:3], truth):
        assert relative_error(got, want) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_reach_the_loss(backend, bad):
    r1, r2 = make_views(9, 8, dtype=torch.float32)
    r1[4, 2] = bad
    result = evaluate(fast_directclr_loss, r1, r2, 6, backend=backend)
    assert not torch.isfinite(result.loss)
    eager = evaluate(eager_loss, r1, r2, 6)
    for got, want in zip(result[1:3], eager[1:3]):
        assert torch.equal(got.isnan(), want.isnan())
    r1[4, 2], r1[4, 7] = 0.0, bad  # outside the sub-vector it is nobody's business
    assert torch.isfinite(evaluate(fast_directclr_loss, r1, r2, 6, backend=backend).loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace", [None, 0, 2**30])
def test_repeat_runs_are_bitwise_equal(backend, workspace):
    r1, r2 = make_views(700, 80, dtype=torch.float32)
    runs = [
        evaluate(
            fast_directclr_loss,
            r1,
            r2,
            60,
            temperature=torch.tensor(0.1),
            backend=backend,
            workspace_bytes=workspace,
        )
        for _ in range(3)
    ]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


def test_highest_precision_ignores_the_process_setting():
    """The same bits under both, whatever a library rounds to where it is allowed to."""
    r1, r2 = make_views(256, 128, dtype=torch.float32)
    results, before = [], torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "medium"):
            torch.set_float32_matmul_precision(setting)
            results.append(
                evaluate(fast_directclr_loss, r1, r2, None, precision="highest", backend="torch")
            )
            assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(a, b) for a, b in zip(*(result[:3] for result in results)))
