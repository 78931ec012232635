"""The adapters against a plain formula, and against their originals where those are installed.

This file as a script is one of two processes, for the arguments that gather.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import waiting
from torch import nn

from directclr_fast import info_nce
from directclr_fast.adapters import lightly, open_clip, pytorch_metric_learning
from directclr_fast.adapters import sentence_transformers as sentences
from directclr_fast.testing import make_views, relative_error

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
peers = pytest.mark.parametrize("peer", ["formula", "original"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp64", "fp32"])


def original(module: str):
    """The library, or a skip that says why not."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module} cannot be imported: {error}")


def evaluated(loss, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """Value and gradients."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)]


def assert_same(ours, theirs, *leaves) -> None:
    """Equal values and gradients."""
    for mine, other in zip(evaluated(ours, *leaves), evaluated(theirs, *leaves), strict=True):
        assert relative_error(mine, other) < TOLERANCE[leaves[0].dtype]


def nll(anchors, candidates, temperature, own=None):
    """Loss of each anchor; candidate i is the positive of anchor i, ``own`` marks what to drop."""
    logits = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T / temperature
    if own is not None:
        logits = logits.masked_fill(own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(anchors)), reduction="none")


def nt_xent(out0, out1, temperature):
    """Loss of each pair of rows, with the other 2N - 1 rows as candidates."""
    none, self = torch.zeros(len(out0), len(out0)).bool(), torch.eye(len(out0)).bool()
    own = torch.cat([none, self], 1)
    first = nll(out0, torch.cat([out1, out0]), temperature, own)
    return (first + nll(out1, torch.cat([out0, out1]), temperature, own)) / 2


# lightly


@peers
@dtypes
def test_lightly_nt_xent(dtype, peer):
    def theirs(a, b):
        return nt_xent(a, b, 0.3).mean()

    if peer == "original":
        theirs = original("lightly.loss").NTXentLoss(0.3)
    ours = lightly.NTXentLoss(0.3, memory_bank_size=(0, 24))
    assert_same(ours, theirs, *make_views(33, 24, dtype=dtype))


@peers
@dtypes
@pytest.mark.parametrize("loss_dim", [16, 24, 500, -4])
def test_lightly_directclr(dtype, loss_dim, peer):
    def theirs(a, b):
        return nt_xent(a.flatten(1)[:, :loss_dim], b.flatten(1)[:, :loss_dim], 0.2).mean()

    if peer == "original":
        library = original("lightly.loss")
        if not hasattr(library, "DirectCLRLoss"):
            pytest.skip("this lightly has no DirectCLRLoss")
        theirs = library.DirectCLRLoss(loss_dim, 0.2)
    views = [view.view(33, 4, 6) for view in make_views(33, 24, dtype=dtype)]
    assert_same(lightly.DirectCLRLoss(loss_dim=loss_dim, temperature=0.2), theirs, *views)


class Bank(nn.Module):
    """MoCo's loss with a queue as plain as can be: ``NTXentLoss`` with a memory bank."""

    def __init__(self, temperature, memory_bank_size):
        super().__init__()
        self.temperature, self.memory_bank = temperature, nn.Module()
        self.memory_bank.bank = F.normalize(torch.randn(memory_bank_size), dim=1)
        self.at = 0

    def forward(self, out0, out1):
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        logits = torch.cat([(out0 * out1).sum(1, True), out0 @ self.memory_bank.bank.clone().T], 1)
        if out0.requires_grad:
            for row in out1.detach():
                self.memory_bank.bank[self.at] = row
                self.at += 1
                if self.at == len(self.memory_bank.bank):
                    self.at = 0
                    break
        return F.cross_entropy(logits / self.temperature, torch.zeros(len(logits)).long())


@peers
@pytest.mark.parametrize("loss_dim", [None, 20])
def test_lightly_memory_bank(loss_dim, peer):
    """Three batches of 9 in a queue of 20 rows: the third is cut at its end."""
    kind, width = lightly.NTXentLoss, 24
    theirs = Bank
    if peer == "original":
        theirs = original("lightly.loss").NTXentLoss
    ours = kind(0.2, (20, loss_dim or width))
    if loss_dim is not None:
        ours = lightly.DirectCLRLoss(loss_dim, 0.2, (20, loss_dim))
    theirs = theirs(temperature=0.2, memory_bank_size=(20, loss_dim or width))
    ours.memory_bank.bank.copy_(theirs.memory_bank.bank)
    for seed in range(4):
        views = [v.float().requires_grad_() for v in make_views(9, width, seed=seed)]
        values = []
        for loss, dim in ((ours, None), (theirs, loss_dim)):
            value = loss(*(view[:, :dim] for view in views))
            values.append([value, *torch.autograd.grad(value, views)])
        for mine, other in zip(*values):
            assert relative_error(mine, other) < 2e-5
        assert relative_error(ours.memory_bank.bank, theirs.memory_bank.bank) < 1e-6
    before = ours.memory_bank.bank.clone()
    ours(*(view.detach() for view in views))  # an evaluation puts nothing in
    assert torch.equal(before, ours.memory_bank.bank) and not ours.state_dict()
    with pytest.raises(
        ValueError, match="out1: expected .* columns, those of memory_bank_size, got"
    ):
        ours(*make_views(9, 7))


def test_lightly_defaults_and_errors(monkeypatch):
    assert lightly.NTXentLoss().temperature == lightly.DirectCLRLoss().temperature == 0.5
    assert lightly.DirectCLRLoss().loss_dim == 64
    for kind in (lightly.NTXentLoss, lightly.DirectCLRLoss):
        for temperature in (0.0, -1.0):
            expected = f"temperature: expected at least 1e-8, got {temperature}"
            with pytest.raises(ValueError, match=expected):
                kind(temperature=temperature)
        for size in (64, (64, 0), (64, 8, 1)):
            with pytest.raises(ValueError, match="memory_bank_size: expected 0 or"):
                kind(memory_bank_size=size)
    # Outside torch.distributed there is nobody to gather from.
    views = make_views(8, 6)
    assert lightly.NTXentLoss(gather_distributed=True)(*views) == lightly.NTXentLoss()(*views)
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed: expected False in a PyTorch with"):
        lightly.NTXentLoss(gather_distributed=True)


def test_losses_of_half_precision_are_fp32():
    views = make_views(8, 6, dtype=torch.bfloat16)
    metric = pytorch_metric_learning
    for loss in (
        lightly.DirectCLRLoss(),
        metric.SelfSupervisedLoss(metric.NTXentLoss()),
        lambda a, b: open_clip.ClipLoss()(a, b, torch.tensor(10.0)),
        lambda a, b: sentences.MultipleNegativesRankingLoss(
            nn.Identity()
        ).compute_loss_from_embeddings([a, b]),
    ):
        value, *gradients = evaluated(loss, *views)
        assert value.dtype == torch.float32
        assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}


