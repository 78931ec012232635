"""Checkpoints under failure: a whole one is always left, a damaged one is passed over and named."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch

from directclr_fast.train import checkpoint
from directclr_fast.train.checkpoint import CheckpointError


def state(n):
    values = torch.arange(300, dtype=torch.float32) + n
    return {"step": n, "model": {"w": values, "b": values[::3].half()}, "note": "plain"}


def same(got, n):
    want = state(n)
    return (
        got["step"] == n
        and got["note"] == "plain"
        and all(torch.equal(got["model"][k], want["model"][k]) for k in want["model"])
    )


@pytest.fixture
def path(tmp_path):
    """A checkpoint of step 2 whose previous one is of step 1."""
    path = tmp_path / "run" / "checkpoint.pt"
    checkpoint.save(path, state(1))
    assert os.listdir(path.parent) == ["checkpoint.pt"]
    checkpoint.save(path, state(2))
    return path


def names(path):
    return sorted(os.listdir(path.parent))


WHOLE = ["checkpoint.previous.pt", "checkpoint.pt"]


def test_the_last_two_are_kept(path):
    checkpoint.save(path, state(3))
    assert names(path) == WHOLE
    assert same(checkpoint.load(path), 3) and same(checkpoint.load(path.parent), 3)
    assert same(checkpoint.load(checkpoint.previous(path)), 2)


def test_without_hard_links(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.save(path, state(3))
    assert names(path) == WHOLE
    assert same(checkpoint.load(path), 3) and same(checkpoint.load(checkpoint.previous(path)), 2)


class Full:
    """A file whose disk is full after some bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


@pytest.mark.parametrize("room", [0, 100, 1000, 3000])
def test_full_disk(room, path, monkeypatch):
    replacing = checkpoint.replacing

    class Replacing:
        def __init__(self, *args):
            self.inner = replacing(*args)

        def __enter__(self):
            return Full(self.inner.__enter__(), room)

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    monkeypatch.setattr(checkpoint, "replacing", Replacing)
    with pytest.raises(OSError, match="^checkpoint: could not write .*No space left on device"):
        checkpoint.save(path, state(3))
    assert names(path) == WHOLE and same(checkpoint.load(path), 2)
    monkeypatch.setattr(checkpoint, "replacing", replacing)
    checkpoint.save(path, state(3))
    assert same(checkpoint.load(path), 3)


