"""How good a frozen representation is: linear probe and nearest neighbours on cached features.

The probe is the paper's: one linear layer on frozen features, SGD with momentum 0.9, learning rate
0.1, batch 256, weight decay 1e-6, 100 epochs. Its features are centred and divided by one number,
their overall rms (``scaled``; docs/design.md section 8).
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import data, folder, views
from .config import TrainConfig, check_setting

SCHEDULES = ("constant", "cosine")


class Features(NamedTuple):
    """Features fp32 (n, R) and labels int64 (n,) of a training and a held-out part, on the CPU."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int

    def columns(self, taken: slice) -> Features:
        """The same samples with a part of the columns, as in a probe of r[:, :d0]."""
        return self._replace(train=self.train[:, taken], test=self.test[:, taken])


def held_out(features: Tensor, labels: Tensor, classes: int) -> Features:
    """A training part cut in two: of each class the first four fifths to train a probe, the last
    fifth to test it. Unlabelled samples are left out."""
    first, last = [], []
    for label in range(classes):
        (rows,) = torch.where(labels == label)
        cut = 4 * len(rows) // 5
        first.append(rows[:cut])
        last.append(rows[cut:])
    first, last = torch.cat(first), torch.cat(last)
    return Features(features[first], labels[first], features[last], labels[last], classes)


@torch.no_grad()
def encode(
    encoder: nn.Module | None,
    images: data.ImageSet | data.FolderSet,
    image_size: int,
    device: str | torch.device = "cpu",
    batch_size: int = 512,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features (n, R) and labels (n,) of a whole set without augmentation, in the set's order.

    ``encoder`` is run in eval mode; None gives the normalised pixels themselves, flattened.
    """
    encoder = nn.Flatten() if encoder is None else encoder
    training = encoder.training
    encoder.eval()
    features, labels = [], []
    for batch, label, _ in data.in_order(images, batch_size, device, workers):
        features.append(encoder(views.for_evaluation(batch, image_size)).float().cpu())
        labels.append(label.cpu())
    encoder.train(training)
    if failed := getattr(images, "failed", None):
        warnings.warn(folder.said_unreadable(failed), stacklevel=2)
    if not features:
        raise OSError(f"data: expected a picture that can be read in {images.name}, got none")
    return torch.cat(features), torch.cat(labels)


def check(
    *, epochs: int = 1, learning_rate: float = 0.1, k: int = 1, temperature: float = 0.07
) -> None:
    """ValueError naming the first setting out of range; for callers whose features cost hours."""
    check_setting("epochs", epochs, low=1)
    check_setting("k", k, low=1)
    check_setting("learning_rate", learning_rate, positive=True)
    check_setting("temperature", temperature, positive=True)


def _labelled(features: Features, device: str | torch.device) -> tuple[Tensor, Tensor]:
    known = features.train_labels >= 0
    if not known.any():
        raise ValueError("features: expected labelled training samples, got none")
    return features.train[known].to(device), features.train_labels[known].to(device)


def linear_probe(
    features: Features,
    schedule: str = "cosine",
    *,
    scaled: bool = True,
    epochs: int = 100,
    learning_rate: float = 0.1,
    batch_size: int = 256,
    weight_decay: float = 1e-6,
    momentum: float = 0.9,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> float:
    """Held-out top-1 accuracy, 0 to 1, of a linear layer trained on the frozen features.

    ``schedule`` "constant" keeps the learning rate (what the release does), "cosine" anneals it to
    zero step by step (what the release means). ``scaled``: see the module. Unlabelled samples
    (label -1) are left out.
    """
    check_setting("schedule", schedule, choices=SCHEDULES)
    check(epochs=epochs, learning_rate=learning_rate)
    if scaled:
        features = _scaled(features)
    x, y = _labelled(features, device)
    generator = torch.Generator().manual_seed(seed)
    bound = 1.0 / math.sqrt(x.shape[1])
    weight = torch.empty(features.classes, x.shape[1]).uniform_(-bound, bound, generator=generator)
    weight = weight.to(device).requires_grad_()
    bias = torch.zeros(features.classes, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], learning_rate, momentum, weight_decay=weight_decay)
    orders = (torch.randperm(len(x), generator=generator).to(device) for _ in range(epochs))
    batches = itertools.chain.from_iterable(order.split(batch_size) for order in orders)
    steps = epochs * -(-len(x) // batch_size)
    for step, index in enumerate(batches):
        if schedule == "cosine":
            rate = 0.5 * learning_rate * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = rate
        scores = nn.functional.linear(x[index], weight, bias)
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(scores, y[index]).backward()
        optimizer.step()
    with torch.no_grad():
        scores = nn.functional.linear(features.test.to(device), weight, bias)
        return _accuracy(scores, features.test_labels.to(device))


def _scaled(features: Features) -> Features:
    mean = features.train.mean(0)
    rms = (features.train - mean).square().mean().sqrt().clamp_min(1e-30)
    return features._replace(train=(features.train - mean) / rms, test=(features.test - mean) / rms)


@torch.no_grad()
def knn(
    features: Features,
    *,
    k: int = 200,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
    block: int = 1024,
) -> float:
    """Held-out top-1 accuracy, 0 to 1, of a weighted vote of the k nearest training samples.

    Neighbours by cosine similarity s, each voting for its class with weight exp(s / temperature).
    k is at most the number of labelled training samples.
    """
    check(k=k, temperature=temperature)
    bank, labels = _labelled(features, device)
    bank = nn.functional.normalize(bank, dim=1)
    k = min(k, len(bank))
    scores = []
    for queries in nn.functional.normalize(features.test, dim=1).split(block):
        similarity, index = (queries.to(device) @ bank.T).topk(k, dim=1)
        # The largest weight of a row is 1: no overflow, and no change to the vote.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(queries), features.classes)
        scores.append(votes.scatter_add_(1, labels[index], weight))
    return _accuracy(torch.cat(scores), features.test_labels.to(device))


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    known = labels >= 0
    return (scores.argmax(1) == labels)[known].float().mean().item()


def load_part(
    encoder: nn.Module | None,
    config: TrainConfig,
    train: bool,
    *,
    channels: int | None = None,
    labelled: bool = False,
) -> tuple[Tensor, Tensor, int]:
    """Features and labels, as of :func:`encode`, and the number of classes, of one part of the
    images that ``config`` says.

    ``channels``: those the encoder takes, ValueError where the images have others, or, if they
    should be ``labelled``, have no classes.
    """
    images = config.images(train)
    if labelled and not (images.labels >= 0).any():
        raise ValueError(
            f"data: expected classes to probe, got images without any in {config.data}"
        )
    if channels not in (None, images.shape[0]):
        raise ValueError(
            f"data: expected images of {channels} channels, as the encoder was trained on, "
            f"got {images.shape[0]} in {config.data}"
        )
    encoded = encode(encoder, images, config.image_size, config.device, workers=config.workers)
    return *encoded, images.num_classes


def load_features(
    encoder: nn.Module | None, config: TrainConfig, channels: int | None = None
) -> Features:
    """Both parts of the images, as :func:`load_part` makes them."""
    how = {"channels": channels, "labelled": True}
    *train, _ = load_part(encoder, config, True, **how)
    return Features(*train, *load_part(encoder, config, False, **how))


def scores(
    features: Features, *, seed: int = 0, epochs: int = 100, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Linear-probe and kNN accuracy, 0 to 1, of one set of features."""
    linear = linear_probe(features, seed=seed, epochs=epochs, device=device)
    return {"linear": linear, "knn": knn(features, device=device)}
