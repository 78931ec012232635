"""Runs of the trainer: the same curve for both losses, exact resume, refusals, nothing lost."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import types

import numpy as np
import pytest
import torch

from directclr_fast import cli
from directclr_fast.backends import cpu
from directclr_fast.machine import machine
from directclr_fast.train import checkpoint, data, log, loop
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.loop import Trainer, TrainingDiverged, load_model
from directclr_fast.train.optim import learning_rate

TINY = {
    "data": "fake:n=80,size=8,channels=1",
    "encoder": "small",
    "image_size": 8,
    "views": "affine",
    "batch_size": 16,
    "epochs": 3,
    "optimizer": "adamw",
    "learning_rate": 2e-3,
}
FREE = {f.name for f in dataclasses.fields(TrainConfig) if f.metadata["resumed"] != "same"}
STEPS = 15  # of TINY: 3 epochs of 5

pytestmark = pytest.mark.usefixtures("one_thread")


def train(run_dir, name, *, resume=False, overwrite=False, on_step=None, **settings):
    config = TrainConfig(**{**TINY, "checkpoint_dir": str(run_dir), "name": name, **settings})
    trainer = Trainer(config, resume=resume, overwrite=overwrite, progress=False)
    return trainer, trainer.run(on_step)


def log_of(folder):
    """Header and step records of a run's log."""
    header, *records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert "loss" not in header
    return header, records


def untimed(folder):
    return [{k: v for k, v in r.items() if k != "images_per_second"} for r in log_of(folder)[1]]


def assert_same(a, b, where="checkpoint"):
    """Bitwise equality of nested containers of tensors and plain values."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def state_of(folder):
    """The checkpoint without what may differ: settings of the machine, bytes of timings."""
    state = checkpoint.load(folder)
    del state["log_bytes"]
    state["config"] = {k: v for k, v in state["config"].items() if k not in FREE}
    return state


# ---------------------------------------------------------------- settings


def bad_values():
    for field in dataclasses.fields(TrainConfig):
        how = field.metadata
        if how["choices"]:
            yield field.name, "none such", "one of "
        if isinstance(how["low"], int):
            yield field.name, how["low"] - 1, f"at least {how['low']}, got "
        elif how["low"] is not None:
            yield from ((field.name, v, "a finite number >= 0") for v in (-0.1, math.nan, math.inf))
        if how["positive"]:
            yield from ((field.name, v, "a positive finite number") for v in (0.0, math.nan))


@pytest.mark.parametrize(("name", "value", "expected"), list(bad_values()))
def test_a_setting_is_checked_as_its_field_says(name, value, expected):
    if name == "cache_bn":
        expected = "one of frozen-stats, two-pass, chunk, got 'none such'"
    with pytest.raises(ValueError, match=f"^{name}: expected {expected}"):
        TrainConfig(**{"device": "cpu", name: value}).resolve()


def test_every_setting_is_a_flag_of_its_kind():
    """And one that is not given stays as the field has it, whatever the set's recipe is."""
    given = vars(cli._parser().parse_args(["train"]))
    assert not [f.name for f in dataclasses.fields(TrainConfig) if given[f.name] is not None]
    words = "--epochs 3 --learning-rate 1 --download --no-channels-last --views small"
    given = vars(cli._parser().parse_args(["train", *words.split()]))
    kinds = {"epochs": 3, "learning_rate": 1.0, "download": True, "channels_last": False}
    for name, value in kinds.items():
        assert given[name] == value and type(given[name]) is type(value)
    assert {"workers", "name", "loss"} < FREE and "dim" not in FREE


# ---------------------------------------------------------------- what is trained


