"""What training does to the dimensions, looked at while it goes on.

As in figures 7, 9 and 10 of arXiv 2110.09348: the spectra of the representation, of its sub-vector
and of the embedding over training, and which directions the loss's gradient has at the output of
the encoder and before its last block. A fixed projector of low rank sends a gradient of low rank
into r; the branch of the last block reads all channels, so that before the block it has more.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..train import encoders, views
from ..train.config import TrainConfig
from ..train.loop import Model
from . import spectrum

# Shares of a training after which the model is looked at.
FRACTIONS = (0.0, *(2.0**-k for k in range(6, -1, -1)))
SAMPLES, BATCH = 2048, 256  # of the test part for spectra, of the training part for gradients
EVERY = 8  # one in so many of the sorted eigenvalues is kept


def steps(total: int) -> list[int]:
    """The steps of a training of ``total`` after which it is looked at, ascending, the last too."""
    return sorted({round(f * total) for f in FRACTIONS})


def look(model: Model, config: TrainConfig) -> dict | None:
    """Spectra and gradients of ``model``, which stays as it is, as plain values; None where they
    are not finite.

    "spectra": of each part of :func:`spectrum.of_model` the effective rank and every eighth
    eigenvalue (log10, relative to the largest), over images of the test part. "gradient": effective
    rank and number of directions (eigenvalues above 1e-8 of the largest) of :func:`gradients`.
    """
    model = copy.deepcopy(model).eval()
    size, device = config.image_size, config.device
    with torch.no_grad():
        test = _some(config, False, SAMPLES).split(512)
        features = torch.cat([model(views.for_evaluation(part, size)).cpu() for part in test])
    views_of = views.make_views(config.views, size, test[0].shape[1])
    pair = views_of(_some(config, True, BATCH), torch.Generator(device).manual_seed(0))
    of_loss = gradients(copy.deepcopy(model).train(), *pair)
    if not all(rows.isfinite().all() for rows in (features, *of_loss.values())):
        return None
    result: dict[str, dict] = {"spectra": {}, "gradient": {}}
    for name, report in spectrum.of_model(model, features).items():
        logs = spectrum.logs(report.spectrum)[::EVERY]
        result["spectra"][name] = {"effective_rank": report.effective_rank, "log10": logs}
    for name, rows in of_loss.items():
        report = spectrum.collapse_report(rows, threshold=spectrum.THRESHOLD)
        directions = report.dimensions - report.collapsed
        of = {"effective_rank": report.effective_rank, "directions": directions}
        result["gradient"][name] = of
    return result


def _some(config: TrainConfig, train: bool, n: int) -> Tensor:
    """At most n images, uint8 (n, C, H, W), from all over a part of the set."""
    images = config.images(train)
    images, *_ = images.batch(torch.arange(0, len(images), -(-len(images) // n)))
    return images.to(config.device)


def gradients(model: Model, view1: Tensor, view2: Tensor) -> dict[str, Tensor]:
    """Gradients of the mode's loss of two views (B, C, S, S), rows of both views: "output", with
    respect to r, (2B, R); "input", with respect to the input of the encoder's last block, a row for
    each of its pixels, (2B h w, C)."""
    inputs: list[Tensor] = []
    handle = encoders.last_block(model.encoder).register_forward_pre_hook(
        lambda _, given: inputs.append(given[0])
    )
    outputs = [model.encoder(view1), model.encoder(view2)]
    handle.remove()
    of = torch.autograd.grad(model.objective(*outputs), [*outputs, *inputs])
    pixels = [gradient.movedim(1, -1).flatten(0, -2) for gradient in of[2:]]
    return {"output": torch.cat(of[:2]), "input": torch.cat(pixels)}
