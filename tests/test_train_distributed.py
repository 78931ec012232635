"""Training by several processes under Gloo is training by one: weights, views, faults, resumes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import waiting
from test_train_run import TINY, assert_same, log_of, state_of, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not torch.distributed.is_gloo_available() or not hasattr(os, "fork"),
        reason="needs Gloo, fork",
    ),
]
LAUNCH = Path(__file__).with_name("launch.py")
FEW = {**TINY, "optimizer": "sgd", "learning_rate": 0.01, "epochs": 2, "max_steps": 4}


def launch(world, run_dir, *scripts):
    """Runs ``main(rank)`` of each script in ``world`` processes, the scripts side by side."""
    command = [sys.executable, LAUNCH, world, run_dir, json.dumps(FEW)]
    commands = [[*command, script] for script in scripts]
    ended = waiting.together(commands, run_dir, env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = "".join(done.stdout + done.stderr for done in ended)
    assert not any(done.returncode for done in ended), said
    return said


def apart(a, b, only=""):
    """Difference of two runs' weights and statistics, relative to their size. Taken together: the
    residual branches start at zero, where ReLU has its kink and rounding may decide."""

    def values(folder):
        named = state_of(folder)["model"].items()
        return torch.cat([v.double().flatten() for k, v in named if only in k and "num" not in k])

    a, b = values(a), values(b)
    return ((a - b).norm() / b.norm()).item()


RUNS = {
    "directclr": {},
    "uneven": {"batch_size": 17},
    "simclr": {"mode": "simclr"},
    "group-lars": {"mode": "group", "optimizer": "lars", "learning_rate": 1.0},
    "both": {"negatives": "both"},
    "chunk": {"chunk_size": 4, "cache_bn": "chunk", "mode": "simclr"},
    "two-pass": {"chunk_size": 3, "cache_bn": "two-pass", "mode": "single"},
    "two-pass-start": {"chunk_size": 3, "cache_bn": "two-pass", "max_steps": 1},
    "frozen": {"chunk_size": 5, "cache_bn": "frozen-stats", "batch_size": 17},
}


of_pairs = pytest.mark.xdist_group("pairs")  # tests of one fixture, which takes long


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Folder of RUNS trained by two processes, and of what was seen on the way."""
    folder = tmp_path_factory.mktemp("pairs")
    script = f"""
def main(rank):
    for name, settings in {RUNS!r}.items():
        run = trainer(name, **settings)
        seen = []
        run.model.encoder.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))
        run.run()
        torch.save(seen, f"{folder}/{{name}}-{{rank}}.pt")
        weights = torch.cat([v.double().flatten() for v in run.model.state_dict().values()])
        others = [torch.empty_like(weights) for _ in range(2)]
        dist.all_gather(others, weights)
        assert torch.equal(*others), name
"""
    launch(2, folder, script)
    return folder


@of_pairs
@pytest.mark.parametrize("name", [n for n in RUNS if n != "two-pass-start"])
def test_two_ranks_are_one_process(name, pairs, run_dir):
    train(run_dir, name, **{**FEW, **RUNS[name]})
    # Running statistics move once for each of a rank's chunks, and these are half as many.
    only = "weight" if name == "chunk" else ""
    train(run_dir, "start", **{**FEW, **RUNS[name], "max_steps": 1})
    moved = apart(run_dir / name, run_dir / "start", only)
    assert moved > 1e-3
    # A hundredth of the way that all went: rounding is far below it on every machine.
    # The chunks lie elsewhere: deeper statistics are pooled over others, as "two-pass" says itself.
    bound = 0.02 if name == "two-pass" else 0.01 * moved
    assert apart(pairs / name, run_dir / name, only) < bound
    ours, theirs = ([r for r in log_of(d / name)[1]] for d in (pairs, run_dir))
    if name != "two-pass":
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
        one = 1.5 / (RUNS[name].get("batch_size") or FEW["batch_size"])  # a tie may fall either way
        for a, b in zip(ours, theirs, strict=True):
            assert a["accuracy"] == pytest.approx(b["accuracy"], abs=one)


@of_pairs
def test_two_pass_statistics_are_of_all_ranks(pairs, run_dir):
    """The first BatchNorm's do not depend on the chunks, so they show it exactly."""
    name = "two-pass-start"
    train(run_dir, name, **{**FEW, **RUNS[name]})
    assert apart(pairs / name, run_dir / name, "stem.1.running") < 1e-6