def test_both_losses_give_the_same_curve(run_dir):
    """They differ by fp32 rounding, and training lets any difference grow: by step 30 to between
    1e-4 and 1e-3 of the loss. The bound, over the first 10 steps and over all: 20 times what one
    rounding error in each initial weight comes to here, the most of three."""
    pytest.importorskip("sklearn")

    def curve(name, loss):
        settings = {
            **TINY,
            "data": "digits",
            "amp": "none",
            "batch_size": 64,
            "epochs": 60,
            "max_steps": 30,
        }
        settings.update(checkpoint_dir=str(run_dir), name=name, loss=loss)
        trainer = Trainer(TrainConfig(**settings), progress=False)
        if name.startswith("rounded"):
            generator = torch.Generator().manual_seed(int(name[-1]))
            for p in trainer.model.parameters():
                p.data *= 1 + 1.2e-7 * torch.randint(-1, 2, p.shape, generator=generator)
        result = trainer.run()
        assert (result["backend"] == "reference") == (loss == "reference")
        return torch.tensor([r["loss"] for r in log_of(run_dir / name)[1]], dtype=torch.float64)

    fast, reference = curve("fast", "fast"), curve("reference", "reference")
    assert len(fast) == 30 and reference[-5:].mean() < 0.8 * reference[:5].mean()
    growth = (fast - reference).abs() / reference
    rounded = torch.stack([curve(f"rounded{k}", "reference") for k in range(3)])
    ulp = ((rounded - reference).abs() / reference).amax(0)
    assert 20 * ulp[:10].max() < 1e-2 and 20 * ulp.max() < 0.1  # or it would say nothing
    for steps in (10, 30):
        assert growth[:steps].max() < 20 * ulp[:steps].max() + 1e-6


@pytest.mark.parametrize("mode", ["baseline", "directclr", "single", "simclr", "group"])
def test_every_mode_learns(mode, run_dir):
    _, result = train(run_dir, mode, mode=mode)
    losses = [r["loss"] for r in log_of(run_dir / mode)[1]]
    assert result["step"] == STEPS and all(map(math.isfinite, losses))
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    config, model, _ = load_model(run_dir / mode)
    assert config.mode == mode and model.objective.mode == mode and not model.training


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_every_optimizer_learns(optimizer, run_dir):
    rate = {"lars": 4.8, "sgd": 0.05}[optimizer]
    train(run_dir, "run", optimizer=optimizer, learning_rate=rate, epochs=4)
    losses = [r["loss"] for r in log_of(run_dir / "run")[1]]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_bf16(run_dir):
    train(run_dir, "bf16", amp="bf16", max_steps=6)
    train(run_dir, "fp32", max_steps=6)
    low, full = ([r["loss"] for r in log_of(run_dir / n)[1]] for n in ("bf16", "fp32"))
    assert low != full
    assert low == pytest.approx(full, rel=0.05)
    weights = load_model(run_dir / "bf16")[1].parameters()
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights)


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_compiled_encoder(run_dir):
    train(run_dir, "compiled", compile=True, max_steps=3)
    train(run_dir, "eager", max_steps=3)
    compiled, eager = ([r["loss"] for r in log_of(run_dir / n)[1]] for n in ("compiled", "eager"))
    assert compiled == pytest.approx(eager, rel=1e-3)
    assert load_model(run_dir / "compiled")[1] is not None  # the names are those of plain modules


def test_views_are_encoded_in_two_calls(run_dir):
    config = TrainConfig(**{**TINY, "checkpoint_dir": str(run_dir), "max_steps": 2})
    trainer = Trainer(config, progress=False)
    seen = []
    norm = trainer.model.encoder.stem[1]
    norm.register_forward_pre_hook(
        lambda module, args: seen.append((args[0].detach().clone(), module.running_mean.clone()))
    )
    trainer.run()
    assert [len(x) for x, _ in seen] == [16] * 4 and norm.num_batches_tracked == 4
    # The second call starts from the statistics that the first left.
    (first, before), (second, between) = seen[:2]
    assert not torch.equal(first, second)
    want = 0.9 * before + 0.1 * first.mean((0, 2, 3))
    torch.testing.assert_close(between, want)


