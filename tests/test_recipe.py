"""The ImageNet recipe: the README's command resolves to the released settings, and a small folder
of photographs goes through all of it: torchrun, resume, probe, spectrum."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import waiting

from directclr_fast import cli
from directclr_fast.train import checkpoint, encoders, optim, views
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.loop import Trainer, load_model
from directclr_fast.train.objective import Objective

README = (Path(__file__).parent.parent / "README.md").read_text()


@pytest.fixture
def photographs(tmp_path):
    """A folder laid out as ImageNet's: train and val, two classes, JPEG files of several sizes."""
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6)):
        for label, name in enumerate(("n01440764", "n01443537")):
            folder = tmp_path / "imagenet" / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                width, height = 90 + 7 * k, 110 - 3 * k
                coarse = random.integers(0, 128, (4, 4 + 4 * label, 3), dtype=np.uint8)
                coarse[..., label] += 127
                whole = image.fromarray(coarse).resize((width, height), image.Resampling.BICUBIC)
                whole.save(folder / f"{name}_{k}.JPEG")
    return tmp_path / "imagenet"


def commands():
    """The README's lines that train, probe and draw on an image folder, as lists of words."""
    text = re.search(r"```sh\n([^`]*folder:[^`]*)```", README).group(1).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines()]


def test_the_command_in_the_readme_is_the_released_recipe(photographs):
    train, probe, spectrum = commands()
    assert train[0] == "torchrun" and train[train.index("-m") + 1] == "directclr_fast"
    words = train[train.index("-m") + 2 :]
    words[words.index("--data") + 1] = f"folder:{photographs}"
    given = vars(cli._parser().parse_args(words))
    names = TrainConfig.__dataclass_fields__
    settings = {k: v for k, v in given.items() if k in names and v is not None}
    amp = settings.pop("amp")
    assert amp == "fp16"  # as released; refused on a CPU
    config = TrainConfig(**settings, device="cpu").resolve()
    released = {
        "encoder": "resnet50", "image_size": 224, "views": "imagenet", "mode": "directclr",
        "temperature": 0.1, "negatives": "cross", "optimizer": "lars", "batch_size": 4096,
        "learning_rate": 4.8, "weight_decay": 1e-6, "epochs": 100, "warmup_epochs": 10,
        "loss": "fast",
    }  # fmt: skip
    assert {k: getattr(config, k) for k in released} == released
    # Probe and spectrum read the run that was trained, at the probe's released rate.
    for words in (probe, spectrum):
        assert words[0] == "directclr-fast"
        arguments = cli._parser().parse_args(words[1:])
        run = f"runs/{settings['name']}"
        assert arguments.source == ([run] if words is spectrum else run)
    arguments = cli._parser().parse_args(probe[1:])
    assert (arguments.epochs, arguments.learning_rate, arguments.schedule) == (100, 0.1, "constant")


def test_what_the_released_settings_mean():
    encoder = encoders.build("resnet50", image_size=224)
    assert encoder.width == 2048 and encoder.conv1.stride == (2, 2)
    assert Objective("directclr", encoder.width).dim == 360
    blocks = [m for m in encoder.modules() if hasattr(m, "bn3")]
    assert len(blocks) == 16 and all((block.bn3.weight == 0).all() for block in blocks)
    optimizer = optim.build_optimizer("lars", encoder, 4.8, 1e-6)
    (group,) = optimizer.param_groups
    assert (group["momentum"], group["trust"], group["weight_decay"]) == (0.9, 0.001, 1e-6)
    steps = 1281167 // 4096  # an epoch
    rate = [optim.learning_rate(s, 100 * steps, 10 * steps, 4.8) for s in range(100 * steps + 1)]
    assert rate[0] == 0 and rate[5 * steps] == pytest.approx(2.4) and rate[10 * steps] == 4.8
    assert rate[55 * steps] == pytest.approx(4.8 * 0.5005) and rate[-1] == pytest.approx(0.0048)
    pair = views.make_views("imagenet", 224)
    for view, blur, solarise in ((pair.first, 1.0, 0.0), (pair.second, 0.1, 0.2)):
        assert (view.blur_p, view.solarise_p, view.sigma) == (blur, solarise, (0.1, 2.0))
        assert (view.scale, view.ratio, view.flip_p) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)
        assert (view.strength, view.jitter_p, view.grey_p) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs Gloo")
def test_a_folder_goes_through_the_recipe(photographs, tmp_path, capsys):
    """Two ranks train, one process goes on, and what it leaves is probed and drawn. Smaller than
    the recipe: batch, side of the crops (still with ResNet-50's own stem), and epochs."""
    pytest.importorskip("torchvision")
    pytest.importorskip("matplotlib")
    runs = tmp_path / "runs"
    words = commands()[0]
    words = words[words.index("train") :]
    words[words.index("--data") + 1] = f"folder:{photographs}"
    words[words.index("--amp") + 1] = "bf16" if torch.cuda.is_available() else "none"
    words[words.index("--workers") + 1] = "1"
    words += f"--batch-size 4 --image-size 72 --epochs 2 --checkpoint-dir {runs}".split()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m", "directclr_fast"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = waiting.process([*command, *words, "--max-steps", "2"], runs, env=environment)
    assert done.returncode == 0, done.stderr
    assert "directclr, dim 360 on folder:" in done.stdout and "2 ranks" in done.stdout
    assert checkpoint.load(runs / "imagenet")["step"] == 2

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert cli.main([*words, "--max-steps", "4"]) == 0  # --resume is in the README's command
    config, model, state = load_model(runs / "imagenet")
    assert state["step"] == 4 and config.optimizer == "lars" and config.learning_rate == 4.8
    assert config.warmup_epochs == 1 and model.width == 2048 and model.objective.dim == 360
    start = Trainer(config, overwrite=True, progress=False).model
    moved = [(a - b).norm().item() for a, b in zip(model.parameters(), start.parameters())]
    assert min(m for m in moved if m) > 0 and sum(m > 0 for m in moved) > 0.9 * len(moved)
    lines = [json.loads(x) for x in (runs / "imagenet" / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines[1:]] == [1, 2, 3, 4] and lines[0]["ranks"] == 2

    capsys.readouterr()
    assert cli.main(["probe", str(runs / "imagenet"), "--epochs", "2", "--dim", "360"]) == 0
    assert cli.main(["spectrum", str(runs / "imagenet")]) == 0
    torch.set_num_threads(before)
    accuracy = json.loads((runs / "imagenet" / "probe.json").read_text())["accuracy"]
    assert set(accuracy) == {"trained", "trained, r[:, :360]", "trained, sub-vector"}
    assert accuracy["trained, r[:, :360]"] == accuracy["trained, sub-vector"]
    spectra = json.loads((runs / "imagenet" / "spectrum.json").read_text())
    assert spectra["representation"]["dimensions"] == 2048
    assert spectra["embedding"]["dimensions"] == 360
    assert (runs / "imagenet" / "spectrum.png").stat().st_size > 1000
