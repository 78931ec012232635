"""Files that others made: features, and what is refused."""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import types
import warnings

import numpy as np
import pytest
import torch

from directclr_fast import cli
from directclr_fast.train import encoders, foreign, probe


def features(n=30, width=5, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(30) % 3


def write(path, values):
    if path.suffix == ".npy":
        np.save(path, values.numpy())
    elif path.suffix == ".npz":
        np.savez(path, **{k: v.numpy() for k, v in values.items()})
    elif path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(values, path)
    else:
        torch.save(values, path)
    return path


@pytest.mark.parametrize("name", ["x.npy", "x.pt", "x.pth", "x.bin"])
def test_features_alone(name, tmp_path):
    path = write(tmp_path / name, features())
    parts = foreign.features_in(path)
    assert list(parts) == ["train"] and parts["train"].labels is None
    assert torch.equal(parts["train"].features, features())
    assert not foreign.is_run(path)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_features_and_labels_of_two_parts(suffix, tmp_path):
    both = {
        "x_train": features(), "y_train": LABELS,
        "x_test": features(20, seed=1), "y_test": LABELS[:20].int(),
    }  # fmt: skip
    parts = foreign.features_in(write(tmp_path / f"x{suffix}", both))
    assert list(parts) == ["train", "test"]
    assert torch.equal(parts["test"].features, both["x_test"])
    assert (
        torch.equal(parts["test"].labels, LABELS[:20]) and parts["test"].labels.dtype == torch.int64
    )
    one = {"feats": features(), "labels": LABELS, "paths": torch.zeros(4, dtype=torch.int64)}
    parts = foreign.features_in(write(tmp_path / f"one{suffix}", one))
    assert list(parts) == ["train"] and torch.equal(parts["train"].labels, LABELS)


def test_a_key_chooses(tmp_path):
    path = write(tmp_path / "x.npz", {"a": features(), "b": features(seed=1), "y": LABELS})
    with pytest.raises(
        ValueError, match=r"^file: expected one matrix .*--key.*a \(30, 5\), b \(30"
    ):
        foreign.features_in(path)
    parts = foreign.features_in(path, "b")
    assert torch.equal(parts["train"].features, features(seed=1)) and len(parts) == 1
    assert torch.equal(parts["train"].labels, LABELS)
    with pytest.raises(ValueError, match=r"^file: expected 'c', in .*x.npz, got a \(30, 5\)"):
        foreign.features_in(path, "c")


def test_other_byte_order_and_lists(tmp_path):
    np.save(tmp_path / "x.npy", features().numpy().astype(">f4"))
    assert torch.equal(foreign.features_in(tmp_path / "x.npy")["train"].features, features())
    torch.save([features(), LABELS], tmp_path / "x.pt")
    parts = foreign.features_in(tmp_path / "x.pt")
    assert torch.equal(parts["train"].features, features())
    assert torch.equal(parts["train"].labels, LABELS)


class Planted:
    """What runs when it is unpickled."""

    opened = 0

    def __reduce__(self):
        return _plant, ()


def _plant():
    Planted.opened += 1
    return Planted()


@pytest.mark.parametrize("name", ["x.pt", "x.npy", "x.npz"])
def test_pickles_are_refused_unless_they_are_trusted(name, tmp_path):
    path, before = tmp_path / name, Planted.opened
    objects = np.array([Planted()], dtype=object)
    if name == "x.pt":
        torch.save({"x": features(), "by": Planted()}, path)
    elif name == "x.npy":
        np.save(path, objects, allow_pickle=True)
    else:
        np.savez(path, x=features().numpy(), by=objects)
    with pytest.raises(ValueError, match="^file: expected tensors alone, got .*--trust-pickle"):
        foreign.read(path)
    assert Planted.opened == before
    foreign.read(path, trust=True)
    assert Planted.opened > before


def test_settings_beside_features_need_trust(tmp_path):
    path = write(tmp_path / "x.pt", {"x": features(), "args": argparse.Namespace(lr=1)})
    with pytest.raises(ValueError, match=r"whose pickled objects run code .*argparse.Namespace"):
        foreign.features_in(path)
    assert torch.equal(foreign.features_in(path, trust=True)["train"].features, features())


def test_pickles_that_torch_did_not_write(tmp_path):
    for name in ("x.pkl", "x.pt"):
        (tmp_path / name).write_bytes(pickle.dumps({"x": features().numpy()}))
        with pytest.raises(ValueError, match="^file: expected tensors alone, got .*--trust-pickle"):
            foreign.features_in(tmp_path / name)
        read = foreign.features_in(tmp_path / name, trust=True)
        assert torch.equal(read["train"].features, features())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(3, 4)), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="^file: expected tensors alone, .*TorchScript.*--trust-p"):
        foreign.read(tmp_path / "net.pt")
    assert foreign.read(tmp_path / "net.pt", trust=True).state_dict()["weight"].shape == (4, 3)


