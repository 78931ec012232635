"""The C++ stages against numpy in fp64, every instruction-set body forced in turn.

The bound is the project's: at most twice the error that PyTorch's eager fp32 makes on the same
input, with a floor of a few ulps for the cases where eager happens to be exact.
"""

import math
import os
import sys
import threading

import numpy as np
import pytest
import torch

try:
    from directclr_fast import _cpu
except ImportError as error:
    pytest.skip(f"the compiled CPU kernels are not there: {error}", allow_module_level=True)

# The references are small, and PyTorch's OpenMP pool does not survive the fork below.
pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 1e-12
ULP = 2.0**-23
DTYPES = {torch.float32: _cpu.FLOAT32, torch.float16: _cpu.FLOAT16, torch.bfloat16: _cpu.BFLOAT16}


@pytest.fixture(params=_cpu.available_isas())
def isa(request):
    _cpu.force_isa(request.param)
    yield request.param
    _cpu.force_isa("")


@pytest.fixture
def widest():
    _cpu.force_isa("")


def filled(*shape, dtype=torch.float32):
    """NaN, so that an entry that nobody writes shows."""
    return torch.full(shape, math.nan, dtype=dtype)


def view(x, cols=None):
    """x: (rows, d), or the full (rows, width) with an int64 column list."""
    address = 0 if cols is None else cols.data_ptr()
    return (x.data_ptr(), DTYPES[x.dtype], x.stride(0), x.stride(1), address)


