"""Linear probe, nearest neighbours and cached features."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from directclr_fast.train import data, encoders, probe, views
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.probe import Features, knn, linear_probe


def clusters(n=240, width=6, classes=3, spread=0.3, seed=0):
    """Points around one centre a class: separable while the spread is small."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.eye(width)[:classes]
    labels = torch.arange(n) % classes
    x = centres[labels] + spread * torch.randn(n, width, generator=generator)
    half = n // 2
    return Features(x[:half], labels[:half], x[half:], labels[half:], classes)


@pytest.mark.parametrize("schedule", probe.SCHEDULES)
def test_separable_classes_are_separated(schedule):
    features = clusters()
    assert linear_probe(features, schedule, epochs=20, batch_size=32) == 1.0
    # Labels that say nothing about the features: chance.
    shuffled = features.test_labels.roll(1)
    assert linear_probe(features._replace(test_labels=shuffled), schedule, epochs=20) < 0.1


def test_schedules_differ_and_repeat():
    features = clusters(spread=2.0)
    accuracy = {}
    for schedule in probe.SCHEDULES:
        rates = []
        step = torch.optim.SGD.step

        def spy(self, *args, step=step, rates=rates, **kwargs):
            rates.append(self.param_groups[0]["lr"])
            return step(self, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.SGD, "step", spy)
            accuracy[schedule] = linear_probe(features, schedule, epochs=4, batch_size=32)
        assert len(rates) == 4 * 4
        if schedule == "constant":
            assert set(rates) == {0.1}
        else:
            want = [0.05 * (1 + math.cos(math.pi * i / 16)) for i in range(16)]
            assert rates == pytest.approx(want)
        torch.manual_seed(len(rates))  # the global state decides nothing
        assert linear_probe(features, schedule, epochs=4, batch_size=32) == accuracy[schedule]
    assert all(0.4 < v < 1 for v in accuracy.values())


def test_scaled_probe_knows_neither_shift_nor_scale():
    """By a power of two exactly; by any other numbers up to rounding, here the same answers."""
    features = clusters(spread=1.0)
    settings = {"epochs": 5, "batch_size": 32}
    want = linear_probe(features, "cosine", **settings)
    assert 0.6 < want < 1

    def moved(scale, shift):
        return features._replace(
            train=features.train * scale + shift, test=features.test * scale + shift
        )

    assert linear_probe(moved(2**-20, 0.0), "cosine", **settings) == want
    assert linear_probe(moved(37.0, 500.0), "cosine", **settings) == pytest.approx(want, abs=0.02)
    small = linear_probe(moved(2**-20, 0.0), "cosine", scaled=False, **settings)
    assert small != want  # which is why it is scaled


def test_unlabelled_samples_are_left_out():
    features = clusters()
    noise = torch.full((50, 6), 1e3)
    mixed = features._replace(
        train=torch.cat((noise, features.train)),
        train_labels=torch.cat((torch.full((50,), -1), features.train_labels)),
        test=torch.cat((features.test, noise)),
        test_labels=torch.cat((features.test_labels, torch.full((50,), -1))),
    )
    assert knn(mixed, k=5) == knn(features, k=5) == 1.0
    assert linear_probe(mixed, "cosine", scaled=False, epochs=20, batch_size=32) == 1.0
    nothing = features._replace(train_labels=torch.full_like(features.train_labels, -1))
    for measure in (linear_probe, knn):
        with pytest.raises(ValueError, match="^features: expected labelled training samples"):
            measure(nothing)


def knn_by_loop(features, k, temperature):
    right = 0
    for x, label in zip(features.test.tolist(), features.test_labels.tolist()):
        neighbours = []
        for y, vote in zip(features.train.tolist(), features.train_labels.tolist()):
            dot = sum(a * b for a, b in zip(x, y))
            neighbours.append(
                (dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y)), vote)
            )
        votes = [0.0] * features.classes
        for similarity, vote in sorted(neighbours, reverse=True)[:k]:
            votes[vote] += math.exp(similarity / temperature)
        right += votes.index(max(votes)) == label
    return right / len(features.test)


@pytest.mark.parametrize("temperature", [0.07, 0.1])
@pytest.mark.parametrize("k", [1, 7, 120])
def test_knn_against_a_plain_loop(k, temperature):
    # In fp64, where no library's rounding decides which neighbour is the k-th.
    features = clusters(spread=1.5, seed=k)
    features = features._replace(train=features.train.double(), test=features.test.double())
    want = knn_by_loop(features, k, temperature)
    assert 0.3 < want < 1
    for block in (1, 50, 1024):
        got = knn(features, k=k, temperature=temperature, block=block)
        assert got == pytest.approx(want, abs=1e-6)


def test_knn_with_more_neighbours_than_samples():
    features = clusters(spread=1.5)
    assert knn(features, k=10_000) == knn(features, k=120)
    assert knn(features, k=200, temperature=1e-4) == knn(features, k=1)  # no overflow either


@pytest.mark.parametrize("bad", [
    {"k": 0}, {"temperature": 0.0}, {"temperature": math.nan}, {"epochs": 0}, {"epochs": -1},
    {"learning_rate": 0.0}, {"learning_rate": math.inf}, {"learning_rate": math.nan},
])  # fmt: skip
def test_bad_settings(bad):
    (name,) = bad
    measure = knn if name in ("k", "temperature") else linear_probe
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        measure(clusters(), **bad)
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        probe.check(**bad)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="^schedule: expected one of constant, cosine, got 'step'"):
        linear_probe(clusters(), "step")


def test_encode_keeps_the_order_and_the_encoder():
    images = data.load("fake:n=50,size=8,channels=1", train=True)
    torch.manual_seed(0)
    encoder = encoders.build("small", channels=1, image_size=8)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    features, labels = probe.encode(encoder, images, 8, batch_size=16)
    assert encoder.training and torch.equal(labels, images.labels)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert features.shape == (50, 256) and not features.requires_grad
    with torch.no_grad():
        want = encoder.eval()(views.for_evaluation(images.images, 8))
    # Rounding is relative to what is averaged, not to what is left of it.
    torch.testing.assert_close(features, want, rtol=1e-4, atol=1e-5 * want.max().item())
    pixels, _ = probe.encode(None, images, 8, batch_size=16)
    torch.testing.assert_close(pixels, views.for_evaluation(images.images, 8).flatten(1))


def test_load_features():
    config = TrainConfig(data="fake:n=40,size=8,channels=1", image_size=8, seed=3).resolve()
    features = probe.load_features(None, config, channels=1)
    assert features.train.shape == features.test.shape == (40, 64) and features.classes == 10
    assert not torch.equal(features.train, features.test)
    assert torch.equal(features.columns(slice(0, 5)).test, features.test[:, :5])
    other = replace(config, data="fake:n=30,size=8,classes=4")
    other = probe.load_features(nn.Flatten(), other)
    assert other.train.shape == (30, 3 * 64) and other.classes == 4
    with pytest.raises(ValueError, match="^data: expected images of 1 channels, .* got 3 in fake$"):
        probe.load_features(None, replace(config, data="fake"), channels=1)
    assert probe.scores(features).keys() == {"linear", "knn"}