def test_lightly_temperature_schedule():
    views, criterion = make_views(8, 6, dtype=torch.float64), lightly.NTXentLoss(0.5)
    criterion.temperature = 0.1
    torch.testing.assert_close(criterion(*views), nt_xent(*views, 0.1).mean())


# open_clip


def clip(loss, **more):
    """A call on towers that normalise, and a learned scale, as open_clip's models do."""

    def call(images, texts, log_scale):
        unit = {"image_features": F.normalize(images, dim=1)}
        unit["text_features"] = F.normalize(texts, dim=1)
        return loss(**unit, logit_scale=log_scale.exp(), **more)

    return call


def plain_clip(image_features, text_features, logit_scale):
    logits = logit_scale * image_features @ text_features.T
    target = torch.arange(len(text_features))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@peers
@dtypes
def test_open_clip(dtype, peer):
    given = [*make_views(29, 24, dtype=dtype), torch.tensor(2.5, dtype=dtype)]
    theirs, ours = plain_clip, open_clip.ClipLoss(cache_labels=True)
    if peer == "original":
        theirs = original("open_clip.loss").ClipLoss(cache_labels=True)
        assert clip(theirs, output_dict=True)(*given).keys() == {"contrastive_loss"}
    assert_same(clip(ours), clip(theirs), *given)
    output = clip(ours, output_dict=True)
    assert_same(lambda *given: output(*given)["contrastive_loss"], clip(theirs), *given)