def test_online_head_only_measures(run_dir, monkeypatch):
    train(run_dir, "labelled", max_steps=6)
    load = data.load

    def without_labels(*args, **kwargs):
        images = load(*args, **kwargs)
        images.labels.fill_(-1)
        return images

    monkeypatch.setattr(data, "load", without_labels)
    train(run_dir, "unlabelled", max_steps=6)
    known, unknown = (load_model(run_dir / n)[1] for n in ("labelled", "unlabelled"))
    assert_same(dict(known.encoder.state_dict()), dict(unknown.encoder.state_dict()))
    assert not torch.equal(known.head.weight, unknown.head.weight)
    assert {r["accuracy"] for r in log_of(run_dir / "unlabelled")[1]} == {0.0}


@pytest.mark.parametrize(("encoder", "workers"), [("small", 0), ("resnet18", 2)])
def test_a_folder_of_pictures(encoder, workers, run_dir, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    noise = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for i in range(10):
            pixels = noise.integers(256, size=(20, 24, 3), dtype=np.uint8)
            image.fromarray(pixels).save(tmp_path / "set" / label / f"{i}.png")
    settings = {"encoder": encoder, "workers": workers, "views": "small", "image_size": 16}
    settings.update(batch_size=8, max_steps=3)
    trainer, result = train(run_dir, "named", data=f"folder:{tmp_path / 'set'}", **settings)
    assert result["step"] == 3 and trainer.channels == 3 and trainer.classes == 2
    # The released trainer's --data is a bare path.
    train(run_dir, "bare", data=str(tmp_path / "set"), **{**settings, "workers": 0})
    assert_same(state_of(run_dir / "named")["model"], state_of(run_dir / "bare")["model"])


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw"},
        {"optimizer": "lars", "learning_rate": 4.8, "mode": "group"},
        {"optimizer": "sgd", "learning_rate": 0.05, "amp": "bf16", "mode": "simclr"},
    ],
    ids=["adamw", "lars-group", "sgd-bf16-simclr"],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(settings, run_dir):
    def seed_all(seed):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    seed_all(1)
    train(run_dir, "whole", **settings)
    seed_all(1)
    train(run_dir, "parts", **settings, max_steps=7)  # in the middle of the second epoch
    assert checkpoint.load(run_dir / "parts")["sampler"]["position"] == 2
    seed_all(2)  # another process has another state, which must not matter
    trainer, result = train(run_dir, "parts", **settings, resume=True)
    assert result["step"] == STEPS and trainer.log.file.closed
    whole = state_of(run_dir / "whole")
    assert len(whole["optimizer"]["state"]) > 10 and len(whole["rng"]["python"]) == 3
    assert_same(state_of(run_dir / "parts"), whole)
    assert untimed(run_dir / "parts") == untimed(run_dir / "whole")
    assert [r["step"] for r in untimed(run_dir / "whole")] == list(range(1, STEPS + 1))


def test_global_random_state_decides_nothing(run_dir):
    state = torch.get_rng_state()
    first = loop.Model(TrainConfig(**TINY).resolve(), 1, 10)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert_same(
        dict(loop.Model(TrainConfig(**TINY).resolve(), 1, 10).state_dict()),
        dict(first.state_dict()),
    )
    train(run_dir, "quiet", max_steps=6)

    def disturb(_):
        torch.manual_seed(random.randrange(2**30))
        np.random.seed(random.randrange(2**30))

    random.seed(5)
    train(run_dir, "disturbed", max_steps=6, on_step=disturb)
    for part in ("model", "optimizer", "sampler"):
        assert_same(state_of(run_dir / "quiet")[part], state_of(run_dir / "disturbed")[part])
    assert untimed(run_dir / "quiet") == untimed(run_dir / "disturbed")
    train(run_dir, "seeded", max_steps=1, seed=1)
    assert untimed(run_dir / "seeded")[0]["loss"] != untimed(run_dir / "quiet")[0]["loss"]


def test_damaged_checkpoint_gives_way_to_the_previous(run_dir):
    train(run_dir, "whole", save_every=3, max_steps=9)
    train(run_dir, "run", save_every=3, max_steps=6)
    path = run_dir / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="checkpoint.pt is unreadable .* using the previous one"):
        train(run_dir, "run", save_every=3, max_steps=9, resume=True)
    assert_same(state_of(run_dir / "run"), state_of(run_dir / "whole"))
    assert untimed(run_dir / "run") == untimed(run_dir / "whole")
    # Both whole again: the damaged one has not displaced the one that was used.
    assert checkpoint.load(checkpoint.previous(path))["step"] == 6


