"""Spectra of known covariances, collapsed directions, and the files written from a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

import directclr_fast
from directclr_fast import CollapseReport, collapse_report, plots
from directclr_fast.paper import spectrum
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.loop import Model


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("n", "width"), [(500, 12), (12, 12), (5, 12), (2, 1)])
def test_spectrum_is_that_of_the_covariance(n, width, dtype):
    x = (randn(n, width) * torch.logspace(0, -4, width) + 7).to(dtype)
    want = torch.linalg.eigvalsh(torch.cov(x.double().T).reshape(width, width)).flip(0)
    got = spectrum.spectra(x)[0]
    assert got.dtype == torch.float64 and got.shape == (width,)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-14)
    assert (got[:-1] >= got[1:]).all()


def test_known_spectrum():
    """Orthogonal directions of chosen variance: a Hadamard pattern has exactly this covariance."""
    x = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    got = spectrum.spectra(x * torch.tensor([3.0, 1.0, 1e-7]) + 100)[0]
    want = torch.tensor([12.0, 4 / 3, 4e-14 / 3], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [0, 1, 7, 19, 20])
def test_collapsed_directions_are_counted(rank, dtype):
    x = (randn(300, rank) @ randn(rank, 20, seed=1) + 10 * randn(1, 20, seed=2)).to(dtype)
    values = collapse_report(x)
    assert values.collapsed == 20 - rank
    assert values.dimensions == 20 and values.samples == 300
    assert values.threshold == spectrum.THRESHOLD
    assert CollapseReport(**json.loads(json.dumps(asdict(values), allow_nan=False))) == values


def test_threshold():
    values = torch.tensor([1.0, 1e-3, 1e-9, 0.0], dtype=torch.float64)
    assert [spectrum.collapsed(values, t) for t in (0.0, 1e-8, 1e-3, 0.5)] == [1, 2, 3, 3]
    for bad in (-1e-3, 1.0, math.nan):
        with pytest.raises(ValueError, match="^threshold: expected 0 <= threshold < 1, got "):
            spectrum.collapsed(values, bad)


def test_effective_rank():
    def rank(*values):
        return spectrum.effective_rank(torch.tensor(values, dtype=torch.float64))

    assert rank(2.0, 2.0, 2.0, 2.0, 2.0) == pytest.approx(5)
    assert rank(3.0, 0.0, 0.0) == pytest.approx(1)
    assert rank(0.0, 0.0) == 0
    assert rank(3.0, 1.0) == pytest.approx(4 / 3**0.75)  # exp of the entropy of (3/4, 1/4)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("saved", ["as it is", "as fp32"])
@pytest.mark.parametrize(("n", "rank", "width"), [
    (2000, 40, 64), (300, 40, 64), (2000, 64, 64), (2000, 1, 64), (4000, 200, 256),
])  # fmt: skip
def test_rounding_is_no_dimension(n, rank, width, saved, dtype):
    """FIELD T14: the count is that of the matrix, whatever it was rounded to."""
    for seed in range(3):
        x = (randn(n, rank, seed=seed) @ randn(rank, width, seed=seed + 50)).to(dtype)
        if saved == "as fp32":
            x = x.float()
        report = collapse_report(x)
        assert report.collapsed == width - rank, (report, seed)
        if dtype != torch.float64:
            assert report.precision == str(dtype).removeprefix("torch.")
        assert ("the rounding of" in str(report)) == (dtype in (torch.bfloat16, torch.float16))


def test_noise_is_that_of_rounding():
    """Beside random errors as large: the largest eigenvalue of what rounding to bf16 adds."""
    for scale, shift in ((1, 0), (1e-3, 0), (1, 20)):
        x = randn(4000, 32) * scale + shift
        kind, noise = spectrum.precision(x.bfloat16().float())
        assert kind == torch.bfloat16
        added = spectrum.spectra(x.bfloat16().double() - x)[0][0].item()
        assert 0.3 * noise < added < noise
    for exact in (torch.arange(12).view(6, 2), torch.zeros(4, 3), torch.ones(4, 3) > 0):
        assert spectrum.precision(exact)[1] == 0


def test_threshold_of_a_shifted_set():
    """Rounding follows the values, not their spread: fp32 at 1e5 is as coarse as half precision."""
    x = ((randn(500, 5) @ randn(5, 20, seed=1)) + 1e5).float()
    report = collapse_report(x)
    assert report.collapsed == 15 and report.threshold > spectrum.THRESHOLD
    assert "at most" in str(report) and ", the rounding of float32" in str(report)
    own = collapse_report(x, threshold=1e-8)
    assert own.collapsed == 0 and own.rounding == report.threshold
    assert "rounding" not in str(own)
    assert "rounding" not in str(collapse_report(x, threshold=1e-3))


def test_three_numbers_without_a_threshold():
    x = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]]).double() * torch.tensor([3.0, 1.0])
    report = collapse_report(x)  # eigenvalues 9 : 1, singular values 3 : 1
    assert report.participation_ratio == pytest.approx(100 / 82)
    assert report.effective_rank == pytest.approx(10 / 9**0.9)
    assert report.rankme == pytest.approx(4 / 3**0.75)
    shifted = collapse_report(x + 4)
    assert shifted.effective_rank == pytest.approx(report.effective_rank)
    values = torch.linalg.svdvals(x + 4)
    assert shifted.rankme == pytest.approx(spectrum.effective_rank(values)) != report.rankme
    point = collapse_report(torch.ones(5, 3))
    assert (point.collapsed, point.effective_rank, point.participation_ratio) == (3, 0, 0)
    assert point.rankme == pytest.approx(1)
    line = collapse_report(randn(300, 1) @ randn(1, 64, seed=1))
    assert line.rankme == pytest.approx(1, abs=1e-9) and line.collapsed == 63


# ---------------------------------------------------------------- what it takes


def test_report_of_a_tensor_an_array_and_a_loader():
    x = randn(50, 7).float()
    want = collapse_report(x)
    assert collapse_report(x.numpy()) == want
    assert collapse_report(x.numpy().astype(">f4")) == want
    assert collapse_report(x.flip(0).numpy()[::-1]) == want  # strides below zero
    assert collapse_report([x[:20], x[20:]]) == want
    labelled = torch.utils.data.TensorDataset(x, torch.arange(50))
    assert collapse_report(torch.utils.data.DataLoader(labelled, batch_size=8)) == want
    assert collapse_report(x, samples=20) == collapse_report(x[:20])
    endless = (x[k : k + 15] for k in (0, 15, None))  # the third is one too many
    assert collapse_report(endless, samples=20) == collapse_report(x[:20])
    assert str(want).startswith("0 of 7 dimensions collapsed (eigenvalue at most 1e-08 of the larg")
    assert "spectrum" not in repr(want)
    assert directclr_fast.collapse_report is collapse_report


def test_report_of_a_network():
    """In eval mode, without gradients, left as it was; maps are averaged."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3), torch.nn.Dropout(0.5), torch.nn.BatchNorm2d(6)
    )
    net[2].eval()  # a frozen one stays so
    images = randn(300, 1, 5, 5).float()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    report = collapse_report([(images[:100], None), (images[100:], None)], net)
    assert [net.training, net[1].training, net[2].training] == [True, True, False]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    with torch.no_grad():
        want = collapse_report(net.eval()(images).mean((2, 3)))
    assert report.spectrum == pytest.approx(want.spectrum, rel=1e-5)
    assert collapse_report(images, net).spectrum == pytest.approx(want.spectrum, rel=1e-5)
    assert collapse_report(images, lambda x: x.flatten(1)).dimensions == 25
    with pytest.raises(
        ValueError, match=r"^encoder: expected an output \(n, R\) .*got \(100, 1, 1, 5"
    ):
        collapse_report([images[:100]], lambda x: x[:, :, None])


