"""Spectra of known covariances, collapsed directions, and the files written from a checkpoint."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from directclr_fast import plots
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
    got = spectrum.covariance_spectrum(x)
    assert got.dtype == torch.float64 and got.shape == (width,)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-14)
    assert (got[:-1] >= got[1:]).all()


def test_known_spectrum():
    """Orthogonal directions of chosen variance: a Hadamard pattern has exactly this covariance."""
    x = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    got = spectrum.covariance_spectrum(x * torch.tensor([3.0, 1.0, 1e-7]) + 100)
    want = torch.tensor([12.0, 4 / 3, 4e-14 / 3], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [0, 1, 7, 19, 20])
def test_collapsed_directions_are_counted(rank, dtype):
    x = (randn(300, rank) @ randn(rank, 20, seed=1) + 10 * randn(1, 20, seed=2)).to(dtype)
    values = spectrum.describe(x)
    assert values["collapsed"] == 20 - rank
    assert values["dimensions"] == 20 and values["samples"] == 300
    assert values["threshold"] == spectrum.THRESHOLD
    json.dumps(values, allow_nan=False)


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
        spectrum.covariance_spectrum(features)


@pytest.mark.parametrize(("mode", "width"), [("directclr", 45), ("baseline", 256), ("simclr", 128)])
def test_of_model(mode, width):
    config = TrainConfig(data="fake", image_size=8, mode=mode).resolve()
    model = Model(config, 3, 10).eval()
    r = randn(300, 256).float().relu()
    spectra = spectrum.of_model(model, r)
    assert list(spectra) == ["representation", *["sub-vector"] * (mode == "directclr"), "embedding"]
    assert spectra["embedding"]["dimensions"] == width
    embedded = F.normalize(model.objective.embed(r), dim=1)
    assert spectra["embedding"] == spectrum.describe(embedded.detach())
    if mode == "directclr":
        assert spectra["sub-vector"] == spectrum.describe(r[:, :45])
        assert spectra["representation"] == spectrum.describe(r)


def test_files(tmp_path):
    pytest.importorskip("matplotlib")
    live = randn(40, 6)
    spectra = {"live": spectrum.describe(live), "point": spectrum.describe(torch.ones(40, 6))}
    spectrum.save(spectra, tmp_path / "spectrum.json")
    assert json.loads((tmp_path / "spectrum.json").read_text()) == spectra
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
        spectrum.plot({"live": spectrum.describe(randn(40, 6))}, tmp_path / "spectrum.png")