def test_resume_without_a_checkpoint_starts_anew_and_says_so(run_dir):
    with pytest.warns(UserWarning, match=r"^resume: no checkpoint in .*run, starting anew$"):
        _, result = train(run_dir, "run", resume=True, max_steps=2)
    assert result["step"] == 2


def test_resume_of_a_finished_run_changes_nothing(run_dir):
    train(run_dir, "run", max_steps=3)
    before = (run_dir / "run" / "log.jsonl").read_bytes()
    trainer, result = train(run_dir, "run", max_steps=3, resume=True)
    assert result["step"] == 3 and trainer.run()["step"] == 3
    assert train(run_dir, "run", max_steps=2, resume=True)[1]["step"] == 3
    assert (run_dir / "run" / "log.jsonl").read_bytes() == before


def test_what_was_logged_after_the_checkpoint_is_logged_again(run_dir):
    train(run_dir, "run", max_steps=3)
    path = run_dir / "run" / "log.jsonl"
    before = path.read_text()
    path.write_text(before + before.splitlines()[-1].replace('"step": 3', '"step": 4') + '\n{"st')
    train(run_dir, "run", max_steps=5, resume=True)
    assert path.read_text().startswith(before)
    assert [r["step"] for r in log_of(run_dir / "run")[1]] == [1, 2, 3, 4, 5]


def test_resume_where_the_log_is_gone(run_dir):
    train(run_dir, "run", max_steps=3)
    (run_dir / "run" / "log.jsonl").unlink()
    train(run_dir, "run", max_steps=5, resume=True)
    assert [r["step"] for r in log_of(run_dir / "run")[1]] == [4, 5]


def test_resume_on_another_kind_of_device(run_dir):
    """A GPU's generator has a state of another size: the run goes on with other views."""
    train(run_dir, "run", max_steps=3)
    path = run_dir / "run" / "checkpoint.pt"
    state = checkpoint.load(path)
    state["rng"]["views"] = torch.arange(16, dtype=torch.uint8)
    checkpoint.save(path, state)
    with pytest.warns(UserWarning, match="^device: .*views"):
        _, result = train(run_dir, "run", max_steps=5, resume=True)
    assert result["step"] == 5


# ---------------------------------------------------------------- log and checkpoints


def test_how_often_it_logs_and_saves(run_dir, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda p, s: (saved.append(s["step"]), save(p, s)))
    shown = []
    trainer, result = train(
        run_dir, "run", log_every=3, save_every=2, max_steps=7, on_step=shown.append, epochs=4
    )
    header, records = log_of(run_dir / "run")
    assert [r["step"] for r in records] == [3, 6, 7] == [r["step"] for r in shown]
    assert saved == [2, 4, 6, 7]
    assert result["step"] == 7 and trainer.total_steps == 20 and header["steps"] == 20
    here = {k: v for k, v in machine(gpu=False).items() if k not in ("available_gib", "dirty")}
    assert here.items() <= header.items() and header["ranks"] == 1
    assert records[0]["epoch"] == 0.6 and records[-1]["images_per_second"] > 0
    assert records[-1]["learning_rate"] == learning_rate(6, 20, 0, 2e-3)
    assert trainer.log.file.closed
    saved.clear()
    train(run_dir, "epochs", max_steps=12)
    assert saved == [5, 10, 12]
    config = json.loads((run_dir / "run" / "config.json").read_text())
    assert TrainConfig.from_dict(config) == trainer.config and config["warmup_epochs"] == 0


def test_a_schedule_of_steps(run_dir):
    """In the place of that of epochs, into another epoch, to the end of the cosine."""
    trainer, result = train(run_dir, "steps", steps=7, epochs=1)
    _, records = log_of(run_dir / "steps")
    assert result["step"] == trainer.total_steps == 7 and records[-1]["epoch"] == 1.4
    assert records[-1]["learning_rate"] < 0.1 * records[0]["learning_rate"]