def test_open_clip_normalises_what_is_not_unit():
    images, texts = make_views(12, 8, dtype=torch.float64)
    ours = open_clip.ClipLoss()(images, texts, 10.0)
    unit = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    torch.testing.assert_close(ours, plain_clip(*unit, 10.0))
    assert relative_error(ours, plain_clip(images, texts, 10.0)) > 0.1


def test_open_clip_errors():
    views = make_views(8, 6)
    with pytest.raises(NotImplementedError, match="logit_bias: expected None"):
        open_clip.ClipLoss()(*views, 10.0, torch.tensor(-10.0))
    with pytest.raises(NotImplementedError, match="use_horovod: expected False, got True"):
        open_clip.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="world_size: expected 1, .* got 8"):
        open_clip.ClipLoss(world_size=8)(*views, 10.0)


# pytorch_metric_learning


@peers
@dtypes
@pytest.mark.parametrize("references", [0, 21, 30])
def test_supervised_pytorch_metric_learning(dtype, references, peer):  # N20
    views = make_views(21, 16, candidates=references or 21, dtype=dtype)
    labels = torch.arange(references or 21) % 6 - 2
    ours = pytorch_metric_learning.SupConLoss(0.2)

    def theirs(a, b):
        if references:
            candidates, own = b, torch.zeros(21, references).bool()
            same = labels[:21, None] == labels
        else:
            a = candidates = torch.cat([a, b])
            own, same = torch.eye(42).bool(), labels.repeat(2)[:, None] == labels.repeat(2)
        logits = F.normalize(a, dim=1) @ F.normalize(candidates, dim=1).T / 0.2
        shares = logits.masked_fill(own, -torch.inf).log_softmax(1)
        same = same & ~own
        return -(torch.where(same, shares, 0.0).sum(1) / same.sum(1)).mean()

    def call(loss):
        if references:
            return lambda a, b: loss(a, labels[:21], ref_emb=b, ref_labels=labels)
        return lambda a, b: loss(torch.cat([a, b]), labels.repeat(2))

    if peer == "original":
        theirs = call(original("pytorch_metric_learning.losses").SupConLoss(0.2))
    assert_same(call(ours), theirs, *views)
    for given in (labels.repeat(2).sort().values, labels[:7]):
        if not references:
            with pytest.raises(
                NotImplementedError, match="labels: expected row i of the second half"
            ):
                ours(torch.randn(len(given), 16), given)


@peers
@dtypes
@pytest.mark.parametrize("symmetric", [True, False])
def test_pytorch_metric_learning(dtype, symmetric, peer):
    views, ours = make_views(21, 16, dtype=dtype), pytorch_metric_learning.NTXentLoss(0.2)

    def theirs(a, b):
        return (nt_xent(a, b, 0.2) if symmetric else nll(a, b, 0.2)).mean()

    def by_label(a, b):
        labels = torch.arange(100, 121)
        if symmetric:
            return ours(torch.cat([a, b]), torch.cat([labels, labels]))
        return ours(a, labels, ref_emb=b, ref_labels=labels.clone())

    if peer == "original":
        losses = original("pytorch_metric_learning.losses")
        theirs = losses.SelfSupervisedLoss(losses.NTXentLoss(0.2), symmetric=symmetric)
        by_label = losses.SelfSupervisedLoss(ours, symmetric=symmetric)  # their wrapper, our loss
    assert_same(by_label, theirs, *views)
    wrapped = pytorch_metric_learning.SelfSupervisedLoss(ours, symmetric=symmetric)
    assert_same(wrapped, theirs, *views)