@of_pairs
def test_views_are_the_same(pairs, run_dir):
    """Up to rounding: a library may take another kernel for a product of fewer rows."""
    from directclr_fast.train.config import TrainConfig
    from directclr_fast.train.loop import Trainer

    config = {**FEW, **RUNS["uneven"], "checkpoint_dir": str(run_dir)}
    trainer, seen = Trainer(TrainConfig(**config), progress=False), []
    trainer.model.encoder.register_forward_pre_hook(lambda m, x: seen.append(x[0].clone()))
    trainer.run()
    parts = [torch.load(pairs / f"uneven-{rank}.pt") for rank in (0, 1)]
    assert [len(x) for x in parts[0]] == [8] * 8 and [len(x) for x in parts[1]] == [9] * 8
    for whole, *two in zip(seen, *parts):
        torch.testing.assert_close(torch.cat(two), whole, rtol=0, atol=1e-4)


def test_three_ranks_resume_to_the_bit_and_as_another_number(run_dir):
    """To the bit: Gloo adds three numbers in an order of their place in a bucket, and DDP changes
    buckets. Three processes, then one, then two: the same batches, the same weights."""
    from directclr_fast.train import checkpoint

    script = """
def main(rank):
    train("whole")
    train("halves", max_steps=2, save_every=1)
    train("halves", resume=True)
    train("run", max_steps=2, save_every=1)
"""
    launch(3, run_dir, script)
    assert_same(state_of(run_dir / "halves"), state_of(run_dir / "whole"))
    assert len(checkpoint.load(run_dir / "run")["rng_of_other_ranks"]) == 2
    train(run_dir, "run", **{**FEW, "max_steps": 3}, resume=True)
    launch(2, run_dir, "def main(rank): train('run', resume=True)")
    train(run_dir, "one", **FEW)
    assert apart(run_dir / "run", run_dir / "one") < 1e-5
    assert [r["step"] for r in log_of(run_dir / "run")[1]] == [1, 2, 3, 4]


def test_faults(run_dir):
    """What happens to one rank happens to all: a gradient of nan, a signal, an error of rank 0."""
    script = """
def spoil(run, steps):
    if dist.get_rank() == 1:
        run.model.encoder.stem[0].weight.register_hook(
            lambda g: g * (float("nan") if run.step + 1 in steps else 1)
        )
    return run

def weights(run):
    return [v.clone() for v in run.model.state_dict().values()]

def main(rank):
    run = spoil(trainer("nan"), {3})
    step, kept = run.guard.step, []
    def spy(loss):
        before = [p.detach().clone() for p in run.model.parameters()]
        step(loss)
        kept.append(all(map(torch.equal, before, run.model.parameters())))
    run.guard.step = spy
    run.run()
    assert kept == [False, False, True, False], kept
    assert run.guard.counts.tolist() == [1, 0]

    try:
        spoil(trainer("diverged", max_skipped=2, save_every=1), {3, 4}).run()
        raise AssertionError
    except TrainingDiverged as error:
        assert "in 2 steps in a row by step 4; the last good" in str(error)

    train("whole", max_steps=4)
    run = trainer("stopped", max_steps=4)
    step = run.guard.step
    def signalled(loss):
        step(loss)
        if rank == 1 and run.step == 1:
            os.kill(os.getpid(), 15)
    run.guard.step = signalled
    try:
        run.run()
        raise AssertionError
    except TrainingStopped as stopped:
        by = "SIGTERM" if rank else "a signal to another rank"
        assert str(stopped).startswith(f"stopped by {by} after step 2; saved"), stopped
    train("stopped", resume=True)

    for error, call in (
        (ValueError, lambda: trainer("nan")),
        (OSError, lambda: trainer("full").run()),
    ):
        save = checkpoint.save
        def full(*_):
            raise OSError(28, "No space left on device")
        checkpoint.save = full
        try:
            call()
            raise AssertionError
        except error as caught:
            assert "expected a folder without" in str(caught) or "No space left" in str(caught)
        checkpoint.save = save
"""
    launch(2, run_dir, script)
    assert [r["skipped"] for r in log_of(run_dir / "nan")[1]] == [0, 0, 1, 1]
    assert state_of(run_dir / "diverged")["step"] == 2
    whole, stopped = state_of(run_dir / "whole"), state_of(run_dir / "stopped")
    assert_same(stopped, whole)


