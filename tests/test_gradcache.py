"""Gradient caching is the plain step: dropout, ragged chunks, autocast, each rule for BatchNorm.

Equality of the two is held in fp64, where 1e-9 is far above any library's rounding, whatever kernel
it takes for a chunk, and far below any difference of meaning.
"""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_train_run import TINY, assert_same, log_of, state_of, train
from torch import nn

from directclr_fast.train.gradcache import GradientCache
from directclr_fast.train.objective import Objective
from directclr_fast.train.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")
N, CLASSES = 22, 3
EQUAL = 1e-9
FP32 = 2e-6  # 16 ulps: of "two-pass", which keeps its pooled statistics in fp32


def encoder(norm: bool, dropout: float) -> nn.Sequential:
    """(B, 2, 5, 5) to (B, 32), with two BatchNorms or none; without a last bias, which the
    projector's BatchNorm undoes, so that its gradient is rounding alone."""
    layers = [nn.Conv2d(2, 8, 3, bias=False)]
    layers += [nn.BatchNorm2d(8)] * norm
    layers += [nn.ReLU(), nn.Dropout2d(dropout), nn.Conv2d(8, 16, 3, bias=False)]
    layers += [nn.BatchNorm2d(16)] * norm
    layers += [nn.Flatten(), nn.Dropout(dropout), nn.Linear(16, 32, bias=False)]
    return nn.Sequential(*layers)