def test_pytorch_metric_learning_errors():
    loss, (z, _) = pytorch_metric_learning.NTXentLoss(), make_views(6, 4)
    assert loss.temperature == 0.07
    others = "labels: expected each twice, in the same place of either view"
    same = torch.tensor([0, 0, 1, 0, 0, 1])  # a label that four rows share
    for labels in (None, torch.arange(6), torch.tensor([0, 1, 2, 1, 0, 2]), same, torch.arange(5)):
        with pytest.raises(NotImplementedError, match=others):
            loss(z, labels)
    with pytest.raises(NotImplementedError, match=others):
        loss(z, torch.arange(6), ref_emb=z, ref_labels=torch.arange(6).flip(0))
    with pytest.raises(NotImplementedError, match=others):
        loss(z, torch.arange(6), ref_emb=z)
    with pytest.raises(NotImplementedError, match="indices_tuple: expected None"):
        loss(z, same, (torch.arange(2),) * 4)
    with pytest.raises(NotImplementedError, match="distance: expected None .* got Identity"):
        pytorch_metric_learning.NTXentLoss(reducer=None, distance=nn.Identity())
    with pytest.raises(TypeError, match="loss: expected NTXentLoss .* got Identity"):
        pytorch_metric_learning.SelfSupervisedLoss(nn.Identity())


# sentence_transformers


class Encoder(nn.Sequential):
    """Takes and returns what a SentenceTransformer does, its own dict, written into."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(nn.Embedding(50, 12, dtype=torch.float64), nn.Dropout(dropout))
        self.table, self.dropout, self.rows = self[0], self[1], []
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            self.table.weight.copy_(torch.randn(50, 12, generator=generator))

    def forward(self, features: dict) -> dict:
        assert "sentence_embedding" not in features
        self.rows.append(len(features["input_ids"]))
        words = self.dropout(self.table(features["input_ids"]))
        features["sentence_embedding"] = (words * features["attention_mask"][..., None]).sum(1)
        return features


def columns(count: int, rows: int = 11) -> list[dict]:
    """Features of sentences; every call makes them anew."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(50, (rows, 5), generator=generator),
            "attention_mask": torch.rand(rows, 5, generator=generator) < 0.8,
            "modality": "text",
        }
        for _ in range(count)
    ]


def gradient(criterion: nn.Module, count: int) -> list[torch.Tensor]:
    """Value and gradient of the encoder's table."""
    value = criterion(columns(count), None)
    return [value.detach(), *torch.autograd.grad(value, criterion.model.table.weight)]


def plain_ranking(encoder, count: int, scale: float, two: bool) -> list[torch.Tensor]:
    queries, *documents = (encoder(part)["sentence_embedding"] for part in columns(count))
    value = nll(queries, torch.cat(documents), 1 / scale).mean()
    if two:
        value = (value + nll(documents[0], queries, 1 / scale).mean()) / 2
    return [value.detach(), *torch.autograd.grad(value, encoder.table.weight)]


TWO = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
KINDS = {
    "MultipleNegativesRankingLoss": {},
    "CachedMultipleNegativesRankingLoss": {"mini_batch_size": 4},
}


@peers
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("directions", [{}, TWO], ids=["one direction", "two"])
@pytest.mark.parametrize("negatives", [0, 1, 2])
def test_sentence_transformers(name, directions, negatives, peer):
    more, count = KINDS[name] | directions, 2 + negatives
    ours = gradient(getattr(sentences, name)(Encoder(), scale=7.0, **more), count)
    theirs = plain_ranking(Encoder(), count, 7.0, bool(directions))
    if peer == "original":
        library = original("sentence_transformers.sentence_transformer.losses")
        criterion = getattr(library, name)(Encoder(), scale=7.0, **more)
        theirs = [criterion(columns(count), None)]
        theirs[0].backward()  # whose hook fills in gradients
        theirs.append(criterion.model.table.weight.grad)
    assert all(relative_error(a, b) < 1e-11 for a, b in zip(ours, theirs, strict=True))


