"""Runs ended from outside: signals, kill -9, full and read-only disks; the short form of
tests/gates/faults.py, whose long one is in bench/results."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import waiting
from test_train_run import (
    STEPS,
    TINY,
    assert_same,
    spoiled,
    state_of,
    train,
    untimed,
)

from directclr_fast import cli
from directclr_fast.train import checkpoint, supervise
from directclr_fast.train.supervise import TrainingStopped

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="POSIX signals"),
    pytest.mark.usefixtures("one_thread"),
]


def flags(run_dir, name, **settings):
    command = ["train", "--checkpoint-dir", str(run_dir), "--name", name]
    for key, value in {**TINY, **settings}.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    return command


# ---------------------------------------------------------------- signals


@pytest.fixture
def hangup():
    """SIGHUP as a terminal's processes have it; under nohup the suite would have it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_at_the_end_of_the_step(number, run_dir, hangup):
    train(run_dir, "whole")
    trainer = spoiled(run_dir, "loss", {}, name="run")
    step = trainer.guard.step

    def signalled(loss):
        if trainer.step == 6:
            os.kill(os.getpid(), number)
        step(loss)

    trainer.guard.step = signalled
    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(s) for s in caught]
    text = rf"^stopped by {signal.Signals(number).name} after step 7; saved, continue with --resume"
    with pytest.raises(TrainingStopped, match=text):
        trainer.run()
    assert [signal.getsignal(s) for s in caught] == handlers
    assert checkpoint.load(run_dir / "run")["step"] == 7 and trainer.log.file.closed
    train(run_dir, "run", resume=True)
    whole, stopped = state_of(run_dir / "whole"), state_of(run_dir / "run")
    assert_same(stopped, whole)
    assert untimed(run_dir / "run") == untimed(run_dir / "whole")


def test_a_hangup_that_is_ignored_stays_so():
    """As under nohup: the training goes on when its terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with supervise.Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.caught is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_exit_code_of_a_stopped_run(run_dir, capsys):
    path = run_dir / "run" / "log.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        real = checkpoint.save
        patch.setattr(checkpoint, "save", lambda *a: (real(*a), os.kill(os.getpid(), 15)))
        assert cli.main(flags(run_dir, "run", save_every=4)) == 75 == supervise.STOPPED
    errors = capsys.readouterr().err
    assert errors.startswith(
        "directclr-fast: stopped by SIGTERM after step 5; saved, continue with"
    )
    assert errors.count("\n") == 1
    assert cli.main([*flags(run_dir, "run"), "--resume"]) == 0
    assert json.loads(path.read_text().splitlines()[-1])["step"] == STEPS


def test_a_second_interrupt_does_not_wait(run_dir):
    trainer = spoiled(run_dir, "loss", {}, save_every=2)
    step = trainer.guard.step

    def impatient(loss):
        step(loss)
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    trainer.guard.step = impatient
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert checkpoint.load(run_dir / "run")["step"] == 4


def test_a_signal_while_steps_are_skipped_keeps_the_last_good_checkpoint(run_dir):
    trainer = spoiled(run_dir, "loss", {5, 6, 7}, save_every=2)
    step = trainer.guard.step
    trainer.guard.step = lambda loss: (step(loss), trainer.step == 5 and os.kill(os.getpid(), 15))
    with pytest.raises(TrainingStopped, match="after step 6; the last good checkpoint is"):
        trainer.run()
    assert checkpoint.load(run_dir / "run")["step"] == 4


# ---------------------------------------------------------------- disks


@pytest.mark.parametrize(
    ("call", "error"),
    [("fsync", errno.ENOSPC), ("replace", errno.EROFS), ("fsync", errno.EIO)],
)
def test_a_save_that_fails_ends_the_run_and_keeps_the_checkpoint(
    call, error, run_dir, monkeypatch, capsys
):
    train(run_dir, "whole", save_every=3)
    save, real = checkpoint.save, getattr(os, call)

    def failing(path, state):
        if state["step"] == 6:

            def fail(*_, **__):
                raise OSError(error, os.strerror(error))

            monkeypatch.setattr(os, call, fail)
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", failing)
    assert cli.main(flags(run_dir, "run", save_every=3)) == supervise.FAILED
    text = capsys.readouterr().err
    assert text.startswith("directclr-fast: error: checkpoint: could not write")
    assert os.strerror(error) in text and text.count("\n") == 1
    monkeypatch.setattr(os, call, real)
    monkeypatch.setattr(checkpoint, "save", save)
    assert checkpoint.load(run_dir / "run")["step"] == 3
    train(run_dir, "run", save_every=3, resume=True)
    assert_same(state_of(run_dir / "run"), state_of(run_dir / "whole"))


def test_a_read_only_folder(run_dir):
    """Made so while the run is on: the error is raised, the checkpoint stays."""
    if os.geteuid() == 0:
        pytest.skip("root writes to read-only folders")
    trainer = spoiled(run_dir, "loss", {}, save_every=3)
    step = trainer.guard.step
    trainer.guard.step = lambda loss: (
        step(loss), trainer.step == 4 and (run_dir / "run").chmod(0o555)
    )  # fmt: skip
    with pytest.raises(OSError, match="^checkpoint: could not write"):
        trainer.run()
    (run_dir / "run").chmod(0o755)
    assert checkpoint.load(run_dir / "run")["step"] == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_detected_and_the_previous_one_used(damage, run_dir):
    train(run_dir, "whole", save_every=3, max_steps=9)
    train(run_dir, "run", save_every=3, max_steps=6)
    path = run_dir / "run" / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        weight = checkpoint.load(path)["model"]["encoder.stem.0.weight"]
        content[content.index(weight.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content[:-1000] if damage == "truncated" else content)
    with pytest.warns(UserWarning, match="checkpoint.pt is unreadable .* using the previous one"):
        train(run_dir, "run", save_every=3, max_steps=9, resume=True)
    assert_same(state_of(run_dir / "run"), state_of(run_dir / "whole"))


# ---------------------------------------------------------------- restarts

TOY = """
import os, signal, sys, time