@pytest.mark.parametrize(("name", "content"), [
    ("x.pt", b"hello"), ("x.pt", b"\x80\x02"), ("x.bin", b"\xff\xd8\xff\xe0"),
    ("x.npy", b"\x93NUMPY\x01"), ("x.npy", b""), ("x.npz", b"PK\x03\x04"), ("x.pt", b"no"),
    ("x.pt", b""), ("x.pt", b"PK\x03\x04 nothing"),
])  # fmt: skip
def test_damaged_files(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError, match=f"^file: expected a readable one, got .*{name} "):
        foreign.features_in(tmp_path / name)


def test_files_without_features(tmp_path):
    for content, text in (({"a": 1}, "tensors or arrays, got none"), (LABELS, "one matrix")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=f"^file: expected {text}"):
            foreign.features_in(tmp_path / "x.pt")
    net = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(4)))
    torch.save(net.state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"or --encoder NAME .*0.weight \(3, 3\).* and 4 more$"):
        foreign.features_in(tmp_path / "x.pt")


def test_weights_are_no_features(resnet, tmp_path):
    """Not even the classifier, which is the one matrix there."""
    for state in (resnet[0], {"fc.weight": features(), "fc.bias": features()[:, 0]}):
        torch.save(state, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"^file: expected one matrix .*, or --encoder NAME"):
            foreign.features_in(tmp_path / "x.pt")
    torch.save({"state_dict": resnet[0], "epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="got none in .*; --encoder NAME reads the weights of a n"):
        foreign.features_in(tmp_path / "x.pt")


def test_safetensors_is_asked_by_its_own_package(tmp_path, monkeypatch):
    """Where it is not installed; `write` writes real ones where it is."""
    package = types.ModuleType("safetensors.torch")
    package.load_file = lambda path: {"x": features(), "name": str(path)}
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", package)
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    assert not foreign.is_run(path) and foreign.read(path)["name"] == str(path)
    assert torch.equal(foreign.features_in(path)["train"].features, features())


def test_missing_safetensors_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match="expected safetensors, got .*: pip install safetensors"):
        foreign.features_in(tmp_path / "x.safetensors")


# ---------------------------------------------------------------- the commands


def test_spectrum_of_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    flat = features(200, 40) @ features(40, 64, seed=1)
    write(tmp_path / "flat.pt", flat.bfloat16())
    write(tmp_path / "both.npz", {"train": features(), "test": features(20, seed=2)})
    assert cli.main(["spectrum", str(tmp_path / "flat.pt")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("features: 24 of 64 dimensions collapsed (eigenvalue at most ")
    assert "the rounding of bfloat16" in said
    spectra = json.loads((tmp_path / "flat-spectrum.json").read_text())
    assert spectra["features"]["collapsed"] == 24 and len(spectra["features"]["spectrum"]) == 64
    assert (tmp_path / "flat-spectrum.png").read_bytes().startswith(b"\x89PNG")

    several = [str(tmp_path / name) for name in ("flat.pt", "both.npz", "flat.pt")]
    assert cli.main(["spectrum", *several, "--out", str(tmp_path / "out")]) == 0
    names = ["flat.pt, features", "both.npz, features, train", "both.npz, features, test"]
    spectra = json.loads((tmp_path / "out/spectrum.json").read_text())
    assert list(spectra) == [*names, "flat.pt, features (2)"]
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[:3]] == names
    # Beside weights of that encoder; features stay features.
    beside = ["spectrum", several[1], "--encoder", "resnet18", "--out", str(tmp_path / "out")]
    assert cli.main(beside) == 0
    assert capsys.readouterr().out.startswith("features, train: ")
    assert cli.main(["spectrum", several[0], "--threshold", "1e-12"]) == 0
    assert capsys.readouterr().out.startswith("features: 0 of 64 dimensions collapsed")


# ---------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def resnet():
    """A ResNet-18 of torchvision, every tensor random, and what its features of two images are."""
    models = pytest.importorskip("torchvision.models")
    generator = torch.Generator().manual_seed(0)
    net = models.resnet18(weights=None)
    for key, value in net.state_dict().items():
        if value.is_floating_point():
            value.copy_(0.05 * torch.randn(value.shape, generator=generator))
            value.abs_() if "running_var" in key else None
    images = torch.rand(2, 3, 64, 64, generator=generator)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        return state, images, net.eval()(images)


def under(prefix, state, fc=True):
    return {prefix + k: v for k, v in state.items() if fc or not k.startswith("fc.")}


def others(state):
    """The same names, other values."""
    return {k: v + 1 for k, v in state.items()}


def numbered(state):
    """As nn.Sequential(*list(resnet.children())[:-1]) names them."""
    order = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    parts = (k.partition(".") for k in state if not k.startswith("fc."))
    return {f"{order.index(a)}.{b}": state[f"{a}.{b}"] for a, _, b in parts}


STYLES = {
    "torchvision": lambda s: s,
    "simclr": lambda s: {"state_dict": under("module.backbone.", s), "epoch": 3},
    "moco": lambda s: {
        "arch": "resnet18",
        "state_dict": {
            **under("module.encoder_q.", s), **under("module.encoder_k.", others(s)),
            "module.queue": torch.zeros(128, 9), "module.encoder_q.fc.2.weight": torch.ones(3, 3),
        },
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []},
    },
    "lightly": lambda s: {
        "state_dict": {
            **under("backbone.", numbered(s)), "projection_head.layers.0.weight": s["fc.weight"],
        },
        "pytorch-lightning_version": "2.0.0",
    },
    "solo-learn": lambda s: {
        "state_dict": {
            **under("backbone.", s, fc=False), **under("momentum_backbone.", others(s), fc=False),
            "classifier.weight": torch.ones(10, 512),
        },
    },
    "open_clip": lambda s: {
        "state_dict": {**under("module.visual.trunk.", s), "logit_scale": s["fc.bias"]},
    },
    "timm": lambda s: {"state_dict": s, "state_dict_ema": others(s), "arch": "resnet18"},
    "dino": lambda s: {"student": under("module.backbone.", s, fc=False), "teacher": others(s)},
    "compiled": lambda s: under("_orig_mod.", s),
    "no counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_weights_are_found(style, resnet, tmp_path):
    """FIELD T12: whatever they lie under, these and no others; what was left is said."""
    state, images, want = resnet
    path = write(tmp_path / "weights.pth", STYLES[style](state))
    assert not foreign.is_run(path)
    encoder = foreign.load_encoder("resnet18", path).eval()
    with torch.no_grad():
        assert torch.equal(encoder(images), want)
    assert encoder.said.startswith(f"resnet18 from {path}: 100 tensors")
    if style == "moco":
        assert "of 'state_dict' under 'module.encoder_q.'; " in encoder.said
        assert "left there, such as module.encoder_q.fc.weight" in encoder.said
    if style == "lightly":
        assert "under 'backbone.'; 1 left there, such as projection_head.layers.0.w" in encoder.said


def test_old_files_of_torch(resnet, tmp_path):
    state, images, want = resnet
    torch.save({"state_dict": state}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with torch.no_grad():
        got = foreign.load_encoder("resnet18", tmp_path / "x.pth").eval()(images)
    assert torch.equal(got, want)


def test_a_whole_pickled_network_needs_trust(resnet, tmp_path):
    models = pytest.importorskip("torchvision.models")
    state, images, want = resnet
    net = models.resnet18(weights=None)
    net.load_state_dict(state)
    torch.save(net, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="^file: expected tensors alone, .*ResNet.*--trust-pickle"):
        foreign.load_encoder("resnet18", tmp_path / "net.pt")
    encoder = foreign.load_encoder("resnet18", tmp_path / "net.pt", trust=True).eval()
    with torch.no_grad():
        assert torch.equal(encoder(images), want)


def test_the_form_for_small_images(tmp_path):
    """A first convolution of 3 x 3: stride 1, no max-pool, as this trainer's and solo-learn's."""
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    for channels in (3, 1):
        ours = encoders.build("resnet18", channels=channels, image_size=32).eval()
        path = write(tmp_path / "small.pt", {"model": under("encoder.", ours.state_dict())})
        encoder = foreign.load_encoder("resnet18", path).eval()
        images = torch.rand(2, channels, 32, 32)
        with torch.no_grad():
            assert torch.equal(encoder(images), ours(images))
        assert encoder.channels == channels


def test_weights_that_do_not_fit(resnet, tmp_path):
    state, *_ = resnet
    path = tmp_path / "x.pt"

    def refused(values, name, text):
        torch.save(values, path)
        with pytest.raises(ValueError, match=f"^encoder: expected all {text}"):
            foreign.load_encoder(name, path)

    few = {k: v for k, v in state.items() if not k.startswith("layer4.1")}
    refused(few, "resnet18", r"100 tensors of resnet18 in .*, got 90: layer4.1.conv1.weight is not")
    wide = {**state, "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    refused(wide, "resnet18", r".*got 99: layer1.0.conv1.weight is \(64, 64, 1, 1\) there, \(64, 6")
    refused(state, "resnet34", "180 tensors of resnet34 in .*, and 79 more$")
    refused({"epoch": 3}, "resnet18", "100 tensors of resnet18 in .*, got 0: conv1.weight is not")


def own_network():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU())


def broken():
    raise KeyError("no")


class Named(torch.nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, width, 3)


def test_prefixes_are_whole_words_and_shapes_count(tmp_path):
    own = Named()
    state = own.state_dict()
    momentum = {f"momentum_{k}": v for k, v in others(state).items()}
    for first in (momentum, under("big.", Named(7).state_dict())):
        path = write(tmp_path / "x.pt", {**first, **state})
        encoder = foreign.load_encoder("test_foreign:Named", path)
        assert torch.equal(encoder.network.encoder.weight, own.encoder.weight)


def test_a_function_makes_the_network(tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save({"net": under("module.", own_network().state_dict())}, tmp_path / "x.pt")
    saved = foreign.read(tmp_path / "x.pt")["net"]["module.0.weight"]
    encoder = foreign.load_encoder("test_foreign:own_network", tmp_path / "x.pt")
    assert torch.equal(encoder.network[0].weight, saved)
    assert encoder(torch.rand(4, 1, 8, 8)).shape == (4, 6)  # grey ones are repeated
    encoder = foreign.load_encoder("test_foreign:own_network")
    assert encoder.said == "test_foreign:own_network with the weights it starts with"
    encoder.train().check(1, 8)
    assert encoder.width == 6 and encoder.training
    with pytest.raises(ValueError, match="^encoder: expected one for images of 3 channels and 2 p"):
        encoder.check(3, 2)
    # Of the folder the command was given in.
    (tmp_path / "mine.py").write_text("from torch import nn\ndef f(): return nn.Flatten()\n")
    monkeypatch.chdir(tmp_path)
    assert foreign.load_encoder("mine:f")(torch.ones(2, 1, 3, 3)).shape == (2, 9)
    for name, text in (("broken", "KeyError"), ("absent", "AttributeError"), ("str", "Attribute")):
        with pytest.raises(
            ValueError, match=rf"^encoder: expected a module from .*\(\), got {text}"
        ):
            foreign.load_encoder(f"test_foreign:{name}")
    with pytest.raises(ValueError, match=r"expected a module from builtins:dict\(\), got dict$"):
        foreign.load_encoder("builtins:dict")


def test_names_of_networks(monkeypatch):
    pytest.importorskip("torchvision")
    with pytest.raises(
        ValueError, match="^encoder: expected a model of torchvision or timm.* got 'x"
    ):
        foreign.load_encoder("x")
    with pytest.raises(ValueError, match="ends in a linear layer, got squeezenet1_0"):
        foreign.load_encoder("squeezenet1_0")
    for name, width in (("mobilenet_v3_small", 1024), ("convnext_tiny", 768)):
        encoder = foreign.load_encoder(name)
        encoder.check(3, 32)
        assert encoder.width == width
    made = []

    class Timm:
        is_model = staticmethod(lambda name: name == "tiny")

        @staticmethod
        def create_model(name, **how):
            made.append((name, how))
            return torch.nn.Flatten()

    monkeypatch.setitem(sys.modules, "timm", Timm)
    foreign.load_encoder("tiny")
    assert made == [("tiny", {"pretrained": False, "num_classes": 0})]
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ValueError, match=r"torchvision or timm \(pip install timm for more\), or module:f"
    ):
        foreign.load_encoder("tiny")


SET = ["--data", "fake:n=48,size=32,channels=1", "--image-size", "32"]


def test_commands_on_weights_of_others(resnet, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    state, *_ = resnet
    path = str(write(tmp_path / "moco.pth", STYLES["moco"](state)))
    assert cli.main(["spectrum", path, "--encoder", "resnet18", *SET]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        f"resnet18 from {path}: 100 tensors of 'state_dict' under 'module.enc"
    )
    assert said[1].startswith("representation: ") and "of 512 dimensions" in said[1]
    spectra = json.loads((tmp_path / "moco-spectrum.json").read_text())
    assert spectra["representation"]["samples"] == 48
    flags = ["--epochs", "2", "--schedule", "cosine", "--baselines", "--dim", "9"]
    assert cli.main(["probe", path, "--encoder", "resnet18", *SET, *flags]) == 0
    scores = json.loads((tmp_path / "moco-probe.json").read_text())
    rows = ["encoder", "encoder, r[:, :9]", "untrained encoder", "untrained encoder, r[:, :9]"]
    assert list(scores["accuracy"]) == [*rows, "raw pixels"]
    assert scores["encoder"].startswith("resnet18 from") and "step" not in scores
    capsys.readouterr()


def test_command_on_a_network_without_a_file(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    flags = ["--encoder", "test_foreign:own_network", *SET, "--out", "out"]
    assert cli.main(["spectrum", *flags]) == 0
    assert (
        json.loads((tmp_path / "out/spectrum.json").read_text())["representation"]["dimensions"]
        == 6
    )
    assert "with the weights it starts with" in capsys.readouterr().out
    assert cli.main(["probe", *flags, "--epochs", "1"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(("flags", "text"), [
    ("spectrum", "source: expected runs, files, or --encoder, got none"),
    ("probe", "source: expected a run, a file, or --encoder, got none"),
    ("spectrum x.pt --encoder resnet18", "data: expected a set for the encoder to see, got none"),
    ("spectrum x.pt", "file: expected one matrix of features, or --key NAME, "),
    ("spectrum x.pt --encoder vgg1 --data fake", "encoder: expected a model of torchvision or"),
    ("probe --encoder resnet18 --data fake --dim 513", "dim: expected 1 to 512"),
])  # fmt: skip
def test_command_errors(flags, text, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    torch.save({"a": features(), "b": features()}, "x.pt")
    assert cli.main(flags.split()) == 2
    assert capsys.readouterr().err.startswith(f"directclr-fast: error: {text}")


# ---------------------------------------------------------------- probe of features


def clusters(n=60, names=(7, 40, 3), seed=0):
    """Features around a centre for each label, and labels that do not start at 0."""
    labels = torch.tensor(names)[torch.arange(n) % len(names)]
    centres = 3 * torch.eye(5)[torch.arange(n) % len(names)]
    return centres + 0.3 * features(n, seed=seed), labels


def test_probe_of_one_file(tmp_path, capsys):
    """Of each class the last fifth is tested on; what the probe gives is what it gives here."""
    x, y = clusters()
    y[5] = -1
    path = write(tmp_path / "x.npz", {"features": x, "labels": y})
    probed, tested = foreign.probe_features(path)
    assert probed.classes == 3 and tested == "the last fifth of each class"
    assert probed.test.shape == (12, 5) and len(probed.train) == 59 - 12
    for c, name in enumerate((3, 7, 40)):
        own = x[y == name]
        assert torch.equal(probed.train[probed.train_labels == c], own[: 4 * len(own) // 5])
        assert torch.equal(probed.test[probed.test_labels == c], own[4 * len(own) // 5 :])
    flags = ["--epochs", "20", "--schedule", "cosine", "--k", "3", "--dim", "1"]
    assert cli.main(["probe", str(path), *flags]) == 0
    assert capsys.readouterr().out.startswith("3 classes, 47 features to train on, tested on the l")
    result = json.loads((tmp_path / "x-probe.json").read_text())
    assert result["accuracy"]["features"] == {"linear, cosine rate": 1.0, "knn": 1.0}
    assert result["accuracy"]["features, r[:, :1]"]["knn"] < 1
    assert (result["data"], result["classes"]) == (str(path), 3)


@pytest.mark.parametrize("way", ["one file", "two files", "four files", "labels as floats"])
def test_probe_with_a_part_to_test_on(way, tmp_path):
    (x, y), (z, w) = clusters(), clusters(15, seed=1)
    if way == "one file":
        files = [write(tmp_path / "x.pt", {"train": x, "y": y, "val": z, "y_val": w})]
    elif way == "two files":
        a, b = ({"f": f.half(), "l": labels} for f, labels in ((x, y), (z, w)))
        b = {"train_f": x, "train_l": y, "test_f": b["f"], "test_l": b["l"]}
        files = [write(tmp_path / "a.npz", a), None, write(tmp_path / "b.npz", b)]
    else:
        labels = [y[:, None].double(), w.double()] if "floats" in way else [y, w]
        values = {"x": x, "y": labels[0], "z": z, "w": labels[1]}
        files = [write(tmp_path / f"{name}.npy", value) for name, value in values.items()]
    probed, tested = foreign.probe_features(*files)
    close = {"rtol": 1e-2, "atol": 1e-2} if way == "two files" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(probed.train, x, **close)
    torch.testing.assert_close(probed.test, z, **close)
    order = torch.tensor([3, 7, 40])
    assert torch.equal(order[probed.train_labels], y) and torch.equal(order[probed.test_labels], w)
    assert tested == str(files[0] if way == "one file" else files[2])
    assert probe.knn(probed, k=3) == 1.0


def test_probe_errors_of_features(tmp_path, capsys):
    x, y = clusters()
    write(tmp_path / "x.npy", x)
    write(tmp_path / "y.npy", y[:9])
    write(tmp_path / "z.npz", {"f": x[:, :3], "l": y})
    write(tmp_path / "n.npz", {"f": x / 0, "l": y})
    write(tmp_path / "half.npy", x[:, 0])

    def said(*flags):
        flags = [str(tmp_path / f) if "." in f else f for f in flags]
        assert cli.main(["probe", *flags]) == 2
        return capsys.readouterr().err.removeprefix("directclr-fast: error: ")

    text = "labels: expected one for each of the 60 features in "
    assert said("x.npy").startswith(text) and said("x.npy").endswith(
        "none; --labels names a file of them\n"
    )
    assert "got 9 in" in said("x.npy", "--labels", "y.npy")
    assert "--test-labels names" in said("z.npz", "--test", "x.npy")
    assert said("x.npy", "--labels", "half.npy").startswith("labels: expected whole numbers in")
    assert said("n.npz").startswith("features: expected finite numbers, got nan or inf in")
    write(tmp_path / "w.npz", {"f": x, "l": y})
    text = "features: expected two parts of one width, got 5 and 3"
    assert said("w.npz", "--test", "z.npz").startswith(text)
    assert said("w.npz", "--baselines").startswith("baselines: expected a network, got a file of f")
    assert said("w.npz", "--dim", "6").startswith(
        "dim: expected 1 to 5 (the features' width), got 6"
    )
    assert said(".", "--test", "x.npy").startswith("test: expected a file of features with it, got")