def test_sentence_transformers_takes_the_original_similarity():
    library = original("sentence_transformers.util")
    loss = sentences.MultipleNegativesRankingLoss(Encoder(), 20.0, library.cos_sim)
    assert loss.get_config_dict()["similarity_fct"] == "cos_sim"
    with pytest.raises(NotImplementedError, match="similarity_fct: .* cos_sim, got dot_score"):
        sentences.MultipleNegativesRankingLoss(Encoder(), similarity_fct=library.dot_score)


def test_cached_runs_chunks_twice_with_the_same_dropout():
    criterion = sentences.CachedMultipleNegativesRankingLoss(Encoder(0.5), 5.0, mini_batch_size=4)
    torch.manual_seed(3)
    ours = gradient(criterion, 2)
    # Backward runs the last chunk first.
    assert criterion.model.rows == [4, 4, 3] * 2 + [3, 4, 4] * 2
    encoder, embedded = Encoder(0.5), []
    torch.manual_seed(3)
    for part in columns(2):
        chunks = [
            {name: part[name][start : start + 4] for name in ("input_ids", "attention_mask")}
            for start in (0, 4, 8)
        ]
        embedded.append(torch.cat([encoder(chunk)["sentence_embedding"] for chunk in chunks]))
    value = info_nce(*embedded, 0.2)
    plain = [value, *torch.autograd.grad(value, encoder.table.weight)]
    assert all(relative_error(a, b) < 1e-11 for a, b in zip(ours, plain, strict=True))
    with torch.no_grad():  # evaluation runs it once
        criterion.model.rows.clear()
        criterion(columns(2))
        assert criterion.model.rows == [4, 4, 3] * 2


def test_sentence_transformers_errors():
    for kind in (getattr(sentences, name) for name in KINDS):
        with pytest.raises(ValueError, match="scale: expected a positive number, got 0"):
            kind(Encoder(), scale=0)
        for name, value in (
            ("similarity_fct", F.cosine_similarity),
            ("directions", ("query_to_doc", "query_to_query")),
            ("directions", TWO["directions"]),  # with one softmax over both
            ("hardness_mode", "hard_negatives"),
        ):
            with pytest.raises(NotImplementedError, match=f"{name}: expected"):
                kind(Encoder(), **{name: value})
        with pytest.raises(ValueError, match="expected anchors and positives, got 1 columns"):
            kind(Encoder())(columns(1))
        assert kind(Encoder()).temperature == 0.05
    cached = sentences.CachedMultipleNegativesRankingLoss
    with pytest.raises(ValueError, match="mini_batch_size: expected a positive int, got 0"):
        cached(Encoder(), mini_batch_size=0)
    with pytest.raises(NotImplementedError, match="mini_batch_num_tokens: expected None, got 512"):
        cached(Encoder(), mini_batch_num_tokens=512)
    ragged = [part | {"pixel_values": torch.zeros(3, 2)} for part in columns(2)]
    with pytest.raises(NotImplementedError, match=r"expected 11 rows .* got 'pixel_values' of sh"):
        cached(Encoder())(ragged)


# Two processes, six rows each

WORLD = 2
ORIGINALS = {
    "lightly": "lightly.loss",
    "open_clip": "open_clip.loss",
    "sentences": "sentence_transformers.sentence_transformer.losses",
}
CLIP = {
    f"open_clip {'local' if local else 'global'}{', with grad' if grad else ''}": (local, grad)
    for local in (True, False)
    for grad in (True, False)
}
RANKING = {"sentences one direction": {}, "sentences two": TWO}
GATHERING = ["lightly nt_xent", "lightly directclr", *CLIP, *RANKING]


def leaves() -> list[torch.Tensor]:
    """Features of three columns, all rows, and the logarithm of a scale."""
    third, _ = make_views(6 * WORLD, 8, dtype=torch.float64, seed=1)
    scale = torch.tensor(1.5, dtype=torch.float64)
    return [*make_views(6 * WORLD, 8, dtype=torch.float64), third, scale]


