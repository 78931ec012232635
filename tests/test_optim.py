"""LARS against the written rule in plain Python, the schedule, and who gets weight decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from directclr_fast.train.optim import LARS, OPTIMIZERS, build_optimizer, learning_rate


def norm(values):
    return math.sqrt(sum(v * v for v in values))


class Written:
    """The rule of the class' docstring for one parameter, on lists of Python floats."""

    def __init__(self, w, flat, momentum=0.9, weight_decay=0.0, trust=0.001):
        self.w, self.flat, self.momentum = w.double().flatten().tolist(), flat, momentum
        self.weight_decay, self.trust = weight_decay, trust
        self.u = [0.0] * len(self.w)

    def step(self, g, lr):
        g = g.double().flatten().tolist()
        if not self.flat:
            g = [gi + self.weight_decay * wi for gi, wi in zip(g, self.w)]
            if norm(self.w) > 0 and norm(g) > 0:
                ratio = self.trust * norm(self.w) / norm(g)
                g = [gi * ratio for gi in g]
        self.u = [self.momentum * ui + gi for ui, gi in zip(self.u, g)]
        self.w = [wi - lr * ui for wi, ui in zip(self.w, self.u)]


def parameters(generator):
    def randn(*shape):
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    return {
        "matrix": randn(4, 3),
        "convolution": randn(2, 3, 2, 2),
        "bias": randn(5),
        "scalar": randn(),
        "zero weights": nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)),
        "zero gradient": randn(3, 3),
        "zero gradient, no decay": randn(3, 3),
        "last": nn.Parameter(randn(2, 3, 4, 4).data.contiguous(memory_format=torch.channels_last)),
    }


def test_lars_follows_the_written_rule():
    generator = torch.Generator().manual_seed(0)
    params = parameters(generator)
    first = {"weight_decay": 0.01, "trust": 0.02, "momentum": 0.8}
    second = {"weight_decay": 0.0}
    own = {name: second if name == "zero gradient, no decay" else first for name in params}
    optimizer = LARS(
        [
            {"params": [p for n, p in params.items() if own[n] is first], **first},
            {"params": [p for n, p in params.items() if own[n] is second], **second, "lr": 0.5},
        ],
        lr=0.3,
    )
    written = {n: Written(p.data, p.dim() <= 1, **own[n]) for n, p in params.items()}
    for step in range(6):
        rate = 0.3 / (1 + step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        gradients = {}
        for name, p in params.items():
            gradients[name] = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if "zero gradient" in name and step % 2 == 0:
                gradients[name].zero_()
            p.grad = gradients[name].clone()
        optimizer.step()
        for name, p in params.items():
            written[name].step(gradients[name], rate)
            want = torch.tensor(written[name].w, dtype=torch.float64).view(p.shape)
            torch.testing.assert_close(p.data, want, rtol=1e-13, atol=1e-15, msg=name)
            assert torch.equal(p.grad, gradients[name]), "the gradient belongs to the caller"


def test_lars_in_fp32_is_the_rule_to_rounding():
    generator = torch.Generator().manual_seed(1)
    p = nn.Parameter(torch.randn(64, 32, generator=generator))
    written = Written(p.data, False, weight_decay=1e-6)
    optimizer = LARS([p], lr=4.8, weight_decay=1e-6)
    for _ in range(5):
        p.grad = torch.randn(p.shape, generator=generator) * 1e-3
        written.step(p.grad, 4.8)
        optimizer.step()
    want = torch.tensor(written.w, dtype=torch.float64).view(p.shape)
    torch.testing.assert_close(p.data.double(), want, rtol=1e-5, atol=1e-6)


def test_lars_closure_and_parameters_without_gradient():
    p, idle = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([p, idle], lr=1.0, weight_decay=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 4.0
    # g = 2 + 0.1, trust |w| / |g| g = 0.001 * 2 / 4.2 * 2.1
    torch.testing.assert_close(p.data, torch.full((2, 2), 1 - 0.001))
    assert torch.equal(idle.data, torch.ones(2, 2)) and len(optimizer.state) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_round_trip(name, tmp_path):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def train(model, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 3)).square().sum().backward()
            optimizer.step()

    whole, part = model(), model()
    optimizer = build_optimizer(name, whole, 0.1, 0.01)
    train(whole, optimizer, 1)
    train(part, first := build_optimizer(name, part, 0.1, 0.01), 1)
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    second = build_optimizer(name, part, 0.7, 0.7)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert second.param_groups[0]["lr"] == 0.1
    train(whole, optimizer, 2)
    train(part, second, 2)
    for a, b in zip(whole.parameters(), part.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_decay_spares_biases_and_norms(name):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    model[0].bias.requires_grad_(False)
    decayed, spared = build_optimizer(name, model, 0.3, 0.25).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    rest = {id(model[1].weight), id(model[1].bias), id(model[3].bias)}
    assert {id(p) for p in spared["params"]} == rest
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.25, 0.0)
    assert decayed["lr"] == spared["lr"] == 0.3
    assert name != "sgd" or decayed["momentum"] == spared["momentum"] == 0.9


def test_released_lars():
    model = nn.Linear(2, 2)
    (group,) = build_optimizer("lars", model, 4.8, 1e-6).param_groups
    assert len(group["params"]) == 2
    assert {k: v for k, v in group.items() if k != "params"} == {
        "lr": 4.8, "momentum": 0.9, "weight_decay": 1e-6, "trust": 0.001,
    }  # fmt: skip


@pytest.mark.parametrize(
    "bad", [{"lr": -1.0}, {"lr": math.nan}, {"momentum": 1.0}, {"trust": -1}, {"weight_decay": -1}]
)
def test_bad_settings(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        LARS([nn.Parameter(torch.ones(2))], **{"lr": 0.1, **bad})


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="^optimizer: expected one of lars, .*, got 'adam'"):
        build_optimizer("adam", nn.Linear(1, 1), 0.1, 0.0)


def test_schedule():
    rates = [learning_rate(step, 110, 10, 4.8) for step in range(111)]
    assert rates[:11] == pytest.approx([0.48 * step for step in range(11)])
    assert rates[0] == 0.0 and max(rates) == rates[10] == 4.8
    assert rates[110] == pytest.approx(0.0048)
    assert rates[60] == pytest.approx(4.8 * (1 + 0.001) / 2)
    # A quarter of the way: cos(45 degrees).
    assert rates[35] == pytest.approx(4.8 * (0.001 + 0.999 * (1 + math.sqrt(0.5)) / 2))
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert learning_rate(0, 100, 0, 1.0) == 1.0
    assert learning_rate(5, 5, 5, 1.0) == 1.0  # nothing but warm-up
