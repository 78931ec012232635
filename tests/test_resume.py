"""A run goes on by what it is: the same images wherever they lie, its settings without their being
given again, changes that are stated; test_train_run.py has that it then is the undisturbed run.

The numbers T1 to T5 are public reports against other trainers, each played again here.
"""

from __future__ import annotations

import json
import shutil

import pytest
from test_train_run import STEPS, TINY, assert_same, log_of, state_of, train, untimed

from directclr_fast import cli
from directclr_fast.train import checkpoint
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.loop import Trainer
from directclr_fast.train.optim import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread")


FEW = {**TINY, "views": "small", "batch_size": 6}  # 3 steps an epoch of the 18 training pictures


def flags(settings):
    return [w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", str(v))]


def test_moved_data_go_on_to_the_bit(pictures, tmp_path, run_dir, monkeypatch):  # T2
    monkeypatch.chdir(tmp_path)
    settings = {**FEW, "data": "folder:./im"}
    train(run_dir, "whole", **settings)
    train(run_dir, "moved", **settings, max_steps=4)
    shutil.copytree(pictures, tmp_path / "elsewhere/pictures")
    shutil.rmtree(pictures)
    with pytest.raises(FileNotFoundError, match=r"no folder im; where they .* --data or --data-ro"):
        Trainer(TrainConfig(checkpoint_dir=str(run_dir), name="moved"), resume=True)
    train(run_dir, "moved", **{**settings, "data": "elsewhere/pictures/"}, resume=True)
    assert_same(state_of(run_dir / "moved"), state_of(run_dir / "whole"))
    assert untimed(run_dir / "moved") == untimed(run_dir / "whole")
    config = json.loads((run_dir / "moved/config.json").read_text())
    assert config["data"] == "folder:elsewhere/pictures/"


def test_settings_that_are_not_given_are_the_checkpoints(run_dir, capsys):  # T3
    where = ["train", "--checkpoint-dir", str(run_dir), "--name", "run"]
    settings = {**TINY, "mode": "simclr", "temperature": 0.2, "negatives": "both", "log_every": 2}
    train(run_dir, "whole", **settings)
    assert cli.main([*where, *flags(settings), "--max-steps", "8"]) == 0
    assert cli.main([*where, "--resume"]) == 0
    assert not capsys.readouterr().err
    assert_same(state_of(run_dir / "run"), state_of(run_dir / "whole"))
    assert untimed(run_dir / "run") == untimed(run_dir / "whole")
    # Of each call alone: how far it goes, on what device, and where the run is.
    config = json.loads((run_dir / "run/config.json").read_text())
    assert (config["max_steps"], config["log_every"], config["temperature"]) == (None, 2, 0.2)
    # What is given is compared, though it be the field's own default.
    assert cli.main([*where, "--resume", "--mode", "directclr"]) == 2
    text = "error: mode: expected 'simclr', as the run in"
    assert capsys.readouterr().err.startswith(f"directclr-fast: {text} {run_dir / 'run'} began, go")
    assert cli.main([*where, "--resume", "--mode", "simclr"]) == 0


def test_settings_resolved_elsewhere_are_compared_whole(run_dir):
    """As of a script or a comparison, which give all of them."""
    train(run_dir, "run", max_steps=2)
    settings = {**TINY, "checkpoint_dir": str(run_dir), "name": "run", "seed": 1}
    with pytest.raises(ValueError, match="^seed: expected 0, as the run in .* began, got 1;"):
        Trainer(TrainConfig(**settings).resolve(), resume=True, progress=False)


def test_more_epochs_and_another_rate_are_stated(run_dir):  # T1
    train(run_dir, "run")
    with pytest.warns(UserWarning) as notes:
        train(run_dir, "run", resume=True, epochs=5, learning_rate=1e-3)
    assert [str(note.message) for note in notes] == [
        "learning_rate: 0.002 in the checkpoint being resumed, now 0.001",
        "epochs: 3 in the checkpoint being resumed, now 5",
    ]
    records = log_of(run_dir / "run")[1]
    assert [r["step"] for r in records] == list(range(1, 26))
    # From here on the rate is that of the new length.
    assert records[STEPS - 1]["learning_rate"] == learning_rate(STEPS - 1, STEPS, 0, 2e-3)
    assert records[STEPS]["learning_rate"] == learning_rate(STEPS, 25, 0, 1e-3)
    with (
        pytest.warns(UserWarning, match="^epochs: 5 in the checkpoint"),
        pytest.raises(ValueError, match="^epochs: expected at least the 5 that the run has behin"),
    ):
        train(run_dir, "run", resume=True, epochs=4, learning_rate=1e-3)


def test_another_set_is_said_in_words(pictures, run_dir):  # T5
    image = pytest.importorskip("PIL.Image")
    settings = {**FEW, "data": f"folder:{pictures}"}
    train(run_dir, "run", **settings, max_steps=2)
    began = r"^data: expected the {} that the run began with, got {} in folder:.*im{}$"

    def refused(*words):
        with pytest.raises(ValueError, match=began.format(*words)):
            train(run_dir, "run", **settings, resume=True)

    image.new("RGB", (9, 9)).save(pictures / "cat/99.png")
    image.new("RGB", (9, 9)).save(pictures / "cat/98.png")
    refused("18 training images", "19", "")
    (pictures / "cat/98.png").unlink()
    (pictures / "cat/99.png").unlink()
    (pictures / "fish").mkdir()
    train(run_dir, "run", **settings, resume=True, max_steps=3)  # a class without pictures is none
    image.new("RGB", (9, 9)).save(pictures / "fish/1.png")
    refused("2 classes", "those", ": with 'fish'")
    shutil.rmtree(pictures / "fish")
    (pictures / "dog").rename(pictures / "hound")
    refused("2 classes", "those", ": without 'dog', and 1 more changes")
    (pictures / "hound").rename(pictures / "dog")
    (pictures / "dog/0.png").rename(pictures / "dog/00.png")
    refused("18 training images", r"others \(in name, number of bytes or order\)", "")


def test_another_set_in_memory_is_refused(run_dir):
    train(run_dir, "run", max_steps=2)
    for spec, got in (("fake:n=81,size=8,channels=1", "81"), ("fake:n=80,size=8", "others")):
        with pytest.raises(ValueError, match=f"^data: expected the 80 training .* got {got}"):
            train(run_dir, "run", resume=True, data=spec)
    train(run_dir, "run", resume=True, data="fake:channels=1,size=8,n=80", max_steps=3)


def test_checkpoints_that_do_not_say_what_the_set_was(run_dir):
    train(run_dir, "run", max_steps=2)
    path = run_dir / "run/checkpoint.pt"
    state = checkpoint.load(path)
    del state["data"], state["config"]["skip_unreadable"]
    checkpoint.save(path, state)
    with pytest.raises(ValueError, match=r"^training images of fake:.*: expected 80 as in the ch"):
        train(run_dir, "run", resume=True, data="fake:n=81,size=8,channels=1")
    assert train(run_dir, "run", resume=True)[1]["step"] == STEPS


def test_a_refused_resume_makes_no_folder(run_dir):
    with pytest.raises(ValueError, match="^mode: expected one of"):
        train(run_dir, "none", mode="byol", resume=True)
    assert not run_dir.exists()