def call(name: str, library):
    """The loss of one process's rows, from a module that has the original's names."""
    if name in CLIP:
        loss = clip(library.ClipLoss(*CLIP[name], rank=dist.get_rank(), world_size=WORLD))
        return lambda a, b, _, log_scale: loss(a, b, log_scale)
    if name in RANKING:
        ranking = library.MultipleNegativesRankingLoss
        loss = ranking(Encoder(), 7.0, gather_across_devices=True, **RANKING[name])
        return lambda a, b, c, _: loss.compute_loss_from_embeddings([a, b, c], None)
    if name == "lightly directclr":
        loss = library.DirectCLRLoss(5, 0.2, gather_distributed=True)
    else:
        loss = library.NTXentLoss(0.2, gather_distributed=True)
    return lambda a, b, *_: loss(a, b)


def shares(name: str, a, b, c, log_scale) -> list[torch.Tensor]:
    """What each process returns, by the plain formula from all rows."""
    if name in CLIP:
        local, grad = CLIP[name]
        t, constant = 1 / log_scale.exp(), torch.Tensor.detach
        if grad or not local:
            constant = torch.Tensor.clone
        rows = (nll(a, constant(b), t) + nll(b, constant(a), t)) / 2
        if not local:
            return [rows.mean()] * WORLD
    elif name in RANKING:
        rows = nll(a, torch.cat([b, c]), 1 / 7)
        if RANKING[name]:
            rows = (rows + nll(b, a, 1 / 7)) / 2
    else:
        rows = nt_xent(a[:, :5], b[:, :5], 0.2) if "directclr" in name else nt_xent(a, b, 0.2)
    return [block.mean() for block in rows.chunk(WORLD)]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What every process wrote."""
    folder = tmp_path_factory.mktemp("adapters")
    commands = [[sys.executable, __file__, rank, folder] for rank in range(WORLD)]
    for done in waiting.together(commands, folder, env=os.environ | {"OMP_NUM_THREADS": "1"}):
        assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.xdist_group("two processes of adapters")
@pytest.mark.parametrize("who", ["ours", "original"])
@pytest.mark.parametrize("name", GATHERING)
def test_gathering_from_other_processes(processes, name, who):
    given = leaves()
    for leaf in given:
        leaf.requires_grad_()
    values = shares(name, *given)
    # DistributedDataParallel averages gradients over processes; the loss gives its sum.
    *features, scale = torch.autograd.grad(sum(values), given, materialize_grads=True)
    if name == "open_clip global":
        features = [gradient / WORLD for gradient in features]
    results = [process[who].get(name) for process in processes]
    if None in results:
        pytest.skip(f"{ORIGINALS[name.split()[0]]} cannot be imported")
    for rank, (value, *gradients, _) in enumerate(results):
        assert relative_error(value, values[rank]) < 1e-11
        for mine, whole in zip(gradients, features, strict=True):
            assert relative_error(mine, whole.chunk(WORLD)[rank]) < 1e-11
    average = sum(result[-1] for result in results) / WORLD
    assert relative_error(average, scale / WORLD) < 1e-11


def main(rank: int, folder: Path) -> None:
    """One of the processes."""
    dist.init_process_group("gloo", f"file://{folder}/init", world_size=WORLD, rank=rank)
    *columns, scale = leaves()
    given = [*(column.chunk(WORLD)[rank] for column in columns), scale]
    own = {"lightly": lightly, "open_clip": open_clip, "sentences": sentences}
    results = {"ours": {}, "original": {}}
    for name in GATHERING:
        print(name, flush=True)  # who waits for this process sees that it gets on
        results["ours"][name] = evaluated(call(name, own[name.split()[0]]), *given)
        try:
            library = importlib.import_module(ORIGINALS[name.split()[0]])
        except ImportError:
            continue
        results["original"][name] = evaluated(call(name, library), *given)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
