"""Folders of pictures as people have them: what is taken, what is left out, and that it is said.

The numbers L1 to L11 are public reports against other trainers, each played again here.
"""

from __future__ import annotations

import os
import shutil
import sys

import numpy as np
import pytest
import torch

from directclr_fast.train import data, folder, probe

image = pytest.importorskip("PIL.Image")


def save(path, colour=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new("RGB", size, (colour, 0, 0)).save(path)


@pytest.fixture
def tree(tmp_path):
    """cat and dog, 6 pictures each, in PATH/<class>/*; red is 10, 20, ... in their order."""
    for k in range(12):
        save(tmp_path / "set" / ("cat", "dog")[k // 6] / f"{k:02}.png", 10 * (k + 1))
    return tmp_path / "set"


def both(path, **settings):
    parts = [data.load(f"folder:{path}", train=t, image_size=14, **settings) for t in (True, False)]
    assert parts[0].left_out == parts[1].left_out or settings
    return parts


def count(path):
    """(pictures of both parts, classes, what was left out by the reason)."""
    train, test = both(path)
    files = [os.path.realpath(os.fsdecode(p)) for p in [*train.paths, *test.paths]]
    assert len(set(files)) == len(files)
    left = {why: what["count"] for why, what in train.left_out.items()}
    return len(files), train.num_classes, left


def test_pictures_without_classes(tree, tmp_path):  # L1
    for k, file in enumerate(tree.glob("*/*.png")):
        shutil.copy(file, tmp_path / f"{k:02}.png")
    shutil.rmtree(tree)
    train, test = both(tmp_path)
    assert (len(train), len(test)) == (10, 2) and train.num_classes == 0
    assert (
        set(train.labels.tolist()) == {-1}
        and train.left_out == {"folders without pictures": {"count": 1, "such as": ["set"]}}
        or not (tmp_path / "set").exists()
    )
    assert train.said().startswith(f"10 pictures without classes in {tmp_path}")
    # In train and val, and as people's ImageNet validation part: classes in one part alone.
    for part in ("train", "val"):
        save(tmp_path / f"split/{part}/x.png")
    assert [len(p) for p in both(tmp_path / "split")] == [1, 1]
    save(tmp_path / "split/train/cat/y.png")
    train, test = both(tmp_path / "split", skip_unreadable=True)
    assert train.labels.tolist() == [0] and test.labels.tolist() == [-1]
    assert train.left_out == {"pictures outside the classes": {"count": 1, "such as": ["x.png"]}}


def test_hidden_folders_and_files(tree):  # L2
    shutil.copytree(tree / "dog", tree / "cat/.ipynb_checkpoints")
    shutil.copytree(tree / "dog", tree / ".trash")
    shutil.copy(tree / "cat/00.png", tree / "cat/._0.png")
    assert count(tree) == (12, 2, {"hidden": 3})
    assert both(tree)[0].left_out["hidden"]["such as"][0] == ".trash"


def test_links_and_cycles(tree, tmp_path):  # L3, L14
    (tree / "cat/again").symlink_to(tree / "cat")
    (tree / "cat/all").symlink_to(tree)
    (tree / "cat/up").symlink_to(tmp_path)
    (tree / "cat/a").symlink_to(tree / "dog")  # would make cats of dogs
    (tree / "kitty").symlink_to(tree / "cat")
    (tree / "dog/self").symlink_to("self")
    (tree / "dog/gone.png").symlink_to("nowhere.png")
    links = {"links back into the data": 5, "broken links": 2}
    assert count(tree) == (12, 2, links)
    # A class, a sub-folder and a file elsewhere are what the links lead to, once each.
    pool = tmp_path / "pool"
    for name in ("owl/1.png", "owl/deep/2.png", "more/3.png", "4.png"):
        save(pool / name)
    (pool / "owl/deep/round").symlink_to(pool / "owl/deep")
    (tree / "owl").symlink_to(pool / "owl")
    (tree / "dog/more").symlink_to(pool / "more")
    (tree / "dog/most").symlink_to(pool)
    (pool / "4.png").rename(tmp_path / "4.png")
    (tree / "cat/x.png").symlink_to(tmp_path / "4.png")
    links = {"links back into the data": 6, "broken links": 2, "folders read already": 2}
    assert count(tree) == (16, 3, links)


def test_what_this_tool_wrote(tree):  # L4
    for name in ("runs/x/config.json", "runs/x/log.jsonl", "comparison/results.json",
                 "comparison/report.md", "cat/cat-spectrum.json", "toy-depth.json"):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("{}")
    for name in ("runs/x/spectrum", "runs/x/more/a", "comparison/dims", "cat/cat-spectrum"):
        save(tree / f"{name}.png")
    save(tree / "dog/no-spectrum.png")  # without its numbers: a picture
    images, classes, left = count(tree)
    assert (images, classes) == (13, 2)
    assert left == {
        "folders of this tool's output": 2, "folders without pictures": 2,
        ".json files": 2, "figures of this tool": 1,
    }  # fmt: skip


def test_empty_classes(tree):  # L5
    before = both(tree)[0]
    (tree / "ant").mkdir()
    (tree / "fish/deep").mkdir(parents=True)
    (tree / "fish/notes.txt").write_text("")
    train, test = both(tree)
    assert train.classes == test.classes == ("cat", "dog")
    assert torch.equal(train.labels, before.labels) and train.fingerprint() == before.fingerprint()
    assert train.left_out == {
        "folders without pictures": {"count": 2, "such as": ["ant", "fish"]},
        ".txt files": {"count": 1, "such as": ["fish/notes.txt"]},
    }
    assert train.said().endswith(
        "; left out: 2 folders without pictures (ant, fish); 1 .txt files (fish/notes.txt)"
    )


def test_a_class_that_is_empty_in_one_part(tmp_path):
    for name in ("train/a/1", "train/b/1", "val/b/1"):
        save(tmp_path / f"{name}.png")
    (tmp_path / "val/c").mkdir()
    train, test = both(tmp_path, skip_unreadable=True)
    assert train.classes == test.classes == ("a", "b") and test.labels.tolist() == [1]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_and_huge_files(workers, tree, monkeypatch):  # L6, L10
    whole = both(tree)[0]
    bad = [tree / "cat/02.png", tree / "cat/03.png", tree / "dog/09.png"]
    bad[0].write_bytes(bad[0].read_bytes()[:45])
    bad[1].write_bytes(b"")
    save(bad[2], size=(400, 400))
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 70_000)
    with pytest.raises(OSError, match=r"cat/02.png .*\); --skip-unreadable goes on without it$"):
        whole.batch(torch.arange(len(whole)))
    images = data.load(f"folder:{tree}", train=True, image_size=14, skip_unreadable=True)
    reds = torch.tensor([10, 30, 40, 50, 60, 70, 90, 100, 110, 120])
    sampler = data.EpochSampler(10, 10)
    ((x, y, i),) = data.Batches(images, sampler, num_workers=workers)
    # In place of each the next one that can be read, with its label; batches keep their size.
    sample = sampler.order(0)
    instead = torch.tensor([0, 3, 3, 3, 4, 5, 6, 8, 8, 9])[sample]
    assert torch.equal(i, instead) and torch.equal(y, images.labels[instead])
    assert torch.equal(x[:, 0, 5, 5].long(), reds[instead])
    names = {os.path.basename(path): reason for path, reason in images.failed.items()}
    assert names.keys() == {"02.png", "03.png", "09.png"}
    assert "truncated" in names["02.png"] and "exceeds limit" in names["09.png"]
    # An evaluation leaves them out, with their labels.
    images.failed.clear()
    x, y, i = map(torch.cat, zip(*data.in_order(images, 2, "cpu", workers)))
    assert i.tolist() == [0, 3, 4, 5, 6, 8, 9] and torch.equal(y, images.labels[i])
    assert torch.equal(x[:, 0, 5, 5].long(), reds[i]) and len(images.failed) == 3


def test_an_evaluation_without_a_picture_that_can_be_read(tree):
    images = both(tree, skip_unreadable=True)[1]
    for path in images.paths:
        open(path, "wb").close()
    with (
        pytest.warns(UserWarning, match=f"left out {len(images)} unreadable"),
        pytest.raises(OSError, match="^data: expected a picture that can be read in folder:"),
    ):
        probe.encode(None, images, 14)


def test_a_disk_that_is_gone_is_said(tree, monkeypatch):
    images = both(tree, skip_unreadable=True)[0]
    shutil.rmtree(tree)
    monkeypatch.setattr(folder, "RETRIES", 4)
    with pytest.raises(OSError, match=r"^data: expected a picture to read among 4, got none up to"):
        images.batch(torch.tensor([8]))


def ramp(values, dtype):
    return np.tile(np.asarray(values).astype(dtype), (256, 1))


@pytest.mark.parametrize(
    ("pixels", "want"),
    [
        (ramp(np.arange(256) * 257, np.uint16), np.arange(256)),  # L7
        (ramp(np.arange(256) * 257, ">u2"), np.arange(256)),
        (ramp(np.arange(256) * 257, np.int32), np.arange(256)),
        (ramp(np.arange(256) * 16, np.uint16), np.arange(256)),  # L8: 12 bits in 16
        (ramp(np.arange(256), np.int32), np.arange(256)),
        (ramp(np.linspace(0, 1, 256), np.float32), np.arange(256)),
        (ramp(np.arange(256), np.float32), np.arange(256)),
        (ramp(np.linspace(-3, 900, 256), np.float32), np.arange(256)),
        (ramp(np.arange(256) * 10**6 - 5 * 10**7, np.int32), np.arange(256)),
        (ramp(np.zeros(256), np.float32), np.zeros(256)),
        (ramp(np.full(256, 9e4), np.float32), np.zeros(256)),
    ],
)
def test_deep_and_floating_pixels(pixels, want, tmp_path):
    image.fromarray(pixels).save(tmp_path / "x.tif")
    got = folder.decode(tmp_path / "x.tif", 224)
    assert (got == torch.from_numpy(want[16:240]).to(torch.uint8)).all()


def test_pixels_that_are_not_finite_are_refused(tmp_path):
    image.fromarray(ramp(np.full(256, np.nan), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(OSError, match=r"got .*x.tif \(expected finite pixels, got nan or inf\)$"):
        folder.decode(tmp_path / "x.tif", 16)


def test_an_orientation_in_exif_is_not_applied(tmp_path):  # L9: as torchvision
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = image.Exif()
    exif[0x0112] = 3  # upside down
    image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    got = folder.decode(tmp_path / "x.png", 14)
    assert (got[:, :7] == 255).all() and not got[:, 7:].any()


def test_large_pictures_are_no_warning(tree, monkeypatch, recwarn):  # L10
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 100)
    assert both(tree)[0].batch(torch.arange(3))[0].shape == (3, 3, 14, 14) and not recwarn.list


def test_suffixes(tree):  # L11
    for suffix in ("jfif", "jpe", "JPG"):
        image.new("RGB", (9, 9)).save(tree / f"cat/{suffix}.{suffix}", format="jpeg")
    for name in ("a.heic", "b.HEIC", "c.txt", "noname"):
        shutil.copy(tree / "cat/00.png", tree / "dog" / name)
    left = {".heic files": 2, ".txt files": 1, "files without a suffix": 1}
    assert count(tree) == (15, 2, left)
    images = both(tree)[0]
    assert images.batch(torch.arange(len(images)))[0].shape[0] == len(images)
    for path in tree.glob("*/*.*"):
        if path.suffix.lower() != ".heic":
            path.unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"^data: expected training images in .*set, got none; left out: "
        r"2 folders without pictures \(cat, dog\); 2 .heic files \(dog/a.heic, dog/b.HEIC\); 1 f",
    ):
        both(tree)


def test_folders_that_cannot_be_read(tree, monkeypatch):
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    left = {"folders that cannot be read": 1, "folders without pictures": 1}
    assert count(tree) == (6, 1, left)


def test_without_pillow(tree, monkeypatch):  # P5
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"data folder: expected Pillow.*directclr-fast\[train\]"):
        both(tree)


def test_a_set_is_the_same_wherever_it_lies(tree, tmp_path, monkeypatch):  # T2
    want = both(tree)[0].fingerprint()
    shutil.copytree(tree, tmp_path / "copy")
    assert both(tmp_path / "copy")[0].fingerprint() == want
    monkeypatch.chdir(tree)
    assert both(".")[0].fingerprint() == want
    (tree / "cat/00.png").write_bytes((tree / "cat/00.png").read_bytes() + b"0")
    assert both(tree)[0].fingerprint() != want
    (tmp_path / "copy/cat/00.png").rename(tmp_path / "copy/cat/0.png")
    assert both(tmp_path / "copy")[0].fingerprint() != want