class Model(nn.Module):
    """As loop.Model, with an encoder of choice."""

    def __init__(self, mode="simclr", norm=False, dropout=0.0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = encoder(norm, dropout)
        self.objective = Objective(mode, 32)
        self.head = nn.Linear(32, CLASSES)
        for module in self.encoder.modules():  # not what a new network has, for "frozen-stats"
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                nn.init.normal_(module.weight, 1, 0.3)
        self.to(dtype)

    def forward(self, view):
        return self.encoder(view)

    def losses(self, r1, r2, labels):
        scores = self.head(r1.detach())
        accuracy = (scores.argmax(1) == labels).float().mean()
        return self.objective(r1, r2), F.cross_entropy(scores, labels), accuracy


@pytest.fixture
def batch():
    """Two views (N, 2, 5, 5) of the same points, fp64, and labels."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(N, 2, 5, 5, generator=generator, dtype=torch.float64)
    second = first + 0.5 * torch.randn(first.shape, generator=generator, dtype=torch.float64)
    return first, second, torch.randint(CLASSES, (N,), generator=generator)


def cut(view, chunk_size):
    """The chunks, restated: as few as fit, as equal as can be."""
    count = -(-N // chunk_size)
    ends = [N * k // count for k in range(count + 1)]
    return [view[low:high] for low, high in zip(ends, ends[1:])]


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def cached(model, batch, chunk_size, rule=None, scope=contextlib.nullcontext, seed=7):
    """(loss, gradients by name, BatchNorm's buffers) of a copy of the model."""
    model = copy.deepcopy(model).train()
    cache = GradientCache(model, model, chunk_size, rule, scope, Ranks())
    torch.manual_seed(seed)
    loss, _ = cache.backward(lambda view, rows: batch[view][rows], batch[2])
    return outcome(model, loss)


def plain(model, batch, chunk_size, scope=contextlib.nullcontext, seed=7, ready=lambda model: None):
    """The same with every graph kept, the encoder called for each chunk."""
    model = copy.deepcopy(model).train()
    ready(model)
    torch.manual_seed(seed)
    with scope():
        r = [torch.cat([model.encoder(x) for x in cut(view, chunk_size)]) for view in batch[:2]]
        loss, head_loss, _ = model.losses(*r, batch[2])
    (loss + head_loss).backward()
    return outcome(model, loss)


def outcome(model, loss):
    grads = {name: p.grad for name, p in model.named_parameters()}
    return loss.item(), grads, dict(model.encoder.named_buffers())


def difference(a, b):
    """Largest relative difference of the two losses and of each of the gradients."""
    assert a[1].keys() == b[1].keys()
    rows = [abs(a[0] - b[0]) / abs(b[0])]
    rows += [((a[1][k] - b[1][k]).norm() / b[1][k].norm()).item() for k in a[1]]
    return max(rows)


@pytest.mark.parametrize("mode", ["directclr", "simclr", "single", "group"])
@pytest.mark.parametrize("chunk_size", [1, 5, 11, 22, 64])
def test_equals_the_plain_step(chunk_size, mode, batch):
    """Dropout on, 22 rows: by one, ragged, even, whole and more than whole."""
    model = Model(mode, dropout=0.3)
    before = plain(model, batch, chunk_size)
    assert difference(cached(model, batch, chunk_size), before) < EQUAL
    assert difference(plain(model, batch, chunk_size, seed=8), before) > 1e-2  # dropout is on
    # Without chance, also the step that encodes the whole batch at once.
    model = Model(mode)
    assert difference(cached(model, batch, chunk_size), plain(model, batch, N)) < EQUAL


def test_random_state_goes_on_as_in_the_plain_step(batch):
    model = Model(dropout=0.3)
    states = []
    for run in (plain, cached):
        run(model, batch, 5)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("rule", [None, "chunk"])
def test_autocast(rule, batch):
    """Within bf16's own error: no further from fp32 than 1.5 times the plain step under autocast,
    which adds up the chunks' gradients of a weight in bf16."""
    model = Model(norm=rule is not None, dropout=0.3, dtype=torch.float32)
    batch = [x.float() if x.is_floating_point() else x for x in batch]
    exact, rounded = plain(model, batch, 5), plain(model, batch, 5, bf16)
    got = cached(model, batch, 5, rule, bf16)
    error = {name: (rounded[1][name] - g).norm() / g.norm() for name, g in exact[1].items()}
    assert max(error.values()) > 1e-3  # autocast is on
    for name, g in exact[1].items():
        assert (got[1][name] - g).norm() / g.norm() < 1.5 * error[name] + 1e-5, name
    # Both saw the same representations, so this is the fp32 rounding of one loss.
    assert got[0] == pytest.approx(rounded[0], rel=1e-5)


def test_scaled_loss_gives_scaled_gradients(batch):
    model = Model(dropout=0.3)
    want = cached(model, batch, 5)
    copied = copy.deepcopy(model)
    cache = GradientCache(copied, copied, 5, None, contextlib.nullcontext, Ranks())
    torch.manual_seed(7)
    loss, _ = cache.backward(lambda v, rows: batch[v][rows], batch[2], lambda loss: 1024 * loss)
    assert loss.item() == want[0]
    assert all(torch.equal(p.grad, 1024 * want[1][n]) for n, p in copied.named_parameters())


# ---------------------------------------------------------------- BatchNorm


@pytest.mark.parametrize("chunk_size", [5, 11])
def test_chunk_rule(chunk_size, batch):
    """A plain step that calls the encoder for each chunk; running statistics move once for each."""
    model = Model(norm=True, dropout=0.3)
    got, want = cached(model, batch, chunk_size, "chunk"), plain(model, batch, chunk_size)
    assert difference(got, want) < EQUAL
    assert_same(got[2], want[2])
    assert got[2]["1.num_batches_tracked"] == 2 * -(-N // chunk_size)
    assert difference(got, plain(model, batch, N)) > 1e-2  # not what the whole batch gives


def test_frozen_rule(batch):
    """A plain step with BatchNorm in eval mode, its weight and bias trained; nothing moves."""

    def freeze(model):
        for module in model.encoder:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    model = Model(norm=True, dropout=0.3)
    got, want = cached(model, batch, 5, "frozen-stats"), plain(model, batch, 5, ready=freeze)
    assert difference(got, want) < EQUAL and got[1]["encoder.1.weight"].norm() > 0
    assert_same(got[2], dict(model.encoder.named_buffers()))


def statistics(model, batch, chunk_size):
    """[view][norm] (mean, var) of two-pass, restated: pooled over chunks, in fp64."""
    model = copy.deepcopy(model).train()
    inputs = []
    for module in model.encoder:
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda m, x: inputs.append(x[0].detach().double()))
    result = []
    torch.manual_seed(7)
    for view in batch[:2]:
        for x in cut(view, chunk_size):
            model.encoder(x)
        layers = (torch.cat(inputs[i::2]) for i in (0, 1))
        over = (0, 2, 3)
        result.append([(x.mean(over), x.var(over, correction=0)) for x in layers])
        inputs.clear()
    return result


@pytest.mark.parametrize("chunk_size", [5, 22])
def test_two_pass_rule(chunk_size, batch):
    """A plain step whose BatchNorms hold the pooled statistics as constants."""
    model = Model(norm=True, dropout=0.3)
    values = statistics(model, batch, chunk_size)
    got = cached(model, batch, chunk_size, "two-pass")

    def constants(copied):
        # Both views go through before backward, so each view needs its own tensors.
        layers = [m for m in copied.encoder if isinstance(m, nn.BatchNorm2d)]
        calls = [0, 0]
        chunks = -(-N // chunk_size)

        def fixed(index, layer):
            def forward(x):
                mean, var = values[calls[index] // chunks][index]
                calls[index] += 1
                return F.batch_norm(x, mean, var, layer.weight, layer.bias)

            return forward

        for index, layer in enumerate(layers):
            layer.forward = fixed(index, layer)

    assert difference(got, plain(model, batch, chunk_size, ready=constants)) < FP32
    # The first BatchNorm's are the whole batch's, whatever the chunks; running ones move once a
    # view, as in a plain step.
    whole = plain(model, batch, N)
    if chunk_size == N:
        assert got[0] == pytest.approx(whole[0], rel=FP32)
        names = list(whole[2])
        assert difference(got, whole) > 1e-3  # but the gradient knows constants only
    else:
        names = [name for name in whole[2] if name.startswith("1.")]
        assert abs(got[0] - whole[0]) / whole[0] > 1e-4
    for name in names:
        torch.testing.assert_close(got[2][name], whole[2][name], rtol=FP32, atol=FP32, msg=name)


def test_two_pass_dropout_leaves_out_the_same_in_the_first_pass(batch):
    """Otherwise one chunk's statistics would not be those it is normalised by."""
    model = Model(norm=True, dropout=0.5)
    got, want = cached(model, batch, N, "two-pass"), plain(model, batch, N)
    assert got[0] == pytest.approx(want[0], rel=FP32)


def test_projector_sees_the_whole_batch(batch):
    model = Model("simclr", dropout=0.3)
    copied = copy.deepcopy(model)
    cache = GradientCache(copied, copied, 5, None, contextlib.nullcontext, Ranks())
    seen = []
    copied.objective.projector[1].register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    cache.backward(lambda v, rows: batch[v][rows], batch[2])
    assert seen == [N, N]


def test_rule_must_be_chosen():
    model = Model(norm=True)
    with pytest.raises(
        ValueError, match=r"^cache_bn: expected one of frozen-stats, two-pass, chun"
    ):
        GradientCache(model, model, 5, None, contextlib.nullcontext, Ranks())
    model = Model()
    GradientCache(model, model, 5, None, contextlib.nullcontext, Ranks())


# ---------------------------------------------------------------- in the trainer

SETTINGS = {"optimizer": "sgd", "learning_rate": 0.01, "max_steps": 4, "batch_size": 18}


def weights(folder):
    return torch.cat([v.double().flatten() for v in state_of(folder)["model"].values()])


def test_one_chunk_is_the_plain_run(run_dir):
    train(run_dir, "plain", **SETTINGS, mode="simclr")
    train(run_dir, "cached", **SETTINGS, mode="simclr", chunk_size=18, cache_bn="chunk")
    assert_same(state_of(run_dir / "cached"), state_of(run_dir / "plain"))


@pytest.mark.parametrize("rule", ["chunk", "two-pass", "frozen-stats"])
def test_resumed_run_is_bitwise_the_uninterrupted_one(rule, run_dir):
    chunks = {"chunk_size": 7, "cache_bn": rule}
    train(run_dir, "whole", **SETTINGS, **chunks)
    train(run_dir, "parts", **{**SETTINGS, "max_steps": 2}, **chunks)
    train(run_dir, "parts", **SETTINGS, **chunks, resume=True)
    assert_same(state_of(run_dir / "parts"), state_of(run_dir / "whole"))


def test_chunks_may_be_changed_on_resume_and_that_is_said(run_dir):
    train(run_dir, "run", **{**SETTINGS, "max_steps": 2})
    before = state_of(run_dir / "run")["model"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(run_dir, "run", **SETTINGS, chunk_size=5, cache_bn="frozen-stats", resume=True)
    text = [str(w.message) for w in caught]
    assert text == [
        "chunk_size: none in the checkpoint being resumed, now 5",
        "cache_bn: none in the checkpoint being resumed, now 'frozen-stats'",
    ]
    after = state_of(run_dir / "run")["model"]
    for name in after:
        moved = not torch.equal(before[name], after[name])
        assert moved == ("running" not in name and "tracked" not in name), name


def test_a_step_that_is_not_finite_changes_nothing(run_dir):
    """Statistics that the passes moved are put back too."""
    from directclr_fast.train.config import TrainConfig
    from directclr_fast.train.loop import Trainer

    for rule in ("chunk", "two-pass"):
        settings = {**TINY, **SETTINGS, "checkpoint_dir": str(run_dir), "name": rule}
        trainer = Trainer(TrainConfig(**settings, chunk_size=5, cache_bn=rule), progress=False)
        trainer.model.encoder.stem[0].weight.register_hook(lambda g: g * float("nan"))
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.run()
        assert_same(dict(trainer.model.state_dict()), dict(before))
        assert [r["skipped"] for r in log_of(run_dir / rule)[1]] == [1, 2, 3, 4]


def test_settings(run_dir):
    with pytest.raises(
        ValueError, match=r"^cache_bn: .* since chunk_size is given and the encoder"
    ):
        train(run_dir, "run", chunk_size=4)
    with pytest.raises(ValueError, match=r"^cache_bn: expected chunk_size with it, got 'chunk' al"):
        train(run_dir, "run", cache_bn="chunk")
    with pytest.raises(
        ValueError, match=r"^cache_bn: expected one of frozen-stats, two-pass, chun"
    ):
        train(run_dir, "run", chunk_size=4, cache_bn="none")
    with pytest.raises(ValueError, match=r"^chunk_size: expected at least 1, got 0"):
        train(run_dir, "run", chunk_size=0, cache_bn="chunk")