def test_losses_are_read_seldom(run_dir, monkeypatch):
    """Reading waits for the device, so steps queue up between reads, and none is lost."""
    monkeypatch.setattr(log, "READ_EVERY", math.inf)
    reads, write = [], log.Log.write

    def reading(self, show):
        reads.append(self.waiting[-1][0])
        write(self, show)

    monkeypatch.setattr(log.Log, "write", reading)
    train(run_dir, "run", max_steps=12)
    assert reads == [5, 10, 12]
    assert [r["step"] for r in log_of(run_dir / "run")[1]] == list(range(1, 13))


# ---------------------------------------------------------------- steps that are left out


def spoiled(run_dir, how, steps, on_host=True, **settings):
    """A trainer whose loss, or the gradient of whose first weight alone, is not finite in steps."""
    config = {**TINY, "checkpoint_dir": str(run_dir), "name": "run", **settings}
    trainer = Trainer(TrainConfig(**config), progress=False)
    trainer.guard.on_host = on_host
    forward = trainer.model.objective.forward

    def now(value, otherwise):
        return value if trainer.step + 1 in steps else otherwise

    if how == "loss":  # its gradient is still finite
        trainer.model.objective.forward = lambda *r: forward(*r) + now(math.nan, 0.0)
    else:
        trainer.model.encoder.stem[0].weight.register_hook(lambda g: g * now(math.inf, 1.0))
    return trainer


def everything(trainer):
    """Copies of all that a step changes but the images and the schedule."""
    parts = (trainer.model.state_dict(), trainer.optimizer.state_dict()["state"])
    return copy.deepcopy([{k: v for k, v in part.items()} for part in parts])


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("how", ["loss", "gradient"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"optimizer": "lars", "learning_rate": 4.8}, {"optimizer": "sgd", "mode": "simclr"}],
    ids=["adamw", "lars", "sgd-simclr"],
)
def test_a_step_that_is_not_finite_changes_nothing(settings, how, on_host, run_dir):
    trainer = spoiled(run_dir, how, {4}, on_host, max_steps=6, **settings)
    step, seen = trainer.guard.step, []

    def between(loss):
        before = everything(trainer)
        for buffer, old in zip(trainer.guard.statistics, trainer.guard.before):
            seen.append(not torch.equal(buffer, old))
        step(loss)
        seen.append((trainer.step + 1, before, everything(trainer)))

    trainer.guard.step = between
    statistics = []
    start = trainer.guard.start
    trainer.guard.start = lambda: (
        start(), statistics.append([b.clone() for b in trainer.guard.statistics])
    )  # fmt: skip
    trainer.run()
    assert any(x is True for x in seen)  # the forward pass had moved the running statistics
    updates = {x[0]: x[1:] for x in seen if isinstance(x, tuple)}
    weights = {name for name, _ in trainer.model.named_parameters()}
    for number, (before, after) in updates.items():
        same = [torch.equal(before[0][k], after[0][k]) for k in weights]
        assert all(same) == (number == 4), number
    if updates[4][0][1]:
        assert_same(updates[4][0][1], updates[4][1][1])
    assert len(updates[4][0][1]) == len(weights)
    assert_same(statistics[3], statistics[4])
    assert not torch.equal(statistics[2][0], statistics[3][0])
    records = log_of(run_dir / "run")[1]
    assert [r["skipped"] for r in records] == [0, 0, 0, 1, 1, 1]
    lost = [r["step"] for r in records if r["loss"] == "nan"]
    assert lost == ([4] if how == "loss" else [])