def test_file_size_limit(path):
    """The same by the system's own hand, in a process that may not write large files."""
    pytest.importorskip("resource")
    code = (
        "import resource, sys, torch\n"
        "from directclr_fast.train import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        "try: checkpoint.save(sys.argv[1], {'w': torch.zeros(100000)})\n"
        "except OSError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.stdout.startswith("checkpoint: could not write ") and "large" in done.stdout
    assert done.returncode == 0 and not done.stderr
    assert names(path) == WHOLE and same(checkpoint.load(path), 2)


def load_quietly(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checkpoint.load(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize(
    ("call", "nth", "kept"), [("fsync", 1, 2), ("replace", 1, 2), ("replace", 2, 3)]
)
def test_failure_at_each_step(call, nth, kept, damaged, path, monkeypatch):
    """The nth call fails. Step 2 is still there, or 1 where 2 was damaged, or the new one is."""
    if damaged:
        truncate(path)
    real, calls = getattr(os, call), []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            raise OSError(errno.EIO, "Input/output error")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="^checkpoint: could not write .*Input/output error"):
        checkpoint.save(path, state(3))
    monkeypatch.undo()
    assert len(calls) == nth and names(path) == WHOLE
    assert same(load_quietly(path), 1 if damaged and kept == 2 else kept)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_death_at_each_step(call, damaged, path, monkeypatch):
    """What kill -9 leaves, with nothing cleaned up: a whole one loads, the next save is clean."""
    if damaged:
        truncate(path)
    real, copies = getattr(os, call), []

    def snapshot():
        copies.append(path.parent.with_name(f"copy{len(copies)}"))
        shutil.copytree(path.parent, copies[-1])

    def between(*args, **kwargs):
        snapshot()
        result = real(*args, **kwargs)
        snapshot()
        return result

    monkeypatch.setattr(os, call, between)
    checkpoint.save(path, state(3))
    monkeypatch.undo()
    assert copies  # two for a call, one where this file system has no links
    for copy in copies:
        fresh = shutil.copytree(copy, copy.with_name(f"{copy.name}-fresh"))
        loaded = load_quietly(copy)
        assert same(loaded, loaded["step"]) and loaded["step"] in ((1, 3) if damaged else (2, 3))
        checkpoint.save(copy / "checkpoint.pt", state(4))
        assert sorted(os.listdir(copy)) == WHOLE and same(checkpoint.load(copy), 4)
        # A run that starts anew there must not keep the old one as the previous of its own.
        for name in WHOLE:
            (fresh / name).unlink()
        checkpoint.save(fresh / "checkpoint.pt", state(5))
        assert "checkpoint.previous.pt" not in os.listdir(fresh)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated(share, path):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.warns(UserWarning, match=r"\.pt is unreadable \(.+\); using the previous"):
        assert same(checkpoint.load(path), 1)


def test_missing_newest(path):
    path.unlink()
    with pytest.warns(UserWarning, match=r"checkpoint\.pt does not exist; using the previous one"):
        assert same(checkpoint.load(path), 1)


def test_flipped_bytes(path):
    """At any offset: the damage is seen and the previous one used, or it changed nothing, as in
    the padding between records. 1.0 turned into 1.5 unseen is what must not be."""
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        large = [i for i in archive.infolist() if i.file_size > 500]
    data = []
    for info in large:  # behind a header of 30 bytes, the name and padding
        lengths = struct.unpack_from("<HH", whole, info.header_offset + 26)
        data.append(info.header_offset + 30 + sum(lengths) + info.file_size // 2)
    assert data
    chance = random.Random(0)
    offsets = data + [chance.randrange(len(whole)) for _ in range(150)]
    seen = 0
    for offset in offsets:
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        loaded = load_quietly(path)
        assert same(loaded, loaded["step"]), offset
        seen += loaded["step"] == 1
        assert loaded["step"] == 1 or offset not in data
    assert seen >= len(data)


def test_flipped_byte_of_a_tensor_is_said(path):
    whole = bytearray(path.read_bytes())
    at = whole.index(state(2)["model"]["w"].numpy().tobytes())
    whole[at + 3] ^= 64
    path.write_bytes(whole)
    with pytest.warns(UserWarning, match="checksum of .*data/.* does not match.* using the prev"):
        assert same(checkpoint.load(path), 1)


def test_both_damaged(path):
    truncate(path)
    checkpoint.previous(path).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    text = str(caught.value)
    assert text.startswith(f"checkpoint: expected one at {path}, got none: {path} is unreadable (")
    assert f"; {checkpoint.previous(path)} is unreadable (" in text and "\n" not in text


def test_errors_without_text_are_named(path, monkeypatch):
    def fail(*_, **__):
        raise EOFError

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=r"\.pt is unreadable \(EOFError\)"):
        checkpoint.load(path)


def test_none_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"nt\.pt does not exist; .*previous\.pt does"):
        checkpoint.load(tmp_path)


class Code:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def test_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": checkpoint.FORMAT, "step": Code()}, path)
    with pytest.raises(CheckpointError, match="unreadable"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps({"format": checkpoint.FORMAT, "step": Code()}))
    with pytest.raises(CheckpointError, match="unreadable"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "got"), [({"format": 99}, "99"), ({"model": {}}, "None"), ([1, 2], "list")]
)
def test_other_formats_are_refused(content, got, tmp_path):
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=f"expected checkpoint format 1, got {got}"):
        checkpoint.load(tmp_path)


# ---------------------------------------------------------------- what a run puts in it


def test_random_state_survives_the_file(tmp_path):
    views = torch.Generator().manual_seed(3)

    def draw():
        numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
        numbers += [torch.rand(()).item(), torch.randn((), generator=views).item()]
        return numbers

    draw()  # half a Gaussian pair is pending now
    checkpoint.save(tmp_path / "checkpoint.pt", {"rng": checkpoint.rng_state(views)})
    want = [draw() for _ in range(3)]
    checkpoint.set_rng_state(checkpoint.load(tmp_path)["rng"], views)
    assert [draw() for _ in range(3)] == want


def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "config.json"
    for text in ("one", "two"):
        with checkpoint.replacing(path) as file:
            file.write(text)
    with pytest.raises(KeyboardInterrupt), checkpoint.replacing(path) as file:
        file.write("three")
        raise KeyboardInterrupt
    assert path.read_text() == "two" and os.listdir(tmp_path) == ["config.json"]


def test_writable(tmp_path):
    made = checkpoint.writable("out", tmp_path / "a" / "b")
    assert made.is_dir() and not os.listdir(made)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="^out: expected a folder to write to, got .*file"):
            checkpoint.writable("out", folder)
