"""Dimensional collapse, measured: the covariance spectrum of representations and embeddings.

As in figures 2 and 9 of arXiv 2110.09348. A direction counts as collapsed where its eigenvalue is
at most ``threshold`` times the largest one: by default 1e-8, or what rounding to the features' own
precision leaves in an empty direction, where that is more (bf16: some 1e-6).

The effective rank is exp of the entropy of the eigenvalues (Roy and Vetterli 2007); RankMe is the
same of the singular values of the features as they are, not centred (Garrido et al. 2023); the
participation ratio is the square of the eigenvalues' sum over the sum of their squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..train.foreign import as_rows, as_tensor

# In units of the largest eigenvalue. fp32 features leave rounding noise near 1e-14 of it, live
# directions of a trained network stay above 1e-5 or so; anything between tells the same count.
THRESHOLD = 1e-8


@dataclass(frozen=True)
class CollapseReport:
    """What :func:`collapse_report` finds; ``str()`` of it is one sentence.

    Attributes:
        dimensions, samples: R and n.
        precision: the dtype whose rounding the features carry, such as "bfloat16".
        rounding: share of the largest eigenvalue that this may leave in an empty direction.
        threshold: share of it up to which a direction counts as collapsed.
        collapsed: number of those directions.
        effective_rank, rankme, participation_ratio: see the module.
        spectrum: eigenvalues of the covariance, R floats, descending.
    """

    dimensions: int
    samples: int
    precision: str
    rounding: float
    threshold: float
    collapsed: int
    effective_rank: float
    rankme: float
    participation_ratio: float
    spectrum: list[float] = field(repr=False)

    def __str__(self) -> str:
        n, width = self.samples, self.dimensions
        why = f", the rounding of {self.precision}" if self.threshold == self.rounding else ""
        few = f", {n} samples show at most {n - 1}" if n <= width else ""
        return (
            f"{self.collapsed} of {width} dimensions collapsed (eigenvalue at most "
            f"{self.threshold:.3g} of the largest{why}{few}), "
            f"effective rank {self.effective_rank:.1f}, RankMe {self.rankme:.1f}, "
            f"participation ratio {self.participation_ratio:.1f}"
        )


def collapse_report(
    source: Tensor | np.ndarray | Iterable,
    encoder: Callable[[Tensor], Tensor] | None = None,
    *,
    threshold: float | None = None,
    samples: int | None = None,
) -> CollapseReport:
    """How many dimensions of a representation have collapsed.

    Args:
        source: features (n, R), a tensor or an array of any real dtype; or a loader, whose batches
            are tensors or tuples that start with one.
        encoder: makes features of a batch, (b, R) or (b, R, h, w), which is averaged over h and w;
            a module is run in eval mode, without gradients, on its own device. None: the batches
            are features.
        threshold: 0 to 1; None knows the features' precision (see the module).
        samples: stop after so many; None takes all.

    Raises ValueError or TypeError for other shapes, fewer than two samples, nan or inf.
    """
    check(threshold)
    features = _features(source, encoder, samples)
    spectrum, values = spectra(features)
    kind, noise = precision(features)
    rounding = min(noise / spectrum[0].item(), 0.5) if spectrum[0] > 0 else 0.0
    threshold = max(THRESHOLD, rounding) if threshold is None else threshold
    total = spectrum.sum().item()
    return CollapseReport(
        dimensions=features.shape[1],
        samples=features.shape[0],
        precision=str(kind).removeprefix("torch."),
        rounding=rounding,
        threshold=threshold,
        collapsed=collapsed(spectrum, threshold),
        effective_rank=effective_rank(spectrum),
        rankme=effective_rank(values),
        participation_ratio=total**2 / spectrum.square().sum().item() if total else 0.0,
        spectrum=spectrum.tolist(),
    )


@torch.no_grad()
def _features(source, encoder, samples: int | None) -> Tensor:
    if samples is not None and samples < 2:
        raise ValueError(f"samples: expected at least 2, got {samples}")
    if isinstance(source, np.ndarray):
        source = as_tensor(source)
    if isinstance(source, Tensor):
        if encoder is None:
            return source[:samples]
        source = source.split(256)
    elif not isinstance(source, Iterable):
        kinds = "a tensor, an array or a loader"
        raise TypeError(f"features: expected {kinds}, got {type(source).__name__}")
    module = encoder if isinstance(encoder, nn.Module) else nn.Identity()
    device = next((p.device for p in module.parameters()), None)
    training = [part for part in module.modules() if part.training]
    parts, taken = [], 0
    module.eval()
    try:
        for batch in source:
            batch = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(batch, Tensor | np.ndarray):
                got = type(batch).__name__
                raise TypeError(f"loader: expected batches that start with a tensor, got {got}")
            batch = torch.as_tensor(batch, device=device)
            parts.append((batch if encoder is None else as_rows(encoder(batch))).cpu())
            taken += len(parts[-1])
            if samples is not None and taken >= samples:
                break
    finally:
        for part in training:
            part.training = True
    if not parts:
        raise ValueError("loader: expected at least one batch, got none")
    return torch.cat(parts)[:samples]


def spectra(features: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the covariance of ``features`` (n, R), and their singular values as they are,
    not centred: fp64 (R,), descending.

    The eigenvalues are squared singular values of the centred features, which keeps small ones
    exact; with n <= R the last R - n + 1 are zero whatever the features are.
    """
    if features.dim() != 2 or features.shape[0] < 2:
        raise ValueError(
            f"features: expected shape (n, R) with n >= 2, got {tuple(features.shape)}"
        )
    if features.is_complex():
        raise TypeError(f"features: expected real numbers, got {features.dtype}")
    x = features.detach().to("cpu", torch.float64)
    if not x.isfinite().all():
        raise ValueError("features: expected finite numbers, got nan or inf")
    n, width = x.shape
    eps, mean = torch.finfo(x.dtype).eps, x.mean(0, keepdim=True)
    r = torch.linalg.qr(x - mean, mode="r").R
    centred = torch.linalg.svdvals(r)
    # Equal rows leave the rounding of their mean, which is nothing and not a direction.
    eigenvalues = torch.where(centred > 2 * eps * x.norm(), centred, 0).square() / (n - 1)
    # The mean goes back in by x'x = r'r + n mean'mean. Squares will do there: an
    # entropy does not hear of values below 1e-8 of the largest, which are rounding.
    squares = torch.linalg.eigvalsh(r.T @ r + n * mean.T @ mean).flip(0)
    squares = torch.where(squares > width * eps * squares[:1], squares, 0)
    return nn.functional.pad(eigenvalues, (0, width - len(eigenvalues))), squares.sqrt()


