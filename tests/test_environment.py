"""What surrounds a run: a launcher's variables, a display that goes away, loggers that are there.

T6, T7, T9, T10, P5: public reports against other trainers, each played again here.
"""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import types

import pytest
from test_train_run import TINY, log_of, train

from directclr_fast import cli
from directclr_fast.train import checkpoint, job
from directclr_fast.train.log import PACKAGES, Logger

pytestmark = pytest.mark.usefixtures("one_thread")
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


def flags(run_dir, **settings):
    settings = {**TINY, "checkpoint_dir": run_dir, "name": "run", **settings}
    words = [w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    return ["train", *words]


# ---------------------------------------------------------------- a launcher's variables


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "1"}, {"RANK": ""}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": " ", "RANK": "7"},
     {"WORLD_SIZE": "1", "RANK": "3"}, {"RANK": "x"}, {"LOCAL_RANK": "", "LOCAL_WORLD_SIZE": ""}],
)  # fmt: skip
def test_leftovers_of_a_job_are_no_job(variables, run_dir, monkeypatch, capsys):  # T6, T7
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "--mode", "byol"]) == 2
    assert capsys.readouterr().err.startswith("directclr-fast: error: mode: expected one of")
    assert job.place() == (0, 1)
    assert cli.main(flags(run_dir, max_steps=1)) == 0
    assert "done: step 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "2"}, "RANK: expected it beside WORLD_SIZE=2, got none; start the proces"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK: expected it beside WORLD_SIZE=2, got none"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: expected it beside WORLD_SIZE=2, got no"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a number from 1 on, got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a number from 1 on, got '0'"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MEETING}, "RANK: expected a number from 0 to 1, got "),
        ({"WORLD_SIZE": "2", "RANK": "-1", **MEETING}, "RANK: expected a number from 0 to 1, got "),
    ],
)  # fmt: skip
def test_variables_that_do_not_fit_are_a_sentence(  # T7
    variables, text, run_dir, monkeypatch, capsys
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(flags(run_dir)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"directclr-fast: error: {text}") and errors.count("\n") == 1
    assert cli.main(["doctor"]) == 0  # says what is here, whatever the variables are
    assert capsys.readouterr().out


def test_a_rank_of_a_job_leaves_speaking_to_the_first(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", **MEETING}.items():
        monkeypatch.setenv(name, value)
    assert job.place() == (3, 4) and not job.speaks()
    monkeypatch.setenv("RANK", "0")
    assert job.speaks()


# ---------------------------------------------------------------- a display that goes away


class Gone(io.StringIO):
    """A stream whose reader has left after some lines."""

    def __init__(self, lines, number=errno.EPIPE):
        super().__init__()
        self.lines, self.number = lines, number

    def write(self, text):
        if self.getvalue().count("\n") >= self.lines:
            raise OSError(self.number, "gone")
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_training_outlives_its_display(lines, number, run_dir, monkeypatch):  # T10
    stream = Gone(lines, number)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main(flags(run_dir)) == 0
    assert sys.stdout is stream and stream.getvalue().count("\n") == lines
    monkeypatch.undo()
    assert checkpoint.load(run_dir / "run")["step"] == 15 == log_of(run_dir / "run")[1][-1]["step"]


def test_a_display_that_was_closed_before(run_dir, monkeypatch):
    """As by >&- in a shell: Python then has None."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(flags(run_dir, max_steps=1)) == 0 and sys.stdout is None
    assert cli.main(["train", "--mode", "byol"]) == 2


def test_a_full_disk_behind_the_output_is_no_lost_display(monkeypatch, capsys):
    """A report that was not written whole is an error."""
    monkeypatch.setattr(sys, "stdout", Gone(0, errno.ENOSPC))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "directclr-fast: error: [Errno 28] gone\n"


@pytest.mark.parametrize("command", ["doctor", "train --help", "train"])
def test_a_closed_pipe(command, run_dir):  # T10
    """The real thing: head has what it wants and leaves, before anything was written or after."""
    words = command.split() if command != "train" else flags(run_dir, max_steps=3)
    # Buffered, as it is by default: what is left is tried again when the interpreter ends.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment["OMP_NUM_THREADS"] = "1"
    with subprocess.Popen(
        [sys.executable, "-m", "directclr_fast", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        if command == "train":
            assert process.stdout.readline().startswith("directclr, dim")
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0
    if command == "train":
        assert checkpoint.load(run_dir / "run")["step"] == 3


# ---------------------------------------------------------------- loggers


@pytest.fixture
def tensorboard(monkeypatch):
    """Stands in for TensorBoard's writer: what was made and sent."""
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder, self.purge_step, self.sent, self.closed = folder, purge_step, [], False
            made.append(self)

        def add_scalar(self, name, value, step):
            self.sent.append((name, value, step))

        def close(self):
            self.closed = True

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


@pytest.fixture
def wandb(monkeypatch):
    made = []

    class Run:
        def __init__(self, settings):
            self.settings, self.sent, self.finished = settings, [], False
            self.id = settings["id"] or f"new{len(made)}"

        def log(self, values, step):
            self.sent.append((values, step))

        def finish(self):
            self.finished = True

    def init(**settings):
        made.append(Run(settings))
        return made[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return made


def test_tensorboard(tensorboard, run_dir):  # T9
    train(run_dir, "run", logger="tensorboard", max_steps=4)
    train(run_dir, "run", resume=True)  # the logger is the checkpoint's too
    first, second = tensorboard
    assert (first.purge_step, second.purge_step) == (1, 5) and first.closed and second.closed
    assert first.folder == str(run_dir / "run")
    records = log_of(run_dir / "run")[1]
    names = ["epoch", "loss", "accuracy", "learning_rate", "skipped", "images_per_second"]
    want = [(n, r[n], r["step"]) for r in records for n in names if r[n] is not None]
    assert first.sent + second.sent == want and len(records) == 15


def test_wandb_knows_a_run_again(wandb, run_dir):  # T9
    train(run_dir, "run", logger="wandb", max_steps=4)
    train(run_dir, "run", resume=True)
    train(run_dir, "run", overwrite=True, logger="wandb", max_steps=1)
    first, second, third = wandb
    assert (first.settings["id"], second.settings["id"], third.settings["id"]) == (
        None, "new0", None,
    )  # fmt: skip
    assert first.settings["config"]["mode"] == "directclr" and first.settings["name"] == "run"
    assert [s for _, s in first.sent + second.sent] == list(range(1, 16)) and first.finished
    assert set(first.sent[0][0]) == {"epoch", "loss", "accuracy", "learning_rate", "skipped"}


def test_the_log_is_the_same_with_and_without(tensorboard, run_dir):
    train(run_dir, "with", logger="tensorboard", max_steps=3)
    train(run_dir, "without", max_steps=3)

    def lines(name):
        return [
            {k: v for k, v in json.loads(line).items() if k != "images_per_second"}
            for line in (run_dir / name / "log.jsonl").read_text().splitlines()[1:]
        ]

    assert lines("with") == lines("without")


def test_a_logger_that_fails_ends_no_run(tensorboard, run_dir):
    class Down(Exception):
        pass

    def fail(self, name, value, step):
        if step == 3:
            raise Down("no route")
        self.sent.append(step)

    sys.modules["torch.utils.tensorboard"].SummaryWriter.add_scalar = fail
    with pytest.warns(UserWarning) as notes:
        train(run_dir, "run", logger="tensorboard")
    text = "logger: tensorboard takes no more lines (Down: no route); log.jsonl goes on"
    assert [str(note.message) for note in notes] == [text]
    assert set(tensorboard[0].sent) == {1, 2} and len(log_of(run_dir / "run")[1]) == 15


def test_a_logger_that_does_not_start_is_a_sentence(wandb, run_dir, capsys):
    def init(**_):
        raise KeyError("no key")

    sys.modules["wandb"].init = init
    assert cli.main(flags(run_dir, logger="wandb")) == 1
    text = "directclr-fast: error: logger: expected to start wandb, got 'no key'\n"
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_logger_has_a_hint(name, run_dir, monkeypatch, capsys):  # P5
    monkeypatch.setitem(sys.modules, PACKAGES[name][0], None)
    assert cli.main(flags(run_dir, logger=name)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"directclr-fast: error: logger: expected {name}, got ")
    assert errors.endswith(f"; install it with: pip install {name}\n")
    assert not list(run_dir.glob("run/*"))


def test_tensorboards_own_writer(run_dir):
    pytest.importorskip("tensorboard")
    one = Logger("tensorboard")
    one.open(run_dir, {}, 0)
    one.add({"step": 1, "loss": 0.5, "accuracy": None})
    one.close()
    assert list(run_dir.glob("events.out.tfevents*"))
