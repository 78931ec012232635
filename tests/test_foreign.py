"""Files that others made: features, and what is refused."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch

from directclr_fast import cli
from directclr_fast.train import foreign


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


@pytest.mark.parametrize(("name", "content"), [
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


def test_missing_safetensors_is_named(tmp_path, monkeypatch):
    import sys

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
    found = json.loads((tmp_path / "flat-spectrum.json").read_text())
    assert found["features"]["collapsed"] == 24 and len(found["features"]["spectrum"]) == 64
    assert (tmp_path / "flat-spectrum.png").read_bytes().startswith(b"\x89PNG")

    several = [str(tmp_path / name) for name in ("flat.pt", "both.npz", "flat.pt")]
    assert cli.main(["spectrum", *several, "--out", str(tmp_path / "out")]) == 0
    names = ["flat, features", "both, features, train", "both, features, test"]
    found = json.loads((tmp_path / "out/spectrum.json").read_text())
    assert list(found) == [*names, "flat, features (2)"]
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[:3]] == names
    assert cli.main(["spectrum", several[0], "--threshold", "1e-12"]) == 0
    assert capsys.readouterr().out.startswith("features: 0 of 64 dimensions collapsed")
