"""Dimensional collapse, measured: the covariance spectrum of representations and embeddings.

As in figures 2 and 9 of arXiv 2110.09348: C = cov(features) over a set of images, its eigenvalues
(the singular values of C) sorted and shown on a log scale. A direction counts as collapsed where
its eigenvalue is below ``threshold`` times the largest one; which threshold is always stated.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..train.checkpoint import write_json

# In units of the largest eigenvalue. fp32 features leave rounding noise near 1e-14 of it, live
# directions of a trained network stay above 1e-5 or so; anything between tells the same count.
THRESHOLD = 1e-8


def covariance_spectrum(features: Tensor) -> Tensor:
    """Eigenvalues, descending, fp64 (R,), of the covariance of ``features`` (n, R).

    Computed as squared singular values of the centred features in fp64, which keeps small ones
    exact; with n <= R the last R - n + 1 are zero whatever the features are.
    """
    if features.dim() != 2 or features.shape[0] < 2:
        raise ValueError(
            f"features: expected shape (n, R) with n >= 2, got {tuple(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError("features: expected finite numbers, got nan or inf")
    x = features.detach().to("cpu", torch.float64)
    # Equal rows leave the rounding of their mean, which is nothing and not a direction.
    noise = 2 * torch.finfo(x.dtype).eps * torch.linalg.norm(x)
    values = torch.linalg.svdvals(x - x.mean(0))
    values = torch.where(values > noise, values, 0).square() / (len(x) - 1)
    return torch.nn.functional.pad(values, (0, x.shape[1] - len(values)))


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of the normalised eigenvalues: R for a flat spectrum, 1 for a line, 0
    for a point."""
    if not spectrum[0] > 0:
        return 0.0
    p = spectrum / spectrum.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum()).item()


def check(threshold: float) -> None:
    """ValueError unless 0 <= threshold < 1."""
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold: expected 0 <= threshold < 1, got {threshold}")


def collapsed(spectrum: Tensor, threshold: float = THRESHOLD) -> int:
    """Number of eigenvalues at or below ``threshold`` (0 to 1) times the largest."""
    check(threshold)
    return int((spectrum <= threshold * spectrum[0]).sum())


def describe(features: Tensor, threshold: float = THRESHOLD) -> dict:
    """Spectrum, effective rank and collapsed count of ``features`` (n, R), as plain values."""
    spectrum = covariance_spectrum(features)
    return {
        "dimensions": features.shape[1],
        "samples": features.shape[0],
        "threshold": threshold,
        "collapsed": collapsed(spectrum, threshold),
        "effective_rank": effective_rank(spectrum),
        "spectrum": spectrum.tolist(),
    }


@torch.no_grad()
def of_model(model, representation: Tensor, threshold: float = THRESHOLD) -> dict[str, dict]:
    """Spectra of the representation (n, R), of its sub-vector and of the embedding.

    ``model`` is a :class:`directclr_fast.train.loop.Model` in eval mode. The embedding is what the
    similarity is taken of, unit rows as in the loss; with no projector it is the normalised
    sub-vector.
    """
    objective = model.objective
    device = next(model.parameters()).device
    embedding = objective.embed(representation.to(device)).cpu()
    result = {"representation": describe(representation, threshold)}
    if objective.dim is not None:
        result["sub-vector"] = describe(representation[:, objective.sub_vector], threshold)
    result["embedding"] = describe(torch.nn.functional.normalize(embedding, dim=1), threshold)
    return result


def save(spectra: dict[str, dict], path: str | Path) -> None:
    """``spectra`` of :func:`of_model` as JSON."""
    write_json(path, spectra, indent=1)


def lines(spectra: dict[str, dict]) -> list[str]:
    """A sentence on each of ``spectra``."""
    said = []
    for name, values in spectra.items():
        samples, dimensions = values["samples"], values["dimensions"]
        few = f", {samples} images show at most {samples - 1}" if samples <= dimensions else ""
        said.append(
            f"{name}: {values['collapsed']} of {dimensions} dimensions collapsed "
            f"(eigenvalue at most {values['threshold']:g} of the largest{few}), "
            f"effective rank {values['effective_rank']:.1f}"
        )
    return said


def plot(spectra: dict[str, dict], path: str | Path, title: str = "") -> None:
    """Draws the spectra, log10 of the eigenvalue against its rank, as a picture at ``path``."""
    from ..plots import figure

    with figure(path, title) as axes:
        for name, values in spectra.items():
            spectrum = torch.tensor(values["spectrum"], dtype=torch.float64)
            floor = max(spectrum[0] * 1e-18, 1e-300)
            dead, total = values["collapsed"], values["dimensions"]
            axes.plot(
                range(1, total + 1),
                spectrum.clamp_min(floor).log10(),
                label=f"{name}: {dead} of {total} collapsed, "
                f"effective rank {values['effective_rank']:.1f}",
            )
        axes.set_xlabel("rank of the eigenvalue")
        axes.set_ylabel("log10 eigenvalue of the covariance")
        axes.legend(fontsize="small")