def test_the_command_under_torchrun(run_dir):
    """Trains, says everything once, refuses in one sentence; a batch of fewer than the ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m", "directclr_fast"]
    command += ["train"]
    for name, value in {**FEW, "checkpoint_dir": run_dir, "name": "run"}.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = waiting.process([*command, "--resume"], run_dir, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: step 4") == 1 and done.stdout.count("2 ranks") == 1
    assert done.stdout.count("step      4/4  loss") == 1
    assert done.stderr.count("note: resume: no checkpoint in") == 1
    train(run_dir, "one", **FEW)
    assert apart(run_dir / "run", run_dir / "one") < 1e-5
    assert log_of(run_dir / "run")[0]["ranks"] == 2


def test_a_restarted_job_does_not_meet_its_dead(monkeypatch):
    """torchrun's store outlives a restart, and with it the addresses of processes that are gone."""
    from directclr_fast.train import ranks

    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.port, "RANK": 0, "WORLD_SIZE": 2}
    names |= {"LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_USE_AGENT_STORE": True}

    def meeting(**more):
        for name, value in {**names, **more}.items():
            monkeypatch.setenv(name, str(value))
        return ranks._meeting(900)[0]

    meeting().set("address", "without torchrun")
    assert server.check(["address"])
    first = {"TORCHELASTIC_RESTART_COUNT": 0}
    assert not meeting(**first).check(["address"])
    meeting(**first).set("address", "of the first")
    assert meeting(**first).check(["address"])
    second = {"TORCHELASTIC_RESTART_COUNT": 1}
    assert not meeting(**second).check(["address"])
    with pytest.warns(UserWarning, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        several = meeting(**second, LOCAL_WORLD_SIZE=1, TORCHELASTIC_MAX_RESTARTS=3)
    assert several.get("address") == b"without torchrun"


def test_what_ranks_send_is_data(run_dir):
    """Containers and tensors arrive as they left, of any length; errors by kind and text; what
    would run code when it is read is refused where it arrives."""
    script = """
def main(rank):
    group = ranks.Ranks.joined(60.0)
    value = {"a": [1, "b" * (1 + 1000 * rank), None], "t": torch.arange(3 + rank)}
    gathered = group.gather(value)
    if rank == 0:
        assert [len(v["a"][1]) for v in gathered] == [1, 1001]
        assert [len(v["t"]) for v in gathered] == [3, 4]
    told = group.first(lambda: {"t": torch.ones(2, dtype=torch.bfloat16), "from": rank})
    assert told["from"] == 0 and told["t"].dtype == torch.bfloat16
    assert group.first(lambda: None) is None
    for error, kind in ((FileNotFoundError(2, "no"), OSError), (KeyError("k"), RuntimeError)):
        def fails():
            raise error
        try:
            group.first(fails)
            raise AssertionError
        except type(error) if rank == 0 else kind as caught:
            assert str(caught) == str(error), caught

    class Code:
        def __reduce__(self):
            return print, ("arrived",)
    try:
        group.first(Code)
        assert rank == 0
    except Exception as refused:
        assert rank == 1 and "weights_only" in str(refused), refused
"""
    assert "arrived" not in launch(2, run_dir, script)


def test_who_is_missing_is_said(run_dir):
    """One rank falls silent in a step: the other says so. One fails by itself: they say why."""
    watched = """
from datetime import timedelta

def spoil(name, call, said):
    run = trainer(name, save_every=1, timeout=3.0)
    wait = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    assert wait == timedelta(seconds=900), wait
    run.guard.step, step = lambda loss: step(loss) or run.step == 1 and call(), run.guard.step
    try:
        run.run()
        raise AssertionError
    except ranks.RanksLost as lost:
        assert said in str(lost), lost
        assert ("; the last good checkpoint is" in str(lost)) == (dist.get_rank() == 0), lost
"""
    silent = """
def main(rank):
    def call():
        wait = timedelta(seconds=1)  # not before: a busy machine may take its time until here
        dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(wait)
        if rank == 1:
            store = dist.PrefixStore("directclr_fast", dist.distributed_c10d._get_default_store())
            store.wait(["over"], timedelta(seconds=900))
            os._exit(0)
    import socket
    me = f"no answer from rank 1 on {socket.gethostname()} in step 2, with a "
    try:
        spoil("silent", call, me + "timeout of 3 s (Timed out waiting")
    finally:
        ranks.Ranks.joined().store.set("over", "")
    os._exit(0)
"""
    fails = """
def main(rank):
    def call():
        if rank == 1:
            raise ValueError("of its own")
    try:
        spoil("fails", call, " ended (of its own) in step 2, with a timeout of 3 s")
    except ValueError:
        assert rank == 1
    os._exit(0)
"""
    launch(2, run_dir, watched + silent, watched + fails)
