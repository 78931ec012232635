"""Every command through ``main``: what it prints and leaves, and one sentence for each error."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from directclr_fast import __version__, cli
from directclr_fast.dispatch import last_backend
from directclr_fast.train import checkpoint, commands, probe
from directclr_fast.train.loop import Trainer, TrainingDiverged

pytestmark = pytest.mark.usefixtures("one_thread")
SET = "fake:n=48,size=8,channels=1"
TINY = ["--data", SET, "--encoder", "small", "--image-size", "8", "--views", "affine"]
TINY += ["--batch-size", "16", "--optimizer", "adamw"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a finished tiny run."""
    runs = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", *TINY, "--checkpoint-dir", str(runs), "--name", "tiny"]) == 0
    return runs / "tiny"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it to write to."""
    return shutil.copytree(trained, tmp_path / "tiny")


def error_of(capsys, *arguments):
    """The one sentence a failing command says."""
    try:
        code = cli.main([*map(str, arguments)])
    except SystemExit as exit:
        code = exit.code
    output, errors = capsys.readouterr()
    assert code == 2, (code, output, errors)
    assert errors.startswith("directclr-fast: error: ") and errors.count("\n") == 1
    assert "Traceback" not in errors + output and not output
    return errors.removeprefix("directclr-fast: error: ").strip()


def test_train(tmp_path, capsys):
    # The names of the released trainer's flags.
    flags = "--mode directclr --dim 20 --learning-rate 0.001 --weight-decay 1e-4 --epochs 2"
    flags += f" --checkpoint-dir {tmp_path} --name released"
    assert cli.main(["train", *TINY, *flags.split()]) == 0
    output, errors = capsys.readouterr()
    folder = tmp_path / "released"
    assert output.startswith("directclr, dim 20 on fake:n=48") and not errors
    backend = last_backend()
    assert backend not in (None, "reference")
    assert output.endswith(f"done: step 6, loss backend {backend}, {folder}\n")
    assert "step      6/6  loss" in output and f"images/s  [{backend}]" in output
    config = json.loads((folder / "config.json").read_text())
    assert (config["dim"], config["learning_rate"], config["weight_decay"]) == (20, 1e-3, 1e-4)
    assert config["batch_size"] == 16 and config["mode"] == "directclr"
    names = ["checkpoint.previous.pt", "checkpoint.pt", "config.json", "log.jsonl"]
    assert sorted(p.name for p in folder.iterdir()) == names


def test_resume_and_overwrite(tmp_path, capsys):
    command = ["train", *TINY, "--checkpoint-dir", str(tmp_path), "--name", "run"]
    assert cli.main([*command, "--max-steps", "2", "--resume"]) == 0
    errors = capsys.readouterr().err
    assert errors == f"note: resume: no checkpoint in {tmp_path / 'run'}, starting anew\n"
    assert error_of(capsys, *command).startswith("name: expected a folder without a checkpoint")
    text = error_of(capsys, *command, "--resume", "--dim", "7")
    began = (
        f"as the run in {tmp_path / 'run'} began, got 7; leave it out to go on, or give another "
    )
    assert text == f"dim: expected none, {began}--name to start anew"
    assert "not allowed with" in error_of(capsys, *command, "--resume", "--overwrite")
    assert cli.main([*command, "--resume", "--max-steps", "4"]) == 0
    assert "done: step 4" in capsys.readouterr().out
    assert cli.main([*command, "--resume", "--max-steps", "4"]) == 0
    assert "done: step 4" in capsys.readouterr().out
    assert cli.main([*command, "--overwrite", "--max-steps", "1"]) == 0
    assert checkpoint.load(tmp_path / "run")["step"] == 1


def test_damaged_checkpoint_is_said(run, capsys):
    path = run / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-9])
    assert cli.main(["spectrum", str(run)]) == 0
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith(f"note: checkpoint: {path} is unreadable")
    assert errors.endswith(f"using the previous one, {checkpoint.previous(path)}\n")


def test_probe(run, capsys):
    options = "--epochs 3 --learning-rate 0.2 --k 5 --temperature 0.1 --baselines".split()
    assert cli.main(["probe", str(run), *options]) == 0
    output, errors = capsys.readouterr()
    result = json.loads((run / "probe.json").read_text())
    rows = ["trained", "trained, sub-vector", "untrained encoder", "raw pixels"]
    columns = ["linear, constant rate", "linear, cosine rate", "knn"]
    assert list(result["accuracy"]) == rows and not errors
    for row, values in result["accuracy"].items():
        assert list(values) == columns and all(0 <= v <= 1 for v in values.values())
        assert f"{row}: linear, constant rate {100 * values[columns[0]]:.2f} %" in output
    assert (result["k"], result["temperature"], result["epochs"]) == (5, 0.1, 3)
    assert result["step"] == 6 and result["data"] == SET and result["learning_rate"] == 0.2
    # The checkpoint's file in place of its folder, another set, one schedule, another place.
    options = f"--data {SET.replace('48', '40')} --schedule cosine --epochs 1 --raw-features"
    options += f" --out {run / 'deep' / 'er'}"
    assert cli.main(["probe", str(run / "checkpoint.pt"), *options.split()]) == 0
    result = json.loads((run / "deep" / "er" / "probe.json").read_text())
    assert list(result["accuracy"]["trained"]) == ["linear, cosine rate", "knn"]
    assert result["features"] == "raw" and "n=40" in result["data"]


def test_untrained_baseline_is_where_the_run_started(trained, tmp_path):
    arguments = cli._parser().parse_args(
        ["train", *TINY, "--checkpoint-dir", str(tmp_path), "--name", "new"]
    )
    trainers = []

    class Spy(Trainer):
        def run(self, on_step=None):
            trainers.append({k: v.clone() for k, v in self.model.encoder.state_dict().items()})
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("directclr_fast.train.loop.Trainer", Spy)
        with pytest.raises(KeyboardInterrupt):
            arguments.run(arguments)
    from directclr_fast.train.loop import load_model

    config, _, state = load_model(trained)
    torch.manual_seed(99)
    untrained = commands.baselines(config, state, "cpu")["untrained encoder"].state_dict()
    assert all(torch.equal(untrained[k], v) for k, v in trainers[0].items())


def test_spectrum(run, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["spectrum", str(run), "--threshold", "1e-6"]) == 0
    output = capsys.readouterr().out
    spectra = json.loads((run / "spectrum.json").read_text())
    assert list(spectra) == ["representation", "sub-vector", "embedding"]
    for name, values in spectra.items():
        text = f"{name}: {values['collapsed']} of {values['dimensions']} dimensions collapsed"
        assert text in output and values["threshold"] == 1e-6 and values["samples"] == 48
    assert "48 samples show at most 47" in output
    assert (run / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_demo(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    folder = tmp_path / "demo"
    assert cli.main(["demo", "--epochs", "1", "--out", str(folder)]) == 0
    output, errors = capsys.readouterr()
    assert not errors
    names = ["checkpoint.pt", "config.json", "curves.png", "log.jsonl", "metrics.json"]
    assert sorted(p.name for p in folder.iterdir()) == [*names, "spectrum.png"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["accuracy"]) == ["trained encoder", "untrained encoder", "raw pixels"]
    for name, values in metrics["accuracy"].items():
        row = f"{name:<20}{100 * values['linear']:>12.1f} %{100 * values['knn']:>12.1f} %"
        assert row in output
    assert metrics["accuracy"]["raw pixels"]["linear"] > 0.9
    for name in ("representation", "sub-vector"):
        collapsed = metrics["spectra"][name]["collapsed"]
        assert f"{name}: {collapsed} of " in output
    assert metrics["steps"] == 5 and metrics["loss_backend"] == last_backend()
    assert (
        f"{metrics['images_per_second']:.0f} images per second, loss backend {last_backend()}"
        in output
    )
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert len(records) == 6 and records[-1]["learning_rate"] < 2e-3
    assert checkpoint.load(folder)["step"] == 5


def test_doctor(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["directclr_fast"] == __version__ and "cpu" in report["chosen"]
    assert cli.main(["doctor"]) == 0
    assert "reference" in capsys.readouterr().out


def test_version_and_help(capsys):
    for flags, text in ((["--version"], __version__), (["train", "--help"], "--learning-rate")):
        with pytest.raises(SystemExit) as exit:
            cli.main(flags)
        assert exit.value.code == 0 and text in capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: directclr-fast {command} [-h]")


@pytest.mark.parametrize(
    "command", ["train", "probe x", "spectrum x", "toy x", "compare", "demo", "bench", "doctor"]
)
def test_flags_are_read_without_torch(command):
    """What restarts a run is a small process, and a help text is there at once."""
    code = "import sys; from directclr_fast import cli; cli._parser().parse_args(sys.argv[1:]); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, *command.split()]).returncode == 0


def test_a_command_that_cannot_be_imported_is_a_sentence(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "directclr_fast.machine", None)
    assert "directclr_fast.machine" in error_of(capsys, "doctor")


def test_module_is_the_same_command():
    command = [sys.executable, "-m", "directclr_fast"]
    done = subprocess.run([*command, "train", "--mode", "x"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("directclr-fast: error: mode: expected one of baseline, ")
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            "--mode byol",
            "mode: expected one of baseline, directclr, single, simclr, group, diagonal",
        ),
        ("--data imagenet", "data: expected one of digits, patches, cifar10,"),
        ("--data folder:/nowhere", "data: expected a folder of images, got no folder /nowhere"),
        ("--data cifar10 --data-root /nowhere", "data: expected the folder of cifar10, got no"),
        ("--batch-size 49", "batch size: expected at most 48 (the training images of fake:n=48"),
        ("--dim 0", "dim: expected at least 1, got 0"),
        ("--dim 257", "dim: expected 1 to 256 (the encoder's width), got 257"),
        ("--temperature nan", "temperature: expected a positive finite number, got nan"),
        ("--device nowhere", "device: expected one of this machine, got 'nowhere'"),
        ("--checkpoint-dir /dev/null", "checkpoint_dir: expected a folder to write to, got /dev"),
        ("--name a/b", "name: expected the name of one folder, got 'a/b'"),
        ("--views sharp", "views: expected one of imagenet, small, affine, got 'sharp'"),
        ("--negatives all", "negatives: expected one of cross, both, same, got 'all'"),
        ("--epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ],
)
def test_train_errors(flags, text, tmp_path, capsys):
    folder = ["--checkpoint-dir", str(tmp_path)]
    assert error_of(capsys, "train", *TINY, *folder, *flags.split()).startswith(text)
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("command", ["probe", "spectrum"])
def test_unreadable_checkpoint(command, tmp_path, capsys):
    text = error_of(capsys, command, tmp_path / "none.pt")
    assert text.startswith(f"checkpoint: expected one at {tmp_path / 'none.pt'}, got none: ")
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    text = error_of(capsys, command, tmp_path)
    assert f"{tmp_path / 'checkpoint.pt'} is unreadable (" in text
    assert f"{tmp_path / 'checkpoint.previous.pt'} does not exist" in text


@pytest.mark.parametrize(
    ("command", "flags", "text"),
    [
        ("probe", "--k 0", "k: expected at least 1, got 0"),
        ("probe", "--dim 257", "dim: expected 1 to 256 (the encoder's width), got 257"),
        ("probe", "--epochs 0", "epochs: expected at least 1, got 0"),
        ("probe", "--learning-rate -1", "learning_rate: expected a positive finite number, got -1"),
        ("probe", "--temperature 0", "temperature: expected a positive finite number, got 0.0"),
        ("probe", "--schedule step", "argument --schedule: invalid choice: 'step'"),
        ("probe", "--data fake:n=9", "data: expected images of 1 channels, as the encoder was"),
        ("spectrum", "--data fake:n=9", "data: expected images of 1 channels, as the encoder was"),
        ("spectrum", "--threshold nan", "threshold: expected 0 <= threshold < 1, got nan"),
        ("spectrum", "--threshold 2", "threshold: expected 0 <= threshold < 1, got 2.0"),
        ("spectrum", "--data folder:/nowhere", "data: expected a folder of images, got no folder"),
        ("spectrum", "--device cuda:99", "device: expected one of this machine, got 'cuda:99'"),
        ("spectrum", "--out /dev/null", "out: expected a folder to write to, got /dev/null"),
    ],
)
def test_probe_and_spectrum_errors(command, flags, text, run, capsys, monkeypatch):
    monkeypatch.setattr(probe, "encode", None)  # said before any image is encoded
    before = sorted(run.iterdir())
    assert error_of(capsys, command, run, *flags.split()).startswith(text)
    assert sorted(run.iterdir()) == before


def test_runs_and_features_in_one_figure(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    torch.save(torch.randn(30, 4), tmp_path / "x.pt")
    sources = [str(run), str(tmp_path / "x.pt"), str(run / "checkpoint.pt")]
    assert cli.main(["spectrum", *sources, "--out", str(tmp_path / "out")]) == 0
    parts = ["representation", "sub-vector", "embedding"]
    names = [f"tiny, {part}" for part in parts]
    shown = json.loads((tmp_path / "out/spectrum.json").read_text())
    assert list(shown) == [*names, "x.pt, features", *(f"{name} (2)" for name in names)]
    assert shown[names[0]] == shown[f"{names[0]} (2)"] and shown[names[0]]["dimensions"] == 256
    assert (tmp_path / "out/spectrum.png").exists() and not list(run.glob("spectrum*"))
    capsys.readouterr()


def test_no_command(capsys):
    assert error_of(capsys) == "the following arguments are required: COMMAND"


def test_errors_of_several_lines_and_interrupts(capsys, monkeypatch, tmp_path):
    def fail(error):
        def run(self, on_step=None):
            raise error

        monkeypatch.setattr(Trainer, "run", run)

    command = ["train", *TINY, "--checkpoint-dir", str(tmp_path)]
    fail(TrainingDiverged("loss: not\n  finite"))
    assert error_of(capsys, *command) == "loss: not finite"
    with pytest.raises(TrainingDiverged):
        cli.main(["--debug", *command])
    fail(KeyboardInterrupt())
    assert cli.main(command) == 130
    assert capsys.readouterr().err == "directclr-fast: interrupted\n"