def test_both_ways_of_leaving_out_train_alike(run_dir):
    """Putting back on the device, as on GPUs, and looking from the host: the same bits."""
    for name, on_host in (("host", True), ("device", False)):
        trainer = spoiled(run_dir, "gradient", {1, 4, 5}, on_host, name=name)
        trainer.run()
        assert trainer.guard.counts.tolist() == [3, 0]
    assert_same(state_of(run_dir / "host"), state_of(run_dir / "device"))
    assert untimed(run_dir / "host") == untimed(run_dir / "device")


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("on_host", [True, False])
def test_divergence_keeps_the_last_good_checkpoint(on_host, log_every, run_dir):
    settings = {"save_every": 2, "log_every": log_every, "max_skipped": 4}
    trainer = spoiled(run_dir, "loss", set(range(6, 99)), on_host, **settings)
    text = r"nan or inf in 4 steps in a row by step 9; the last good .*\.pt$"
    with pytest.raises(TrainingDiverged, match=text):
        trainer.run()
    assert trainer.log.file.closed
    state = checkpoint.load(run_dir / "run")
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["model"].values())
    if log_every == 1:
        assert [r["loss"] == "nan" for r in log_of(run_dir / "run")[1]] == [False] * 5 + [True] * 4
    train(run_dir, "run", **settings, resume=True)
    assert [r["step"] for r in log_of(run_dir / "run")[1]] == (
        list(range(1, STEPS + 1)) if log_every == 1 else [STEPS]
    )


def test_a_gpu_is_asked_seldom(run_dir):
    trainer = spoiled(run_dir, "loss", set(range(6, 99)), False, save_every=99, max_skipped=4)
    with pytest.raises(TrainingDiverged, match="in 7 steps in a row by step 12; there is no"):
        trainer.run()


def test_a_checkpoint_that_is_due_waits_for_a_step_that_is_taken(run_dir, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda p, s: (saved.append(s["step"]), save(p, s)))
    spoiled(run_dir, "loss", {4, 5, 8}, save_every=4, max_steps=10).run()
    assert saved == [6, 9, 10]


def test_what_was_skipped_is_remembered(run_dir):
    spoiled(run_dir, "loss", {2, 5}, max_steps=6).run()
    train(run_dir, "run", max_steps=8, resume=True)
    assert [r["skipped"] for r in log_of(run_dir / "run")[1]] == [0, 1, 1, 1, 2, 2, 2, 2]


def test_divergence_before_any_checkpoint_says_so(run_dir):
    with pytest.raises(TrainingDiverged, match="there is no checkpoint yet"):
        train(run_dir, "run", optimizer="sgd", learning_rate=1e30)


def test_weights_that_are_not_finite_are_not_saved(run_dir):
    trainer = spoiled(run_dir, "loss", {}, save_every=2)
    step = trainer.optimizer.step

    def far():
        step()
        if trainer.step == 5:  # a finite gradient can do that
            trainer.model.head.weight.data.fill_(math.inf)

    trainer.optimizer.step = far
    with pytest.raises(TrainingDiverged, match=r"nan or inf by step 6; the last good .*\.pt$"):
        trainer.run()
    assert checkpoint.load(run_dir / "run")["step"] == 4


def test_gradient_scaler(run_dir, monkeypatch):
    """As fp16 on a GPU uses it: a power of two changes no bits, an overflow halves it and skips."""
    train(run_dir, "plain", max_steps=6)
    real, scale = torch.amp.GradScaler, 2.0**10

    def scaler(device, enabled):
        return real(device, init_scale=scale, enabled=True)

    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    trainer, _ = train(run_dir, "scaled", max_steps=6)
    assert trainer.guard.on_host and trainer.scaler.get_scale() == scale
    assert_same(state_of(run_dir / "scaled")["model"], state_of(run_dir / "plain")["model"])
    assert_same(untimed(run_dir / "scaled"), untimed(run_dir / "plain"))
    scale = 2.0**127
    trainer, _ = train(run_dir, "overflow", max_steps=6, max_skipped=99)
    count = trainer.guard.counts[0].item()
    assert 0 < count < 6 and trainer.scaler.get_scale() == scale / 2**count
    # The checkpoint carries the scale on.
    trainer, _ = train(run_dir, "overflow", max_steps=7, resume=True)
    assert trainer.guard.counts[0] == count and trainer.scaler.get_scale() == scale / 2**count


# ---------------------------------------------------------------- refusals