def run(arguments, on_step):
    with open(arguments.log, "a") as log:
        log.write(f"{arguments.resume} {arguments.overwrite} {os.getpid()}\\n")
    turn = len(open(arguments.log).readlines())
    what = arguments.plan[turn - 1]
    if what.startswith("after a step "):
        on_step({})
        what = what.removeprefix("after a step ")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "waits":
        time.sleep(60)
    return int(what)
"""


@pytest.fixture
def restarting(tmp_path, monkeypatch):
    """restarting(plan, restarts, **start): (exit code, how each start was asked for)."""
    (tmp_path / "toy_run.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    import toy_run

    def call(plan, restarts, resume=False, overwrite=False):
        log = tmp_path / "starts"
        log.unlink(missing_ok=True)
        start = {"plan": plan, "log": str(log), "resume": resume, "overwrite": overwrite}
        code = supervise.restarting(toy_run.run, argparse.Namespace(**start), restarts)
        return code, [line.rsplit(" ", 1)[0] for line in log.read_text().splitlines()]

    yield call
    del sys.modules["toy_run"]


def test_what_is_restarted_and_how(restarting, capfd):
    new, old, again = "False False", "True False", "False True"
    assert restarting(["after a step killed", "killed", "0"], 5) == (0, [new, old, old])
    assert "ended by SIGKILL, restart 2 of 5" in capfd.readouterr().err
    # --overwrite until there is something of the new run to resume.
    plan = ["killed", "after a step 1", "0"]
    assert restarting(plan, 5, overwrite=True) == (0, [again, again, old])
    assert restarting(["1", "killed", "1"], 2, resume=True) == (1, [old] * 3)
    assert restarting(["killed", "killed"], 1) == (137, [new] * 2)
    for code in (2, 75, 130):
        assert restarting([str(code)], 3) == (code, [new])


def test_restarts_refused(capsys, monkeypatch):
    assert cli.main(["train", "--max-restarts", "-1"]) == 2
    assert capsys.readouterr().err.endswith("max_restarts: expected at least 0, got -1\n")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert cli.main(["train", "--max-restarts", "3"]) == 2
    assert "expected it given to torchrun, and --resume here, got 3" in capsys.readouterr().err


def test_a_killed_run_starts_again_by_itself(run_dir):
    """The command itself: killed once, it goes on; told to stop, it saves; without its supervisor
    it stops too."""
    # So many that it is not at its end before this process, held up, has sent its signal.
    epochs = 100_000
    train(run_dir, "whole", epochs=epochs, max_steps=40)
    settings = {"epochs": epochs, "save_every": 1}
    command = [sys.executable, "-m", "directclr_fast", *flags(run_dir, "run", **settings)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    quiet["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = run_dir / "run" / "log.jsonl"

    def step():
        return log.read_bytes().count(b"\n") - 1 if log.exists() else 0

    def trainers(parent):
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return [
            int(n) for n in children if b"spawn_main" in Path(f"/proc/{n}/cmdline").read_bytes()
        ]

    with subprocess.Popen([*command, "--max-restarts", "1"], **quiet) as parent:
        try:
            waiting.until(lambda: step() > 5, step)
            before = step()
            (first,) = trainers(parent.pid)
            os.kill(first, signal.SIGKILL)
            waiting.until(lambda: step() > before + 5, step)
            parent.terminate()
            waiting.until(lambda: parent.poll() is not None, step)
            errors = parent.communicate()[1]
        finally:
            parent.kill()
    assert parent.returncode == supervise.STOPPED, errors
    assert "note: training ended by SIGKILL, restart 1 of 1" in errors
    assert "directclr-fast: stopped by SIGTERM after step" in errors
    after = checkpoint.load(run_dir / "run")["step"]
    assert after == step()
    with subprocess.Popen([*command, "--max-restarts", "1", "--resume"], **quiet) as parent:
        waiting.until(lambda: step() > after + 2, step)
        (orphan,) = trainers(parent.pid)
        parent.kill()
        waiting.until(lambda: not Path(f"/proc/{orphan}").exists() or "Z" in state(orphan))
    assert checkpoint.load(run_dir / "run")["step"] == step()
    train(run_dir, "run", epochs=epochs, max_steps=max(40, step()), resume=True)
    train(run_dir, "whole", epochs=epochs, max_steps=max(40, step()), resume=True)
    assert_same(state_of(run_dir / "run")["model"], state_of(run_dir / "whole")["model"])
    assert untimed(run_dir / "run") == untimed(run_dir / "whole")


def state(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


# ---------------------------------------------------------------- the campaigns, in short


def test_short_campaigns(tmp_path):
    out = tmp_path / "faults.json"
    command = [sys.executable, ROOT / "tests/gates/faults.py", "--kills", "4", "--rank-kills", "1"]
    command += ["--epochs", "5", "--timeout", waiting.STILL, "--out", out]
    # Their runs write below tmp_path too, which is how it is seen that they get on.
    done = waiting.process(command, tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    campaigns = json.loads(out.read_text())
    killed = campaigns["kill_9"]
    assert killed["kills"] == 4 and killed["unloadable"] == killed["failed"] == 0, done.stderr
    assert killed["runs"] == killed["runs_bitwise_equal"] >= 1
    ranks = campaigns["rank_killed"]
    assert ranks["resumed"] == 1 and ranks["hangs"] == 0 and ranks["bitwise_equal"]