def precision(features: Tensor) -> tuple[torch.dtype, float]:
    """The dtype whose rounding ``features`` (n, R) carry, and what that rounding leaves, at most,
    as an eigenvalue of the covariance in a direction that is empty.

    It is the narrowest dtype that has every value, so bf16 features that were saved as fp32 are
    known for what they are. Whole numbers of an integer dtype are exact. The noise is that of
    independent errors, uniform within half a unit in the last place, at the upper edge of Marchenko
    and Pastur's law, and twice that. Roundings earlier in the network are not in it.
    """
    kind, x = features.dtype, features.detach().to("cpu", torch.float64)
    if not kind.is_floating_point:
        return kind, 0.0
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        wider = torch.finfo(kind).bits > torch.finfo(narrow).bits
        if wider and torch.equal(x.to(narrow).double(), x):
            kind = narrow
            break
    known = torch.finfo(kind)
    unit = known.eps * torch.exp2(torch.frexp(x).exponent.double() - 1)
    unit = torch.where(x == 0, 0, unit.clamp_min(known.smallest_normal * known.eps))
    variance = (unit.square().mean(0) / 12).max().item()
    return kind, 2 * variance * (1 + math.sqrt(x.shape[1] / x.shape[0])) ** 2


def effective_rank(spectrum: Tensor) -> float:
    """exp of the entropy of the normalised values: R for a flat spectrum, 1 for a line, 0 for a
    point."""
    if not spectrum[0] > 0:
        return 0.0
    p = spectrum / spectrum.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum()).item()


def logs(spectrum: list[float]) -> list[float]:
    """log10 of eigenvalues relative to the first, to three digits, -18 at least."""
    values = torch.tensor(spectrum, dtype=torch.float64)
    values = (values / values[0].clamp_min(1e-300)).clamp_min(1e-18).log10()
    return [round(value, 3) for value in values.tolist()]


def check(threshold: float | None) -> None:
    """ValueError unless 0 <= threshold < 1, or None."""
    if threshold is not None and not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold: expected 0 <= threshold < 1, got {threshold}")


def collapsed(spectrum: Tensor, threshold: float = THRESHOLD) -> int:
    """Number of eigenvalues at or below ``threshold`` (0 to 1) times the largest."""
    check(threshold)
    return int((spectrum <= threshold * spectrum[0]).sum())


@torch.no_grad()
def of_model(
    model, representation: Tensor, threshold: float | None = None
) -> dict[str, CollapseReport]:
    """Spectra of the representation (n, R), of its sub-vector and of the embedding.

    ``model`` is a :class:`directclr_fast.train.loop.Model` in eval mode. The embedding is what the
    similarity is taken of, unit rows as in the loss; with no projector it is the normalised
    sub-vector.
    """
    objective = model.objective
    device = next(model.parameters()).device
    embedding = objective.embed(representation.to(device)).cpu()
    parts = {"representation": representation}
    if objective.dim is not None:
        parts["sub-vector"] = representation[:, objective.sub_vector]
    parts["embedding"] = nn.functional.normalize(embedding, dim=1)
    return {name: collapse_report(part, threshold=threshold) for name, part in parts.items()}


def plot(spectra: dict[str, CollapseReport], path: str | Path, title: str = "") -> None:
    """Draws the spectra, log10 of the eigenvalue against its rank, as a picture at ``path``."""
    from ..plots import figure

    with figure(path, title) as axes:
        for name, report in spectra.items():
            spectrum = torch.tensor(report.spectrum, dtype=torch.float64)
            floor = max(spectrum[0] * 1e-18, 1e-300)
            dead, total = report.collapsed, report.dimensions
            (line,) = axes.plot(
                range(1, total + 1),
                spectrum.clamp_min(floor).log10(),
                label=f"{name}: {dead} of {total} collapsed, "
                f"effective rank {report.effective_rank:.1f}",
            )
            if dead and spectrum[0] > 0:
                level = math.log10(report.threshold * spectrum[0] or floor)
                axes.axhline(level, color=line.get_color(), linestyle=":", linewidth=0.8)
        axes.set(xlabel="rank of the eigenvalue", ylabel="log10 eigenvalue of the covariance")