@pytest.mark.parametrize(
    ("source", "options", "error", "text"),
    [
        (3, {}, TypeError, "features: expected a tensor, an array or a loader, got int"),
        ([], {}, ValueError, "loader: expected at least one batch, got none"),
        ([{"x": 1}], {}, TypeError, "loader: expected batches that start with a tensor, got dict"),
        (torch.ones(4, 3), {"samples": 1}, ValueError, "samples: expected at least 2, got 1"),
        (torch.ones(4, 3), {"threshold": 1}, ValueError, "threshold: expected 0 <= threshold < 1"),
        (torch.ones(4, 3).cfloat(), {}, TypeError, "features: expected real numbers, got torch.c"),
    ],
)
def test_report_errors(source, options, error, text):
    with pytest.raises(error, match=f"^{text}"):
        collapse_report(source, **options)


@pytest.mark.parametrize(
    ("features", "text"),
    [
        (torch.ones(1, 4), r"features: expected shape \(n, R\) with n >= 2, got \(1, 4\)"),
        (torch.ones(4), r"features: expected shape \(n, R\) with n >= 2, got \(4,\)"),
        (torch.tensor([[1.0], [math.nan]]), "features: expected finite numbers, got nan or inf"),
    ],
)
def test_bad_features(features, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        spectrum.spectra(features)


@pytest.mark.parametrize(("mode", "width"), [("directclr", 45), ("baseline", 256), ("simclr", 128)])
def test_of_model(mode, width):
    config = TrainConfig(data="fake", image_size=8, mode=mode).resolve()
    model = Model(config, 3, 10).eval()
    r = randn(300, 256).float().relu()
    spectra = spectrum.of_model(model, r)
    assert list(spectra) == ["representation", *["sub-vector"] * (mode == "directclr"), "embedding"]
    assert spectra["embedding"].dimensions == width
    embedded = F.normalize(model.objective.embed(r), dim=1)
    assert spectra["embedding"] == collapse_report(embedded.detach())
    if mode == "directclr":
        assert spectra["sub-vector"] == collapse_report(r[:, :45])
        assert spectra["representation"] == collapse_report(r)


def test_files(tmp_path):
    pytest.importorskip("matplotlib")
    live = randn(40, 6)
    spectra = {"live": collapse_report(live), "point": collapse_report(torch.ones(40, 6))}
    spectrum.plot(spectra, tmp_path / "spectrum.png", "title")
    lines = [{"step": i, "loss": 5 / i, "accuracy": 0.1 * i} for i in range(1, 5)]
    lines.append({"step": 5, "loss": "nan", "accuracy": 0.1})
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, [{"command": []}, *lines])))
    plots.curves(log, tmp_path / "curves.png", "title")
    for name in ("spectrum.png", "curves.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^plots: expected matplotlib, got .*directclr-fast\[pl"):
        spectrum.plot({"live": collapse_report(randn(40, 6))}, tmp_path / "spectrum.png")
