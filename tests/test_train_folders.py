"""Runs on folders of pictures: what their log says of the files, and of those left out on the way.

L1, L6, P4: as in test_folders.py.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys

import pytest
import torch
from test_train_run import TINY, assert_same, log_of, state_of, train, untimed
from torch.utils._python_dispatch import TorchDispatchMode

from directclr_fast import cli
from directclr_fast.train import checkpoint, gradcache
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.loop import Trainer

image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {**TINY, "views": "small", "batch_size": 6}  # 3 steps an epoch


def command(folder, run_dir, name="run"):
    settings = {**FEW, "data": f"folder:{folder}", "checkpoint_dir": run_dir, "name": name}
    return [
        "train",
        *(w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", str(v))),
    ]


def test_the_log_says_what_was_taken_and_what_not(pictures, run_dir, capsys):
    (pictures / "cat/notes.txt").write_text("")
    (pictures / "fish").mkdir()
    assert cli.main(command(pictures, run_dir)) == 0
    output, errors = capsys.readouterr()
    said = f"18 pictures of 2 classes in {pictures}; left out: 1 .txt files (cat/notes.txt); 1 fo"
    assert output.splitlines()[1].startswith(said) and not errors
    assert log_of(run_dir / "run")[0]["files"] == {
        "taken": 18,
        "left out": {
            "folders without pictures": {"count": 1, "such as": ["fish"]},
            ".txt files": {"count": 1, "such as": ["cat/notes.txt"]},
        },
    }


def test_pictures_without_classes_train_and_have_a_spectrum(pictures, run_dir, capsys):  # L1
    pytest.importorskip("matplotlib")
    for k, path in enumerate(sorted(pictures.glob("*/*.png"))):
        shutil.move(path, pictures / f"{k:02}.png")
    assert cli.main(command(pictures, run_dir)) == 0
    output = capsys.readouterr().out
    assert "18 pictures without classes in" in output and "accuracy" not in output
    assert all(r["accuracy"] is None for r in log_of(run_dir / "run")[1])
    assert cli.main(["spectrum", str(run_dir / "run")]) == 0
    capsys.readouterr()
    assert cli.main(["probe", str(run_dir / "run")]) == 2
    said = (
        "directclr-fast: error: data: expected classes to probe, got images without any in folder"
    )
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_pictures_are_counted_and_named_at_the_end(  # L6
    workers, pictures, run_dir, capsys
):
    for name in ("cat/3", "dog/4", "dog/5", "dog/9"):
        (pictures / f"{name}.png").write_bytes(b"")
    arguments = [*command(pictures, run_dir), "--workers", str(workers)]
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err.endswith("; --skip-unreadable goes on without it\n")
    arguments.append("--skip-unreadable")
    assert cli.main([*arguments, "--overwrite"]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith("note: data: left out 4 unreadable pictures: ")
    assert errors.count("cannot identify") == 3 and errors.endswith(", ...; log.jsonl has all\n")
    *_, last = (run_dir / "run/log.jsonl").read_text().splitlines()
    assert len(json.loads(last)["unreadable"]) == 4

    def records(name):
        lines = map(json.loads, (run_dir / name / "log.jsonl").read_text().splitlines())
        return [{k: v for k, v in x.items() if k != "images_per_second"} for x in lines][1:]

    # In parts it is the same run, and says the same at its end.
    parts = [*arguments, "--name", "parts"]
    assert cli.main([*parts, "--max-steps", "4"]) == 0
    where = ["--checkpoint-dir", str(run_dir), "--name", "parts"]
    assert cli.main(["train", "--resume", *where]) == 0
    assert records("parts")[:-1] == records("run")[:-1]
    assert records("parts")[-1]["unreadable"].keys() == records("run")[-1]["unreadable"].keys()
    capsys.readouterr()
    assert cli.main(["train", "--resume", *where]) == 0  # takes no step, and still knows
    assert "note: data: left out 4 unreadable pictures: " in capsys.readouterr().err
    assert len(records("parts")[-1]["unreadable"]) == 4
    whole, resumed = state_of(run_dir / "run"), state_of(run_dir / "parts")
    assert whole.pop("unreadable").keys() == resumed.pop("unreadable").keys()
    assert_same(whole, resumed)
    # Its probe leaves them out without being told.
    capsys.readouterr()
    assert cli.main(["probe", str(run_dir / "run"), "--epochs", "1"]) == 0
    assert "note: data: left out 4 unreadable pictures" in capsys.readouterr().err


def test_names_that_no_display_can_show(pictures, run_dir, monkeypatch):
    """Neither in what is left out, nor in a class, nor in a picture that cannot be read."""
    odd = os.fsdecode(b"caf\xe9")
    try:
        (pictures / "cat").rename(pictures / odd)
    except OSError:
        pytest.skip("a file system whose names are text")
    (pictures / odd / f"{odd}.txt").write_text("")
    (pictures / odd / "3.png").write_bytes(b"")
    strict = {n: io.TextIOWrapper(io.BytesIO(), "ascii", "strict") for n in ("stdout", "stderr")}
    for name, stream in strict.items():
        monkeypatch.setattr(sys, name, stream)
    assert cli.main(command(pictures, run_dir)) == 1
    assert b"caf\\udce9/3.png" in strict["stderr"].buffer.getvalue()
    assert cli.main([*command(pictures, run_dir), "--overwrite", "--skip-unreadable"]) == 0
    assert b"1 .txt files (caf\\udce9/caf\\udce9.txt)" in strict["stdout"].buffer.getvalue()
    assert log_of_odd(run_dir)["files"]["left out"][".txt files"]["such as"] == [f"{odd}/{odd}.txt"]
    assert cli.main(["train", "--resume", "--checkpoint-dir", str(run_dir), "--name", "run"]) == 0
    assert checkpoint.load(run_dir / "run")["data"]["classes"] == [odd, "dog"]


def log_of_odd(run_dir):
    return json.loads((run_dir / "run/log.jsonl").read_text().splitlines()[0])


def test_what_other_ranks_could_not_read_is_known_to_the_first(pictures, run_dir):
    (pictures / "cat/3.png").write_bytes(b"")
    settings = {**FEW, "data": f"folder:{pictures}", "skip_unreadable": True}
    config = TrainConfig(**settings, checkpoint_dir=str(run_dir), name="run")
    trainer = Trainer(config, progress=False)
    elsewhere = {"/elsewhere.png": "cut short"}
    gather = trainer.ranks.gather
    trainer.ranks.gather = lambda value: (
        gather(value) if "python" in value else [value, elsewhere]
    )  # fmt: skip
    with pytest.warns(UserWarning, match="left out 2 unreadable pictures: .*elsewhere"):
        trainer.run()
    assert checkpoint.load(run_dir / "run")["unreadable"].items() > elsewhere.items()


class NoFp64(TorchDispatchMode):
    """As on Apple's MPS: nothing may make a tensor of fp64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise TypeError(f"{func} has no fp64")
        return made


@pytest.mark.parametrize("more", [{}, {"chunk_size": 5, "cache_bn": "two-pass"}])
def test_a_step_and_its_log_need_no_fp64(more, run_dir, monkeypatch):  # P4
    settings = {"loss": "reference", "max_steps": 4, **more}
    train(run_dir, "wide", **settings)
    monkeypatch.setattr(gradcache, "wide", lambda device: torch.float32)
    with NoFp64():
        train(run_dir, "narrow", **settings)
    wide, narrow = (untimed(run_dir / name) for name in ("wide", "narrow"))
    if not more:
        assert wide == narrow
    assert [r["loss"] for r in narrow] == pytest.approx([r["loss"] for r in wide], rel=1e-4)
    assert checkpoint.load(run_dir / "narrow")["step"] == 4


def test_fp64_is_asked_of_no_apple_device():
    assert gradcache.wide(torch.device("mps")) == torch.float32
    assert gradcache.wide(torch.device("cpu")) == torch.float64
