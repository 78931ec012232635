"""Toy tasks: exact steps, the paper's qualitative facts over several seeds, files and errors."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import waiting

from directclr_fast import cli, fast_directclr_loss
from directclr_fast.paper import spectrum, toy

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = 3


def train(name, loss, steps, variants=None, seeds=SEEDS, **changes):
    task = toy.TASKS[name]
    task = replace(task, variants=tuple(variants or task.variants), **changes)
    return toy.train(task, loss, seeds, steps)


def eager_loss(loss, z1, z2):
    if loss == "paper":
        return fast_directclr_loss(z1, z2, None, negatives="same", symmetric=False)
    return F.cross_entropy(z1 @ z2.T / 0.1, torch.arange(len(z1)))


# ---------------------------------------------------------------- the steps themselves


@pytest.mark.parametrize("loss", toy.LOSSES)
def test_gradients_are_those_of_autograd(loss):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 40, 16), (2, 3, 40, 16), (2, 3, 16, 16), (2, 3, 16)
    x1, x2, product, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        for shape, scale in zip(shapes, (1.0, 1.0, 0.2, 0.2))
    )
    got = toy._GRADIENTS[loss](x1, x2, product, bias)
    for index in ((0, 0), (1, 2)):
        p, b = product[index].clone().requires_grad_(), bias[index].clone().requires_grad_()
        value = eager_loss(loss, x1[index] @ p.T + b, x2[index] @ p.T + b)
        want = torch.autograd.grad(value, (p, b))
        torch.testing.assert_close(got[0][index], want[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got[1][index], want[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", toy.LOSSES)
@pytest.mark.parametrize("name", ["augmentation", "depth"])
def test_training_is_plain_sgd_of_each_network(name, loss):
    """Variant and seed one by one in eager PyTorch, networks without the identity layers."""
    variants = [toy.Variant(1.5, 1, "uniform"), toy.Variant(0.4, 3), toy.Variant(0.1, 2, "aligned")]
    steps, seeds = 60, 2  # more steps than batches are drawn at once
    task = replace(toy.TASKS[name], variants=tuple(variants), learning_rate=0.01)
    times, measured = toy.train(task, loss, seeds, steps)
    assert times[0] == 0 and times[-1] == steps
    for v, variant in enumerate(variants):
        for seed in range(seeds):
            draws = toy._Draws(seeds, task.noisy)
            start = draws.start(variant, variant.layers)[seed]
            bias = torch.zeros(16, dtype=torch.float64)
            if task.bias:
                bias = (2 * draws.uniform[seed, -1, 0] - 1) / 4
            weights = [w.requires_grad_() for w in (*start.clone().unbind(), bias)]
            for (x, e1, e2), _ in zip(draws.batches(), range(steps)):
                assert e1[seed, :, -task.noisy :].all()
                assert not e1[seed, :, : 16 - task.noisy].any()
                views = [x[seed] + variant.strength * e[seed] for e in (e1, e2)]
                for layer in weights[:-1]:
                    views = [z @ layer.T for z in views]
                value = eager_loss(loss, *(z + weights[-1] for z in views))
                used = weights if task.bias else weights[:-1]
                gradients = torch.autograd.grad(value, used, allow_unused=True)
                with torch.no_grad():
                    for w, g in zip(used, gradients):
                        w -= 0.01 * (0 if g is None else g)
            product = torch.eye(16, dtype=torch.float64)
            for layer, w in enumerate(weights[:-1]):
                values = torch.linalg.svdvals(w.detach())
                torch.testing.assert_close(
                    measured["weights"][-1, v, seed, layer], values, rtol=1e-7, atol=1e-10
                )
                product = w.detach() @ product
            if task.noisy < 16:
                for name, columns in (("clean", product[:, :8]), ("noisy", product[:, 8:])):
                    want = torch.linalg.svdvals(columns).mean()
                    torch.testing.assert_close(measured[name][-1, v, seed], want)
            want = spectrum.spectra(draws.fresh[seed] @ product.T)[0]
            got = measured["embedding"][-1, v, seed]
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)
            assert measured["collapsed"][-1, v, seed] == (want < math.exp(-10)).sum()
            assert measured["small"][-1, v, seed] == (want < 0.1 * want[0]).sum()


def test_starts():
    draws = toy._Draws(2, 16)
    decay = torch.exp(-0.35 * torch.arange(16, dtype=torch.float64))
    weights = draws.start(toy.Variant(layers=3, scale=0.5), 5)
    values = torch.linalg.svdvals(weights)
    torch.testing.assert_close(values[:, :3], (0.5 * decay).expand(2, 3, 16))
    assert torch.equal(weights[:, 3:], torch.eye(16, dtype=torch.float64).expand(2, 2, 16, 16))
    for layers in (1, 2, 8):
        chain = draws.start(toy.Variant(layers=layers, start="aligned"), 8)
        product = torch.linalg.multi_dot([*chain[1].flip(0)])
        torch.testing.assert_close(torch.linalg.svdvals(product), decay.square(), rtol=1e-9, atol=0)
    uniform = draws.start(toy.Variant(layers=1, start="uniform"), 1)
    assert 0.24 < uniform.abs().max() <= 0.25 and abs(uniform.std() - 0.25 / math.sqrt(3)) < 0.01


def test_a_seed_is_the_same_run_whatever_the_others():
    variants = toy.TASKS["depth"].variants
    _, one = train("depth", "released", 20, variants[:1], seeds=1)
    _, both = train("depth", "released", 20, variants[:4], seeds=2)
    torch.testing.assert_close(one["weights"][:, 0, 0, 0], both["weights"][:, 0, 0, 0])
    assert not torch.allclose(both["weights"][-1, 0, 0], both["weights"][-1, 0, 1])


# ---------------------------------------------------------------- the paper's facts


@pytest.mark.parametrize("loss", toy.LOSSES)
def test_strong_augmentation_parts_noisy_from_clean_coordinates(loss):
    _, measured = train("augmentation", loss, 500)
    ratio = measured["noisy"] / measured["clean"]  # (T, k, S)
    assert (ratio[0] - 1).abs().max() < 0.25
    weak, *_, strong = ratio[-1]
    assert (weak - 1).abs().max() < 0.15 and strong.max() < 0.35
    assert (ratio[-1].diff(dim=0) < 0.02).all() and (ratio[-1][1:].diff(dim=0) < -0.05).all()
    # Small, all eight of them, but not gone: a plateau.
    assert (measured["small"][-1, -1] >= 8).all() and measured["noisy"][-1].min() > 0.03


@pytest.mark.parametrize("loss", toy.LOSSES)
def test_deeper_networks_leave_more_collapsed(loss):
    variants = toy.TASKS["depth"].variants
    _, measured = train("depth", loss, 1200, [v for v in variants if v.layers < 8])
    collapsed = measured["collapsed"]  # (T, variants, S)
    random, aligned = collapsed[-1, :4], collapsed[-1, 4:]
    assert (random.diff(dim=0) >= 1).all() and (random[0] == 0).all() and (random[3] >= 11).all()
    # The same product at the start: what is left is what depth itself slows down.
    assert (collapsed[0, 4:] == 8).all()
    assert (aligned[0] + 3 <= aligned[1]).all() and (aligned[1] <= aligned[2]).all()


def test_released_loss_revives_what_eq2_leaves_collapsed():
    """From 9 of 16 at the start: the released loss ends with fewer, Eq. 2 with 7 to 9."""
    ends = {}
    for loss in toy.LOSSES:
        _, measured = train("regularization", loss, 2500)
        assert ((measured["collapsed"][0] - 9).abs() <= 1).all()
        ends[loss] = measured["collapsed"][-1, 0]
    assert (ends["released"] <= 6).all()
    assert ((7 <= ends["paper"]) & (ends["paper"] <= 9)).all()


def test_layers_align_from_small_weights():
    _, measured = train("alignment", "released", 1500)
    alignment = measured["alignment"]  # (T, scales, S)
    assert (measured["live"][-1] >= 2).all()
    start, end = alignment[0].max(), alignment[-1]
    assert start < 0.3
    assert (end[1:] > 0.9).all() and (end[0] < 0.8).all() and (end[0] > start).all()
    # By single directions, without groups, the same layers do not look aligned.
    assert (measured["diagonal"][-1, 1] < 0.8).all()


# ---------------------------------------------------------------- files, command, errors


@pytest.mark.parametrize("name", list(toy.TASKS))
def test_command_writes_json_and_figure(name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "deep" / "er"
    command = ["toy", name, "--out", str(out), "--seeds", "2", "--steps", "20"]
    assert cli.main(command) == 0
    output, errors = capsys.readouterr()
    assert not errors
    assert sorted(p.name for p in out.iterdir()) == [f"toy-{name}.json", f"toy-{name}.png"]
    png = (out / f"toy-{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG") and 10_000 < len(png) < 150_000
    text = (out / f"toy-{name}.json").read_text()
    results = json.loads(text, parse_constant=pytest.fail)  # no nan, no infinity
    assert len(text) < 60_000
    assert (results["task"], results["seeds"], results["steps"]) == (name, 2, 20)
    assert list(results["losses"]) == ["released", "paper"]
    task = toy.TASKS[name]
    for loss, result in results["losses"].items():
        assert f"toy {name}, {loss} loss: step 20 of 20" in output
        assert len(result["variants"]) == len(task.variants)
        for row, variant in zip(result["variants"], task.variants):
            assert (row["strength"], row["layers"]) == (variant.strength, variant.layers)
            assert list(row["curves"]) == list(task.curves)
            for values in row["curves"].values():
                assert len(values["mean"]) == len(values["spread"]) == len(result["times"])
            assert list(row["final"]) == list(task.final)
            assert len(row["collapsed_per_seed"]) == 2
    assert output.count("k = ") == 2 * len(task.variants)
    # Numbers in the file are those of the run, mean and deviation over seeds.
    _, measured = toy.train(task, "paper", 2, 20)
    row = results["losses"]["paper"]["variants"][-1]
    for curve, values in row["curves"].items():
        want = measured[curve][-1, -1]
        if curve == "log_weights":
            want = want[:, : row["layers"]]
        for part, value in (("mean", want.mean(0)), ("spread", want.std(0))):
            got = torch.tensor(values[part][-1], dtype=torch.float64)
            torch.testing.assert_close(got, value, rtol=1e-3, atol=1e-9)


def test_one_seed_one_loss(tmp_path):
    pytest.importorskip("matplotlib")
    results = toy.run("depth", tmp_path, "paper", seeds=1, steps=1, say=lambda text: None)
    assert list(results["losses"]) == ["paper"] and results["losses"]["paper"]["times"] == [0, 1]
    assert results["losses"]["paper"]["variants"][0]["curves"]["collapsed"]["spread"] == [0, 0]


def test_an_interrupt_ends_both_losses(tmp_path, monkeypatch):
    """Neither ends by itself: that both have ended is the interrupt's doing."""
    ran_on, steps = [], {}

    def endless(task, loss, seeds, last, progress):
        began = time.monotonic()
        for step in itertools.count():
            steps[loss] = step
            progress(min(step, last))
            if time.monotonic() - began > waiting.STILL / 10:
                ran_on.append(loss)
                return [], {}

    def interrupt(text):
        if "released" in text:  # the other one must hear of it
            raise KeyboardInterrupt

    monkeypatch.setattr(toy, "train", endless)
    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        toy.run("depth", tmp_path, steps=2_000, say=interrupt)
    assert len(steps) == 2 and not ran_on and not list(tmp_path.iterdir())
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("collapse", "task: expected one of augmentation, regularization, depth, alignment, got"),
        ("depth --loss eq2", "loss: expected one of released, paper, both, got 'eq2'"),
        ("depth --seeds 0", "seeds: expected at least 1, got 0"),
        ("depth --steps -5", "steps: expected at least 1, got -5"),
        ("depth --steps some", "argument --steps: invalid int value: 'some'"),
        ("depth --out /dev/null", "out: expected a folder to write to, got /dev/null"),
    ],
)
def test_errors(arguments, text, capsys, monkeypatch):
    monkeypatch.setattr(toy, "train", None)  # said before anything long is done
    try:
        code = cli.main(["toy", *arguments.split()])
    except SystemExit as exit:
        code = exit.code
    output, errors = capsys.readouterr()
    assert code == 2 and not output and errors.count("\n") == 1
    assert errors.startswith(f"directclr-fast: error: {text}")