def test_a_folder_with_a_checkpoint_is_refused_and_kept(run_dir):
    train(run_dir, "run", max_steps=2, save_every=1)
    files = {p: p.read_bytes() for p in (run_dir / "run").iterdir()}
    assert len(files) == 4

    def unchanged():
        return {p: p.read_bytes() for p in (run_dir / "run").iterdir()} == files

    with pytest.raises(ValueError, match=r"^name: expected a folder without a checkpoint.*--resu"):
        train(run_dir, "run")
    for name, value in (("batch_size", 8), ("seed", 1), ("mode", "baseline"), ("dim", 9)):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, as the run in .*run began, g"):
            train(run_dir, "run", resume=True, **{name: value})
    # With --overwrite too, nothing goes before the new run is known to start.
    with pytest.raises(ValueError, match=r"^batch size: expected at most 80 .*, got 81$"):
        train(run_dir, "run", overwrite=True, batch_size=81)
    with pytest.raises(FileNotFoundError):
        train(run_dir, "run", overwrite=True, data="folder:/nowhere")
    assert unchanged()
    train(run_dir, "run", overwrite=True, max_steps=1)
    assert [r["step"] for r in log_of(run_dir / "run")[1]] == [1]
    assert not checkpoint.previous(run_dir / "run" / "checkpoint.pt").exists()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^checkpoint_dir: expected a folder to write to, got .*/x"):
        Trainer(TrainConfig(**{**TINY, "checkpoint_dir": str(tmp_path / "file"), "name": "x"}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", "imagenet"), ("data", "/nowhere"), ("encoder", "vit"), ("views", "large"),
        ("mode", "byol"), ("negatives", "none"), ("loss", "slow"), ("optimizer", "adam"),
        ("amp", "fp8"), ("amp", "fp16"), ("device", "gpu"), ("device", "cuda:99"),
        ("batch_size", 1), ("epochs", 0), ("dim", 0), ("image_size", 1), ("workers", -1),
        ("seed", -1), ("seed", 2**63), ("learning_rate", math.nan), ("learning_rate", math.inf),
        ("weight_decay", -1.0), ("temperature", 0.0), ("temperature", math.inf),
        ("warmup_epochs", 4), ("log_every", 0), ("save_every", 0), ("max_steps", 0),
        ("name", "a/b"), ("name", ""),
    ],
)  # fmt: skip
def test_settings_are_checked_before_anything_is_read_or_made(name, value, run_dir, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    settings = {**TINY, "device": "cpu", "checkpoint_dir": str(run_dir), name: value}
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got ") as caught:
        Trainer(TrainConfig(**settings))
    assert "\n" not in str(caught.value) and not run_dir.exists()


def test_dim_wider_than_the_encoder(run_dir):
    with pytest.raises(ValueError, match=r"^dim: expected 1 to 256 \(the encoder's width\), got 3"):
        train(run_dir, "run", dim=300)


def test_short_runs_get_a_short_warm_up():
    assert TrainConfig(data="digits").resolve().warmup_epochs == 3
    assert TrainConfig(data="digits", epochs=1).resolve().warmup_epochs == 0
    assert TrainConfig(data="digits", epochs=4).resolve().warmup_epochs == 2
    assert TrainConfig(data="digits", epochs=4, warmup_epochs=4).resolve().warmup_epochs == 4


def test_settings_of_another_version():
    with pytest.raises(ValueError, match="^config: expected settings of this version, got 'x'"):
        TrainConfig.from_dict({"x": 1})


def test_small_sets_are_trained_in_bf16_where_that_is_faster(monkeypatch):
    def amp(fast, isas, **settings):
        kernels = types.SimpleNamespace(has_bf16=lambda: fast, available_isas=lambda: isas)
        monkeypatch.setattr(cpu, "_cpu", kernels)
        return TrainConfig(**{"data": "digits", "device": "cpu", **settings}).resolve().amp

    assert amp(True, []) == amp(False, ["amx", "avx512"]) == "bf16"
    assert (
        amp(False, ["avx512"]) == amp(True, [], amp="none") == amp(True, [], data="fake") == "none"
    )
    monkeypatch.setattr(cpu, "_cpu", None)
    assert TrainConfig(data="digits", device="cpu").resolve().amp == "none"