class Native:
    """One pair of views through the stages, as the driver runs them."""

    def __init__(
        self,
        x1,
        x2,
        temperature=0.1,
        offset=0,
        cols=None,
        operands=_cpu.FP32,
        keep=0.0,
        threads=2,
        symmetric=True,
    ):
        self.x1, self.x2, self.cols = x1, x2, cols
        self.m, self.n = x1.shape[0], x2.shape[0]
        self.d = x1.shape[1] if cols is None else len(cols)
        self.offset, self.scale, self.threads = offset, 1 / temperature, threads
        self.operands = operands
        pitch = _cpu.pitch(self.d)
        self.z1, self.z2 = filled(self.m, pitch), filled(self.n, pitch)
        self.rnorm1, self.rnorm2 = filled(self.m), filled(self.n)
        self.bytes = int(_cpu.workspace_bytes(self.m, self.n) * keep)
        self.workspace = filled(self.bytes // 4 + 1)
        for x, z, rnorm in ((x1, self.z1, self.rnorm1), (x2, self.z2, self.rnorm2)):
            _cpu.normalize(
                x=view(x, cols),
                rows=len(x),
                d=self.d,
                eps=EPS,
                z=z.data_ptr(),
                rnorm=rnorm.data_ptr(),
                threads=threads,
            )
        self.logits = filled(self.m, dtype=torch.float64)
        rows, columns = (torch.zeros(2, k, dtype=torch.float64) for k in (self.m, self.n))
        self.column_sums = columns
        _cpu.sums(
            **self.pair(),
            row_sum=rows[0].data_ptr(),
            row_ref=rows[1].data_ptr(),
            col_sum=columns[0].data_ptr() if symmetric else 0,
            col_ref=columns[1].data_ptr() if symmetric else 0,
            logits=self.logits.data_ptr(),
        )
        rest_row, rest_col = ((x[0].log2() + x[1]) * math.log(2) for x in (rows, columns))
        self.own = slice(offset, offset + self.m)
        logits, zero = self.logits, torch.zeros_like(self.logits)
        self.nll_row = torch.logaddexp(rest_row - logits, zero)
        self.nll_col = torch.logaddexp(rest_col[self.own] - logits, zero)
        self.row_lse = logits + self.nll_row
        self.col_lse = rest_col.clone()
        self.col_lse[self.own] = logits + self.nll_col

    def pair(self):
        return dict(
            z1=self.z1.data_ptr(),
            z2=self.z2.data_ptr(),
            m=self.m,
            n=self.n,
            d=self.d,
            row_offset=self.offset,
            scale=self.scale,
            upper=False,
            operands=self.operands,
            workspace=self.workspace.data_ptr() if self.bytes else 0,
            workspace_bytes=self.bytes,
            threads=self.threads,
        )

    def losses(self):
        return self.nll_row.double(), self.nll_col.double()

    def own_similarities(self):
        """The positives' s_i as the tiles have them."""
        sums, tops = torch.zeros(2, self.m, dtype=torch.float64), torch.zeros(2, self.m)
        own = filled(self.m)
        _cpu.sums(
            **self.pair(),
            row_sum=sums[0].data_ptr(),
            row_ref=sums[1].data_ptr(),
            col_sum=0,
            col_ref=0,
            logits=0,
            row_top=tops[0].data_ptr(),
            own=own.data_ptr(),
        )
        return own

    def backward(self, wr, wc, need1=True, need2=True, dtype=None):
        """wr: (m), wc: (n) or None. Returns the gradients of x1 and x2 and the row dots' sums."""
        pitch = _cpu.pitch(self.d)
        self.dz1, self.dz2 = torch.zeros(self.m, pitch), torch.zeros(self.n, pitch)
        row = self.scale * wr.double()
        diagonal = row * torch.expm1(-self.nll_row)
        column = None
        if wc is not None:
            column = self.scale * wc.double()
            diagonal = diagonal + column[self.own] * torch.expm1(-self.nll_col)
        _cpu.products(
            **self.pair(),
            row_weight=row.data_ptr(),
            col_weight=0 if wc is None else column.data_ptr(),
            row_lse=self.row_lse.data_ptr(),
            col_lse=0 if wc is None else self.col_lse.data_ptr(),
            diagonal=diagonal.data_ptr(),
            dz1=self.dz1.data_ptr() if need1 else 0,
            dz2=self.dz2.data_ptr() if need2 else 0,
        )
        grads, self.dots = [], []
        for x, z, rnorm, dz, need in (
            (self.x1, self.z1, self.rnorm1, self.dz1, need1),
            (self.x2, self.z2, self.rnorm2, self.dz2, need2),
        ):
            g = filled(x.shape[0], x.shape[1], dtype=dtype or x.dtype)
            grads.append(g)
            if not need:
                self.dots.append(0.0)
                continue
            address = 0 if self.cols is None else self.cols.data_ptr()
            target = (g.data_ptr(), DTYPES[g.dtype], *g.stride(), address, g.shape[1], True)
            self.dots.append(
                _cpu.finish(
                    z=z.data_ptr(),
                    dz=dz.data_ptr(),
                    rnorm=rnorm.data_ptr(),
                    rows=len(x),
                    d=self.d,
                    eps=EPS,
                    grad=target,
                    threads=self.threads,
                )
            )
        return grads


def eager_step(
    x1, x2, wr, wc, temperature=0.1, offset=0, dtype=torch.float64, product=torch.matmul
):
    """The same in eager PyTorch: per-row losses, gradients of x1 and x2, temperature gradient."""
    x1, x2 = (x.to(dtype).detach().clone().requires_grad_() for x in (x1, x2))
    scale = torch.tensor(1 / temperature, dtype=dtype, requires_grad=True)
    z1, z2 = (torch.nn.functional.normalize(x, eps=EPS) for x in (x1, x2))
    s = scale * product(z1, z2.T)
    rows = torch.arange(len(x1))
    if dtype == torch.float64:
        # softplus of what the others add to the positive: p - 1 would cancel even in fp64.
        pos = s[rows, rows + offset]
        rest = s.masked_fill(torch.arange(len(x2)) == rows[:, None] + offset, -math.inf)
        nll_row = torch.logaddexp(torch.zeros_like(pos), torch.logsumexp(rest, 1) - pos)
        nll_col = torch.logaddexp(
            torch.zeros_like(pos), torch.logsumexp(rest[:, rows + offset], 0) - pos
        )
        if len(x2) == 1:
            nll_row = nll_col = 0 * pos
    else:
        nll_row = -torch.log_softmax(s, 1)[rows, rows + offset]
        nll_col = -torch.log_softmax(s, 0)[rows, rows + offset]
    # Columns without a positive have a gradient too: that of wc_j times their log-sum-exp.
    without = torch.ones(len(x2), dtype=dtype)
    without[rows + offset] = 0
    total = (wr.to(dtype) * nll_row).sum()
    if wc is not None:
        total = total + (wc.to(dtype)[rows + offset] * nll_col).sum()
        total = total + (wc.to(dtype) * without * torch.logsumexp(s, 0)).sum()
    g1, g2, ga = torch.autograd.grad(total, (x1, x2, scale))
    return nll_row.detach(), nll_col.detach(), g1, g2, ga


def error(x, truth):
    truth = truth.double()
    return float((x.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def views(m, n, d, offset=0, noise=0.5, seed=0):
    """Two views of the same points, the rest unrelated."""
    generator = torch.Generator().manual_seed(seed * 1000003 + m * 1009 + n * 31 + d)
    x2 = torch.randn(n, d, generator=generator)
    x1 = x2[offset : offset + m] + noise * torch.randn(m, d, generator=generator)
    return x1, x2


def weights(m, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(m, generator=generator) + 0.5) / m, (torch.rand(n, generator=generator)) / n


def references(x1, x2, temperature, offset):
    """Weights, the truth, and how far eager fp32 is from it."""
    wr, wc = weights(len(x1), len(x2))
    truth = eager_step(x1, x2, wr, wc, temperature, offset)[:4]
    eager = eager_step(x1, x2, wr, wc, temperature, offset, torch.float32)[:4]
    return wr, wc, truth, [float((e.double() - t).norm()) for e, t in zip(eager, truth)]


def compare(x1, x2, temperature=0.1, offset=0, known=None, floor=8 * ULP, **options):
    """Losses and gradients within twice eager's error."""
    wr, wc, truth, eager = known or references(x1, x2, temperature, offset)
    native = Native(x1, x2, temperature, offset, **options)
    g1, g2 = native.backward(wr, wc)
    scale = max(1.0, 1 / temperature)
    names = ("nll_row", "nll_col", "grad1", "grad2")
    for name, x, t, e in zip(names, (*native.losses(), g1, g2), truth, eager):
        assert torch.isfinite(x).all(), name
        # s is rounded, so a s and with it a loss is off by about a ulp times a. Gradients that
        # fp32 cannot hold may vanish.
        tiny = 1e-30 if "grad" in name else 0.5 * ULP * scale * math.sqrt(len(t))
        allowed = max(2 * e, floor * max(1, 0.1 * scale) * float(t.norm()))
        off = float((x.double() - t).norm())
        assert off <= allowed + tiny, f"{name}: error {off:.2e}, allowed {allowed:.2e} + {tiny:.2e}"


ROWS = [1, 2, 3, 7, 63, 64, 65, 127, 129]
WIDTHS = [1, 3, 16, 17, 127, 128, 129, 360]


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("n", ROWS)
def test_square(isa, n, d):
    compare(*views(n, n, d))


@pytest.mark.parametrize("n, d", [(1000, 360), (1000, 17), (129, 2048), (400, 1100), (700, 512)])
def test_large(isa, n, d):
    compare(*views(n, n, d), threads=1)
    for keep in (0.4, 1.0):
        compare(*views(n, n, d), keep=keep)


@pytest.mark.parametrize("m, n, offset", [(1, 5, 4), (3, 700, 100), (64, 129, 65), (100, 417, 0)])
@pytest.mark.parametrize("temperature", [0.1, 0.005])
def test_block_row(isa, m, n, offset, temperature):
    compare(*views(m, n, 40, offset), offset=offset, temperature=temperature)


@pytest.mark.parametrize(
    "temperature", [0.001, 0.003, 0.007, 0.01, 0.0125, 0.013, 0.02, 0.05, 0.1, 0.5, 1.0, 10.0]
)
@pytest.mark.parametrize("noise", [0.0, 0.5, 20.0])
def test_temperatures(isa, temperature, noise):
    compare(*views(130, 130, 64, noise=noise), temperature=temperature)


@pytest.mark.parametrize("batch", range(10))
def test_generated_problems(batch):
    """CASES problems (environment variable, default 2500), and every fifth on emulated tiles."""
    rng = np.random.default_rng(batch)
    try:
        for case in range(int(os.environ.get("CASES", "2500")) // 10):
            m = int(rng.integers(1, 80))
            n = m + int(rng.integers(0, 60)) * int(rng.integers(0, 2))
            d = int(rng.integers(1, 140))
            offset = int(rng.integers(0, n - m + 1))
            temperature = float(10 ** rng.uniform(-3, 1))
            noise = float(10 ** rng.uniform(-2, 1))
            x1, x2 = views(m, n, d, offset, noise, seed=int(rng.integers(1 << 20)))
            known = references(x1, x2, temperature, offset)
            keep = rng.uniform(0, 1.2)
            threads = -int(rng.integers(2, 5)) if rng.random() < 0.1 else 1
            for isa in _cpu.available_isas():
                if isa.startswith("tiles") and case % 5:
                    continue
                _cpu.force_isa(isa)
                compare(x1, x2, temperature, offset, known, keep=keep, threads=threads)
    finally:
        _cpu.force_isa("")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reading_and_writing(isa, dtype):
    """Slices, steps, transposes, odd addresses and gathered columns give what a copy gives."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(2, 50, 96, generator=generator).to(dtype)
    wr, wc = weights(50, 50)
    cols = torch.tensor([5, 90, 3, 44, 45, 46, 0, 95, 17])
    odd = torch.empty(50 * 96 + 1, dtype=dtype)[1:].view(50, 96)
    odd.copy_(base[0])
    cases = {
        "slice": (base[0][:, :37], base[1][:, :37], None),
        "step": (base[0][:, ::3], base[1][:, ::3], None),
        "transposed": (base[0].T.contiguous().T, base[1].T.contiguous().T, None),
        "odd address": (odd, base[1], None),
        "gathered": (base[0], base[1], cols),
        "expanded": (base[0][:1].expand(50, 96), base[1], None),
    }
    for name, (x1, x2, c) in cases.items():
        p1, p2 = (x if c is None else x[:, c] for x in (x1, x2))
        reference = Native(p1.float().contiguous(), p2.float().contiguous())
        expected = reference.backward(wr, wc)
        native = Native(x1, x2, cols=c)
        got = native.backward(wr, wc)
        assert torch.equal(native.z1, reference.z1), name
        for g, e in zip(got, expected):
            if c is not None:
                full = torch.zeros(50, 96)
                full[:, c] = e
                e = full
            assert torch.equal(g, e.to(dtype)), name


def test_full_width_gradient(isa):
    """The gradient of a slice lands in the whole matrix, zeros elsewhere."""
    x1, x2 = views(30, 30, 20)
    wr, wc = weights(30, 30)
    native = Native(x1, x2)
    expected = native.backward(wr, wc)[0]
    full = filled(30, 64)
    _cpu.finish(
        z=native.z1.data_ptr(),
        dz=native.dz1.data_ptr(),
        rnorm=native.rnorm1.data_ptr(),
        rows=30,
        d=20,
        eps=EPS,
        grad=(full.data_ptr(), _cpu.FLOAT32, 64, 1, 0, 64, True),
        threads=2,
    )
    assert torch.equal(full[:, :20], expected) and (full[:, 20:] == 0).all()


@pytest.mark.parametrize("threads", [2, -3])
def test_one_side_and_one_direction(isa, threads):
    x1, x2 = views(140, 140, 50)
    wr, wc = weights(140, 140)
    both = Native(x1, x2, threads=threads).backward(wr, wc)
    first = Native(x1, x2, threads=threads).backward(wr, wc, need2=False)
    second = Native(x1, x2, threads=threads).backward(wr, wc, need1=False)
    assert torch.equal(both[0], first[0]) and torch.equal(both[1], second[1])
    native = Native(x1, x2, symmetric=False)
    assert (native.column_sums == 0).all()
    truth = eager_step(x1, x2, wr, None)
    eager = eager_step(x1, x2, wr, None, dtype=torch.float32)
    for g, t, e in zip(native.backward(wr, None), truth[2:4], eager[2:4]):
        assert error(g, t) <= max(2 * error(e, t), 8 * ULP)


def test_temperature_gradient(isa):
    x1, x2 = views(100, 100, 30)
    wr, wc = weights(100, 100)
    native = Native(x1, x2)
    native.backward(wr, wc)
    truth = float(eager_step(x1, x2, wr, wc)[4])
    for dots in native.dots:
        assert dots / native.scale == pytest.approx(truth, rel=1e-5)


def test_hard_rows(isa):
    """Duplicates, zeros, opposites, huge and tiny rows, alone and beside ordinary ones."""
    x1, x2 = views(70, 70, 24)
    x1[3] = x1[4]
    x2[9] = x2[10]
    x1[11] = x2[11]
    x1[12] = -x2[12]
    x1[20] *= 1e19
    x2[21] *= 1e19
    x1[22] *= 3e-20
    for temperature in (0.1, 0.01):
        compare(x1, x2, temperature)
    zero1, zero2 = x1.clone(), x2.clone()
    zero1[5], zero2[6] = 0, 0
    zero1[30] = 1e-40  # below eps: scaled by 1 / eps, as F.normalize does
    wr, wc = weights(70, 70)
    native = Native(zero1, zero2)
    g1, g2 = native.backward(wr, wc)
    truth = eager_step(zero1, zero2, wr, wc)
    for x, t in zip((*native.losses(), g1, g2), truth):
        # Clamped rows have gradients of 1 / eps: compare row by row.
        t = t.reshape(70, -1)
        x = x.reshape(70, -1).double()
        assert ((x - t).norm(dim=1) <= 2e-5 * t.norm(dim=1) + 1e-12).all()
    for rows in (torch.ones(33, 8), torch.zeros(33, 8)):
        losses = Native(rows, rows.clone()).losses()
        assert torch.allclose(losses[0], torch.full((33,), math.log(33), dtype=torch.float64))
    opposite = torch.ones(1, 8)
    for temperature in (0.001, 0.1, 10.0):
        native = Native(opposite, -opposite, temperature)
        assert native.nll_row[0] == 0 and native.nll_col[0] == 0
        assert all((g == 0).all() for g in native.backward(*weights(1, 1)))


@pytest.mark.parametrize("temperature", [0.1, 0.005])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf(isa, bad, temperature):
    """They reach every loss and gradient that they touch in eager PyTorch, and nothing else."""
    x1, x2 = views(100, 100, 40)
    x1[17, 3] = bad
    wr, wc = weights(100, 100)
    native = Native(x1, x2, temperature)
    expected = eager_step(x1, x2, wr, wc, temperature, dtype=torch.float32)
    assert torch.equal(torch.isnan(native.nll_row), torch.isnan(expected[0]))
    assert torch.equal(torch.isnan(native.nll_col), torch.isnan(expected[1]))
    for got, want in zip(native.backward(wr, wc), expected[2:]):
        assert torch.equal(torch.isnan(got), torch.isnan(want))


def test_exp2(isa):
    """Relative error over the whole range, with and without a split scale."""
    x = np.concatenate(
        [np.linspace(-125.9, 127.4, 400001), np.random.default_rng(0).normal(size=99999)]
    )
    x = x.astype(np.float32)
    y = np.empty_like(x)
    _cpu.exp2(x.ctypes.data, 1.0, 0.0, y.ctypes.data, len(x))
    assert np.abs(y / np.exp2(x.astype(np.float64)) - 1).max() < 1.5e-7
    s = np.linspace(-1, 1, 300001).astype(np.float32)
    y = np.empty_like(s)
    for a in (0.1, 1.0, 10.0, 77.0):
        scale = a * math.log2(math.e)
        hi = float(np.float32(scale))
        _cpu.exp2(s.ctypes.data, hi, scale - hi, y.ctypes.data, len(s))
        assert np.abs(y / np.exp(a * s.astype(np.float64)) - 1).max() < 1.5e-7
    edge = np.array([-1e6, -150.0, -127.0, 0.0, math.nan], np.float32)
    y = np.empty_like(edge)
    _cpu.exp2(edge.ctypes.data, 1.0, 0.0, y.ctypes.data, len(edge))
    assert y[0] == 0 and y[1] <= 2.0**-126 and y[3] == 1 and np.isnan(y[4])


def self_pair(z, d, scale, threads, wr=None, lse=None, acc=None, dz=None, upper=True):
    m, p = len(z), z.data_ptr()
    common = dict(
        z1=p,
        z2=p,
        m=m,
        n=m,
        d=d,
        row_offset=0,
        scale=scale,
        upper=upper,
        operands=_cpu.FP32,
        workspace=0,
        workspace_bytes=0,
        threads=threads,
    )
    if acc is not None:
        s, r = acc[0].data_ptr(), acc[1].data_ptr()
        _cpu.sums(
            **common,
            row_sum=s,
            row_ref=r,
            col_sum=s if upper else 0,
            col_ref=r if upper else 0,
            logits=0,
        )
    if dz is not None:
        wr, lse = scale * wr.double(), lse.double()
        w, lse_address = wr.data_ptr(), lse.data_ptr()
        _cpu.products(
            **common,
            row_weight=w,
            col_weight=w,
            row_lse=lse_address,
            col_lse=lse_address,
            diagonal=0,
            dz1=dz.data_ptr(),
            dz2=dz.data_ptr(),
        )


@pytest.mark.parametrize("temperature", [0.1, 0.004])
@pytest.mark.parametrize("threads", [-1, -2, -3])  # exactly so many, however small the work
@pytest.mark.parametrize("m", [1, 2, 50, 333, 700])
def test_self_pair(isa, m, threads, temperature):
    """One view against itself without its diagonal: sums and dz += a (G + G') z."""
    d, scale = 24, 1 / temperature
    z = filled(m, _cpu.pitch(d))
    x = views(m, m, d)[0]
    rnorm = filled(m)
    _cpu.normalize(
        x=view(x), rows=m, d=d, eps=EPS, z=z.data_ptr(), rnorm=rnorm.data_ptr(), threads=1
    )
    acc = torch.zeros(2, m, dtype=torch.float64)
    self_pair(z, d, scale, threads, acc=acc)
    z64 = z[:, :d].double()
    s = scale * (z64 @ z64.T)
    s.fill_diagonal_(-math.inf)
    truth = torch.logsumexp(s, 1)
    log = (torch.log2(acc[0]) + acc[1]) * math.log(2)
    tolerance = 4 * ULP * max(scale, 1)
    assert torch.allclose(log, truth, rtol=0, atol=tolerance)
    full = torch.zeros(2, m, dtype=torch.float64)
    self_pair(z, d, scale, threads, acc=full, upper=False)
    assert torch.allclose(
        (torch.log2(full[0]) + full[1]) * math.log(2), truth, rtol=0, atol=tolerance
    )
    wr = weights(m, m)[0]
    dz = torch.zeros_like(z)
    lse = torch.where(torch.isfinite(truth), truth, 0.0).float()
    self_pair(z, d, scale, threads, wr=wr, lse=lse, dz=dz)
    g = wr.double()[:, None] * torch.exp(s - lse.double()[:, None])
    expected = scale * ((g + g.T) @ z64)
    assert (dz[:, :d] - expected).norm() <= tolerance * 2 * expected.norm()


@pytest.mark.parametrize("temperature", [0.1, 0.005, 0.001])
def test_no_weight_is_no_weight_at_any_temperature(isa, temperature):
    """Zero times an overflowed exponential would be NaN: columns and rows without a weight."""
    x1, x2 = views(40, 90, 24, 7)
    wr, wc = weights(40, 90)
    native = Native(x1, x2, temperature, 7)
    only_rows = native.backward(wr, None)
    zero = native.backward(wr, torch.zeros_like(wc))
    only_columns = native.backward(torch.zeros_like(wr), wc)
    both = native.backward(wr, wc)
    for i in range(2):
        assert torch.equal(only_rows[i], zero[i])
        assert error(only_rows[i] + only_columns[i], both[i].double()) < 1e-5 / temperature


@pytest.mark.parametrize("threads", [1, -2, -3])
def test_repeats_are_bitwise_equal(isa, threads):
    x1, x2 = views(700, 700, 64)
    wr, wc = weights(700, 700)
    runs = []
    for _ in range(3):
        native = Native(x1, x2, threads=threads)
        runs.append((native.nll_row, native.nll_col, *native.backward(wr, wc)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))
    one = Native(x1, x2, threads=1)
    for a, b in zip(runs[0], (one.nll_row, one.nll_col, *one.backward(wr, wc))):
        assert error(a, b) < 8 * ULP


def test_thread_count_changes_nothing_at_large_n(isa):
    """From 2048 rows on there are more parts of the work than threads here."""
    x1, x2 = views(2200, 2200, 16)
    wr, wc = weights(2200, 2200)
    one = Native(x1, x2, threads=1)
    two = Native(x1, x2, threads=-2)
    assert torch.equal(one.nll_row, two.nll_row) and torch.equal(one.nll_col, two.nll_col)
    for a, b in zip(one.backward(wr, wc), two.backward(wr, wc)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("d", [1, 5, 64, 200, 360, 1100])
def test_equal_rows_have_equal_products_wherever_they_stand(isa, d):
    """Bit by bit, whichever tile, block, pass, chain or thread: what ties in the data ties in S.

    The positives of a block row show its products one diagonal at a time.
    """
    x = views(2, 2, d)[0]
    expected = {}
    for m, n, threads in ((1, 1, 1), (9, 60, 1), (150, 400, -2), (700, 701, -3)):
        for offset in {0, (n - m) // 2, n - m}:
            for first, second in ((0, 1), (1, 0), (0, 0)):
                x1, x2 = x[first].repeat(m, 1), x[second].repeat(n, 1)
                logits = Native(x1, x2, offset=offset, threads=threads, keep=0.5).logits
                # A call multiplies in one arithmetic, which few rows may change.
                one = expected.setdefault((first == second, _cpu.arithmetic()), logits[0])
                assert (logits == one).all()


def test_a_product_is_added_up_in_chains(isa):
    """One chain of d = 360 to 1 makes half its roundings above 1/2: sqrt(180 / 12) 2^-24 and some,
    2.5e-7 in all; two chains make them above 1/4, which halves it."""
    x = views(300, 300, 360)[0]
    native = Native(x, x, temperature=1.0)
    z = native.z1.double()
    assert (native.logits - (z * z).sum(1)).square().mean().sqrt() < 1.7e-7


def test_the_positive_has_the_rounding_of_its_neighbours(isa):
    """Two equal candidates, one of them the positive: exactly log 2 at any temperature."""
    for d in (3, 24, 360, 1100):
        x1, x2 = views(1, 1, d)
        for temperature in (0.1, 0.001, 2.0**-21):
            loss = Native(x1, x2.repeat(2, 1), temperature).nll_row[0]
            assert abs(loss - math.log(2)) < 2 * ULP
            loss = Native(x1.repeat(2, 1), x2.repeat(2, 1), temperature).nll_col
            assert (loss - math.log(2)).abs().max() < 2 * ULP


class Tf32(torch.autograd.Function):
    """The product of matrices and its gradients as a GPU has them in TF32: operands of 11 bits."""

    @staticmethod
    def rounded(x):
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**11).round(), exponent - 11)

    @staticmethod
    def forward(ctx, a, b):
        a, b = Tf32.rounded(a), Tf32.rounded(b)
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx, g):
        (a, b), g = ctx.saved_tensors, Tf32.rounded(g)
        return g @ b.T, a.T @ g


WITH_TILES = [isa for isa in _cpu.available_isas() if isa == "amx" or isa.startswith("tiles")]
WITH_BF16 = [*WITH_TILES, *({"avx512_bf16"} & set(_cpu.available_isas()))]
ROUNDED = [(isa, _cpu.BF16) for isa in WITH_BF16] + [(isa, _cpu.INT8X3) for isa in WITH_TILES]
NAMES = {_cpu.BF16: "bf16", _cpu.INT8X3: "int8x3"}


@pytest.fixture(params=ROUNDED, ids=[f"{isa}-{NAMES[o]}" for isa, o in ROUNDED])
def rounded(request):
    """What operands are rounded to, with a body that does so."""
    isa, operands = request.param
    _cpu.force_isa(isa)
    yield operands
    _cpu.force_isa("")


@pytest.mark.parametrize("n, d", [(3, 5), (64, 17), (300, 360), (500, 128), (200, 1100)])
def test_rounded_operands(rounded, n, d):
    """The positives exact, at most twice the error of eager PyTorch: of bf16 that under autocast,
    of int8x3 that in TF32."""
    for noise in (0.1, 1.0):
        x1, x2 = views(n, n, d, noise=noise)
        wr, wc = weights(n, n)
        native = Native(x1, x2, operands=rounded)
        truth = eager_step(x1, x2, wr, wc)
        got = (*native.losses(), *native.backward(wr, wc))
        if _cpu.isa() != "amx":  # which takes fp32 for what is small
            assert _cpu.arithmetic() == NAMES[rounded]
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=rounded == _cpu.BF16)
        with autocast:
            product = torch.matmul if rounded == _cpu.BF16 else Tf32.apply
            eager = eager_step(x1, x2, wr, wc, dtype=torch.float32, product=product)
        # What its bits leave of any a s, where eager is near by chance: few rows, or short ones.
        floor = 10 * 2.0 ** (-9 if rounded == _cpu.BF16 else -12) / d**0.5
        for x, t, e in zip(got, truth, eager):
            size = max(float(t.norm()), len(t) ** 0.5) if t.dim() == 1 else float(t.norm())
            assert float((x - t).norm()) <= 2 * float((e - t).norm()) + floor * size
        kept = Native(x1, x2, operands=rounded, keep=1.0)
        for a, b in zip(native.backward(wr, wc), kept.backward(wr, wc)):
            assert torch.equal(a, b)


def test_nan_reaches_the_loss_where_operands_are_rounded(rounded):
    x1, x2 = views(300, 300, 200)
    bits = torch.tensor(0x7FFFFFFF, dtype=torch.int32)  # it rounds to -0 as any other number would
    x1[17, 3] = bits.view(torch.float32)
    row, column = Native(x1, x2, operands=rounded).losses()
    other = torch.arange(300) != 17
    assert row[17].isnan() and row[other].isfinite().all() and column.isnan().all()


def test_tiles_kept_from_other_products_are_made_anew(isa):
    """Torch's switch for fp32 products may be turned between forward and backward."""
    x1, x2 = views(300, 300, 200)
    wr, wc = weights(300, 300)
    grads = []
    for keep in (0.0, 1.0):
        native = Native(x1, x2, operands=_cpu.BF16, keep=keep)
        native.operands = _cpu.FP32
        grads.append(native.backward(wr, wc))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [2, -3])
def test_kept_tiles_change_nothing(isa, threads):
    x1, x2 = views(500, 500, 72)
    wr, wc = weights(500, 500)
    expected = Native(x1, x2, threads=threads).backward(wr, wc)
    for keep in (0.1, 0.5, 1.0, 2.0):
        native = Native(x1, x2, keep=keep, threads=threads)
        for a, b in zip(expected, native.backward(wr, wc)):
            assert torch.equal(a, b)


def test_forked_child(widest):
    x1, x2 = views(600, 600, 64)
    wr, wc = weights(600, 600)
    expected = Native(x1, x2).backward(wr, wc)[0]
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        same = torch.equal(expected, Native(x1, x2).backward(wr, wc)[0])
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_many_python_threads(widest):
    x1, x2 = views(600, 600, 64)
    wr, wc = weights(600, 600)
    expected = Native(x1, x2).backward(wr, wc)[0]
    wrong = []

    def work():
        for _ in range(3):
            if not torch.equal(expected, Native(x1, x2).backward(wr, wc)[0]):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_scratch_stays_small(widest):
    """The drivers' own memory at N = 32768: within 64 MiB."""
    assert _cpu.scratch_bytes(32768, 32768, 360, 2) < 64 * 2**20
    with pytest.raises(ValueError, match="expected one of"):
        _cpu.force_isa("none such")


# ---------------------------------------------------------------- products of 8-bit digits


@pytest.fixture(params=WITH_TILES)
def with_tiles(request):
    _cpu.force_isa(request.param)
    yield request.param
    _cpu.force_isa("")


def digit_similarity(z1, z2, products):
    """s_ij of csrc/cpu/tile_products.h by numpy: exact integers, then the roundings to fp32."""

    def digits(z):
        mantissa, exponent = np.frexp(np.abs(z).max(1))
        # |z| is at most 0x7F7F7F units of 2^(exponent - 23).
        exponent += mantissa * 2**23 > 0x7F7F7F
        bits = 15 if products == "int8x3" else 23
        units = z.astype(np.float64) * np.exp2(bits - exponent)[:, None]
        rest, split = np.trunc(units + np.copysign(0.5, units)).astype(np.int64), []
        for _ in range(bits // 8):
            split.append((rest + 128) % 256 - 128)
            rest = (rest - split[-1]) // 256
        return (rest, *split[::-1], 0 * rest), np.exp2(exponent - 7.0)

    (h1, m1, l1, *_), r1 = digits(z1)
    (h2, m2, l2, *_), r2 = digits(z2)
    sums = h1 @ h2.T, h1 @ m2.T + m1 @ h2.T, h1 @ l2.T + m1 @ m2.T + l1 @ h2.T, m1 @ l2.T, l1 @ m2.T
    c0, c1, c2, c3, c4 = (c.astype(np.float32) for c in sums)
    step, zero = np.float32(2**-8), np.float32(0)
    c2 = zero if products == "int8x3" else c2 + (c3 + c4) * step * (products == "int8x8")
    scaled = c0 + (c1 + c2 * step) * step
    return scaled * np.outer(r1, r2).astype(np.float32)


def bf16_similarity(z1, z2):
    """The same of bf16 in the order of Intel's manual: of 32 columns two chains of 16, then both to
    the sum. A product of two bf16 is exact in fp32."""
    z1, z2 = (torch.from_numpy(z).bfloat16().float().numpy() for z in (z1, z2))
    z1, z2 = (np.pad(z, ((0, 0), (0, -z.shape[1] % 64))) for z in (z1, z2))
    s = np.zeros((len(z1), len(z2)), np.float32)
    for k in range(0, z1.shape[1], 32):
        chains = np.zeros((2, *s.shape), np.float32)
        for column in range(16):
            for half, chain in enumerate(chains):
                at = k + 16 * half + column
                chain += np.outer(z1[:, at], z2[:, at])
        s += chains[0] + chains[1]
    return s


@pytest.mark.parametrize("n, d", [(97, 360), (33, 129), (40, 1100)])
@pytest.mark.parametrize("products", ["int8x6", "int8x8", "int8x3", "bf16"])
def test_similarities_are_those_of_the_operands_to_the_bit(with_tiles, products, n, d):
    """The positives' tile entries for each offset: every s of the matrix, in every body."""
    if with_tiles == "amx":
        n, d = n + 256, max(d, 200)
    x1, x2 = heavy_tailed(n, d, 0.6) if products == "int8x8" else views(n, n, d, noise=0.3)
    operands = {"bf16": _cpu.BF16, "int8x3": _cpu.INT8X3}.get(products, _cpu.FP32)
    temperature = 0.05 if products == "int8x8" else 1.0
    whole = Native(x1, x2, temperature, operands=operands)
    assert _cpu.arithmetic() == products
    z1, z2 = whole.z1[:, :d].numpy(), whole.z2[:, :d].numpy()
    if products == "bf16":
        expected = torch.from_numpy(bf16_similarity(z1, z2))
    else:
        expected = torch.from_numpy(digit_similarity(z1, z2, products))
    for offset in (0, 1, n // 2, n - 1):
        m = n - offset
        own = Native(x1[:m], x2, temperature, offset, operands=operands).own_similarities()
        if _cpu.arithmetic() == products:  # enough rows are left
            want = expected.diagonal(offset)
            # The instruction itself need not keep to the manual's order, or to its denormals.
            exact = with_tiles != "amx" or products != "bf16"
            assert torch.equal(own, want) if exact else (own - want).abs().max() < 2.0**-20


def one_hot(n, d, noise):
    generator = torch.Generator().manual_seed(5)
    base = noise * torch.randn(n, d, generator=generator)
    base[torch.arange(n), torch.randint(0, d, (n,), generator=generator)] += 1
    return [base + noise / 2 * torch.randn(n, d, generator=generator) for _ in range(2)]


def heavy_tailed(n, d, width=1.0):
    generator = torch.Generator().manual_seed(6)
    tails = width * torch.randn(n, d, generator=generator)
    base = torch.randn(n, d, generator=generator) * tails.exp()
    return [base * (1 + 0.3 * torch.randn(n, d, generator=generator)) for _ in range(2)]


def equal_magnitudes(n, d):
    """Digits of all columns alike: what six products leave out adds up instead of cancelling."""
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(n, d, generator=generator).sign()
    return [base * (torch.rand(n, d, generator=generator) - 0.05).sign() for _ in range(2)]


@pytest.mark.parametrize(
    "rows, temperature, arithmetic",
    [
        (views(300, 300, 360), 0.1, "int8x6"),
        (views(300, 300, 360), 0.002, "int8x6"),
        (one_hot(300, 360, 0.01), 0.1, "fp32"),
        (one_hot(300, 360, 0.05), 0.05, "fp32"),
        (heavy_tailed(300, 360), 0.1, "fp32"),
        (heavy_tailed(300, 360, 0.6), 0.1, "int8x8"),
        (heavy_tailed(300, 360), 1.0, "int8x6"),  # a smaller a forgives more
        (equal_magnitudes(300, 128), 0.1, "int8x8"),
    ],
    ids=[
        "views",
        "cold",
        "one-hot",
        "near-one-hot",
        "heavy-tailed",
        "less-heavy",
        "warm",
        "equal-magnitudes",
    ],
)
def test_eight_products_are_taken_where_six_are_not_exact_enough(
    with_tiles, rows, temperature, arithmetic
):
    compare(*rows, temperature=temperature)
    assert _cpu.arithmetic() == arithmetic


def test_nan_takes_the_fp32_kernels_and_a_nan_weight_stays_in_its_row(with_tiles):
    x1, x2 = views(300, 300, 200)
    x1[17, 3] = math.nan
    Native(x1, x2)
    assert _cpu.arithmetic() == "fp32"
    x1[17, 3] = 0.0
    wr, wc = weights(300, 300)
    native = Native(x1, x2)
    clean = native.backward(wr, None)
    wr[21] = math.nan
    spoilt = native.backward(wr, None)
    assert _cpu.arithmetic() == "int8x6"
    other = torch.arange(300) != 21
    assert spoilt[0][21].isnan().all()
    assert error(spoilt[0][other], clean[0][other]) < 1e-6
    assert spoilt[1].isnan().all()


def test_rows_are_shared_by_many_threads_and_not_at_large_n(with_tiles):
    """Scratch has what parts share where they are small, and nothing else that grows as N d."""
    two, four = (_cpu.scratch_bytes(2**20, 2**20, 360, threads) for threads in (2, 4))
    assert two < 256 * 2**20
    shared = _cpu.scratch_bytes(8192, 8192, 360, 64) - 64 * (four - two) // 2
    assert 2 * 8192 * 6 * 384 < shared < 64 * 5 * 2**20


def test_outliers_of_both_signs(with_tiles):
    """Weights of mixed signs and rows whose gradient is a few terms beside many small ones."""
    x1, x2 = views(280, 280, 200, noise=2.0)
    x2[5] = x1[140] + 0.01 * x2[5]  # a hard negative in another block, and one beside its positive
    x1[3] = x1[4]
    generator = torch.Generator().manual_seed(2)
    wr, wc = (torch.randn(280, generator=generator) / 280 for _ in range(2))
    for temperature in (0.1, 0.03):
        truth = eager_step(x1, x2, wr, wc, temperature)[2:4]
        eager = eager_step(x1, x2, wr, wc, temperature, dtype=torch.float32)[2:4]
        for g, t, e in zip(Native(x1, x2, temperature).backward(wr, wc), truth, eager):
            assert error(g, t) <= 2 * error(e, t) + 1e-6
        assert _cpu.arithmetic() == "int8x6"


def test_equal_candidates_cancel_before_anything_is_rounded(with_tiles):
    """Each row twice in both views: its positive's term and the equal candidate's nearly cancel."""
    x1, x2 = views(280, 280, 200, noise=0.1)
    x1[1::2], x2[1::2] = x1[::2], x2[::2]
    compare(x1, x2)
    assert _cpu.arithmetic() == "int8x6"
