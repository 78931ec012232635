"""Image sets, sampler and batches: contents, exact resume, sharding, messages."""

from __future__ import annotations

import gzip
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from directclr_fast.train import data, folder
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.loop import Trainer

# ---------------------------------------------------------------- digits and fake


def test_digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    train, test = (data.load("digits", train=t) for t in (True, False))
    assert (len(train), len(test)) == (1297, 500)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert train.shape == (1, 8, 8) and train.num_classes == 10 and train.name == "digits"
    assert train.images.min() == 0 and train.images.max() == 255
    # Stratified, and the two parts together are the whole set, each image once.
    assert test.labels.bincount().min() >= 48
    raw = sklearn.load_digits()
    whole = torch.cat((train.images, test.images)).flatten(1).double() * (16 / 255)
    rows = torch.cat((whole.round(), torch.cat((train.labels, test.labels))[:, None]), 1).tolist()
    assert sorted(rows) == sorted(np.c_[raw.data, raw.target].tolist())
    again = data.load("digits", train=True, seed=5)
    assert torch.equal(again.images, train.images) and torch.equal(again.labels, train.labels)


def test_fake():
    a, b = (data.load("fake:n=40,classes=3,size=12,channels=1", train=True, seed=7) for _ in "ab")
    assert len(a) == 40 and a.shape == (1, 12, 12) and a.num_classes == 3
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert set(a.labels.tolist()) == {0, 1, 2}
    for other in ({"train": False, "seed": 7}, {"train": True, "seed": -8}):
        b = data.load("fake:n=40,classes=3,size=12,channels=1", **other)
        assert not torch.equal(b.images, a.images) and not torch.equal(b.labels, a.labels)
    assert data.load("fake", train=True).shape == (3, 32, 32)
    assert data.load("fake:n=2", train=True, image_size=20).shape == (3, 20, 20)


def test_fake_classes_can_be_told_apart_in_both_parts():
    train, test = (data.load("fake:n=200", train=t) for t in (True, False))
    x, y = (s.images.flatten(1).float() for s in (train, test))
    means = torch.stack([x[train.labels == c].mean(0) for c in range(10)])
    assert (torch.cdist(y, means).argmin(1) == test.labels).float().mean() > 0.95


def test_batch():
    images = data.load("fake:n=9,size=4", train=True)
    picked, labels, _ = images.batch(torch.tensor([8, 0, 8]))
    assert torch.equal(picked, images.images[[8, 0, 8]])
    assert torch.equal(labels, images.labels[[8, 0, 8]])
    assert images.to("cpu").name == images.name
    with pytest.raises(AttributeError):
        images.name = "other"


# ---------------------------------------------------------------- patches


def photograph(label):
    """A photograph of the set, grey, as the test reads it."""
    from pathlib import Path

    skimage = pytest.importorskip("skimage")
    from PIL import Image

    path = Path(skimage.__file__).parent / "data" / data.PHOTOGRAPHS[label]
    return np.asarray(Image.open(path).convert("L"))


def place_of(patch, pixels):
    """Every (row, column) of the top left corner at which the photograph holds the patch."""
    side = len(patch)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (side, side))
    places = np.argwhere(windows[..., 0, 0] == patch[0, 0])
    for i in range(side):  # by the diagonal first: few are left to compare whole
        places = places[windows[places[:, 0], places[:, 1], i, i] == patch[i, i]]
    return [tuple(p) for p in places.tolist() if (windows[tuple(p)] == patch).all()]


def test_patches():
    pytest.importorskip("skimage")
    train, test = (data.load("patches", train=t) for t in (True, False))
    assert (len(train), len(test)) == (5120, 1280) and train.shape == test.shape == (1, 32, 32)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert train.num_classes == 16 and train.name == "patches"
    assert train.labels.bincount().tolist() == [320] * 16
    assert test.labels.bincount().tolist() == [80] * 16
    data._patches.cache_clear()
    again = data.load("patches", train=True, seed=5)
    assert torch.equal(again.images, train.images) and torch.equal(again.labels, train.labels)


@pytest.mark.parametrize("label", [0, 4, 8])
def test_patches_of_different_parts_lie_apart(label):
    """Found again in the photograph: squares of the three parts are 4 pixels apart and more, and
    every cell of the grid belongs to one part."""
    pixels = photograph(label)
    parts = {}
    for train in (True, False):
        images = data.load("patches", train=train)
        own = images.images[images.labels == label][:, 0].numpy()
        for name, some in (
            (("train", own[:256:8]), ("validation", own[256::8]))
            if train
            else (("test", own[::8]),)
        ):
            places = [place_of(patch, pixels) for patch in some]
            assert all(places)  # at its own resolution, unchanged
            parts[name] = [p[0] for p in places if len(p) == 1]  # plain sky is in many places
            assert len(parts[name]) > len(some) / 2

    def gap(a, b):
        """Pixels between two squares of 32, negative where they overlap."""
        return max(abs(x - y) for x, y in zip(a, b)) - 32

    for a, b in (("train", "test"), ("train", "validation"), ("validation", "test")):
        assert min(gap(x, y) for x in parts[a] for y in parts[b]) >= 4, (a, b)
    # Test patches come from all rows and columns of the grid, not from one side of the picture.
    for axis in (0, 1):
        cells = {place[axis] * 5 // pixels.shape[axis] for place in parts["test"]}
        assert len(cells) >= 4


def test_patches_without_a_photograph(tmp_path, monkeypatch):
    skimage = pytest.importorskip("skimage")
    data._patches.cache_clear()
    monkeypatch.setattr(skimage, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="data: expected the photograph astronaut.png in"):
        data.load("patches", train=True)


# ---------------------------------------------------------------- torchvision's sets


def write_cifar(root, monkeypatch):
    """A CIFAR-10 folder of 4 images a file, whose checksums are declared right."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [n for n, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list]
    pixels = {n: rng.integers(0, 256, (4, 3072), dtype=np.uint8) for n in names}
    for k, name in enumerate(names):
        entry = {"data": pixels[name], "labels": [k, 9, 0, 1]}
        (folder / name).write_bytes(pickle.dumps(entry))
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / datasets.CIFAR10.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, *_: True)
    return names, pixels


def test_cifar10(tmp_path, monkeypatch):
    names, pixels = write_cifar(tmp_path, monkeypatch)
    train, test = (data.load("cifar10", root=tmp_path, train=t) for t in (True, False))
    assert len(train) == 20 and len(test) == 4
    assert train.shape == (3, 32, 32) and train.num_classes == 10 and train.name == "cifar10"
    want = np.concatenate([pixels[n] for n in names[:5]]).reshape(20, 3, 32, 32)
    assert torch.equal(train.images, torch.from_numpy(want)) and train.images.is_contiguous()
    assert train.labels.tolist()[::4] == [0, 1, 2, 3, 4] and train.labels.dtype == torch.int64
    assert test.labels.tolist() == [5, 9, 0, 1]


def test_stl10_trains_on_the_unlabelled_too(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    asked = []

    class STL10:
        def __init__(self, root, split, download):
            asked.append((root, split, download))
            self.data = np.arange(6 * 3 * 96 * 96, dtype=np.uint8).reshape(6, 3, 96, 96)
            self.labels = np.array([3, 9, 0, -1, -1, -1])

    monkeypatch.setattr(datasets, "STL10", STL10)
    train = data.load("stl10", root=tmp_path, train=True)
    data.load("stl10", root=tmp_path, train=False, download=True)
    assert asked == [(tmp_path, "train+unlabeled", False), (tmp_path, "test", True)]
    assert train.labels.tolist() == [3, 9, 0, -1, -1, -1] and train.num_classes == 10
    assert train.shape == (3, 96, 96) and train.images.dtype == torch.uint8


def test_svhn(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    scipy = pytest.importorskip("scipy.io")
    pixels = np.arange(32 * 32 * 3 * 4, dtype=np.uint8).reshape(32, 32, 3, 4)
    for part, answers in (("train", [10, 1, 9, 10]), ("test", [1, 2, 3, 10])):
        scipy.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.c_[answers]})
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    train, test = (data.load("svhn", root=tmp_path, train=t) for t in (True, False))
    assert train.labels.tolist() == [0, 1, 9, 0] and test.labels.tolist() == [1, 2, 3, 0]
    assert torch.equal(train.images, torch.from_numpy(pixels).permute(3, 2, 0, 1))
    assert train.num_classes == 10 and train.name == "svhn" and train.images.is_contiguous()
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"data svhn: expected scipy, got .*fast\[train\]"):
        data.load("svhn", root=tmp_path, train=True)


@pytest.mark.parametrize("spec", ["cifar10", "cifar100", "stl10", "svhn"])
def test_missing_torchvision_files(spec, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=f"data: expected the folder of {spec}, got no"):
        data.load(spec, root=tmp_path / "none", train=True)
    with pytest.raises(FileNotFoundError, match=f"data: expected the files of {spec} in .*damaged"):
        data.load(spec, root=tmp_path, train=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="got no folder data"):
        data.load(spec, train=True)


def test_failed_download(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "CIFAR100", offline)
    with pytest.raises(OSError, match="data: expected to download cifar100 to .*, got no network"):
        data.load("cifar100", root=tmp_path / "new", download=True, train=True)


# ---------------------------------------------------------------- MNIST's format


def idx(values, kind=8):
    """An array in MNIST's format: bytes where ``kind`` is 8."""
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    return bytes((0, 0, kind, values.ndim)) + sizes + values.tobytes()


def write_idx(folder, n=(6, 4), packed=False):
    """Both parts of a set, n images each; returns their pixels and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    random, parts = np.random.default_rng(0), []
    for part, count in zip(("train", "t10k"), n):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        answers = np.arange(count, dtype=np.uint8) % 10
        for name, values in (("images-idx3", pixels), ("labels-idx1", answers)):
            end, content = (".gz", gzip.compress(idx(values))) if packed else ("", idx(values))
            (folder / f"{part}-{name}-ubyte{end}").write_bytes(content)
        parts.append((torch.from_numpy(pixels), answers.tolist()))
    return parts


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("spec", "folder"), [
    ("fashion-mnist", "FashionMNIST/raw"), ("mnist", "MNIST/raw"), ("kmnist", "KMNIST/raw"),
    ("mnist", "."), ("fashion-mnist", "debian"),
])  # fmt: skip
def test_sets_in_mnists_format(spec, folder, packed, tmp_path, monkeypatch):
    """Packed or not; as torchvision lays them, in the folder itself, where Debian has them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
    debian = folder == "debian"
    parts = write_idx(tmp_path / folder / (spec if debian else ""), packed=packed)
    for train, (pixels, answers) in zip((True, False), parts):
        images = data.load(spec, root=None if debian else tmp_path, train=train)
        assert torch.equal(images.images, pixels[:, None]) and images.labels.tolist() == answers
        assert images.images.dtype == torch.uint8 and images.labels.dtype == torch.int64
        assert images.num_classes == 10 and images.name == spec and images.shape == (1, 28, 28)
    if debian:  # a folder that is given is where the files have to be
        with pytest.raises(FileNotFoundError, match="got none$"):
            data.load(spec, root=tmp_path, train=True)


def test_torchvision_reads_the_same(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    write_idx(tmp_path / "FashionMNIST/raw")
    theirs = datasets.FashionMNIST(tmp_path, train=False)
    ours = data.load("fashion-mnist", root=tmp_path, train=False)
    assert torch.equal(ours.images[:, 0], theirs.data)
    assert torch.equal(ours.labels, theirs.targets)


def test_set_in_mnists_format_is_fetched_where_it_is_missing(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    asked = []

    def fetch(root, download):
        asked.append((root, download))
        write_idx(root / "KMNIST/raw")

    monkeypatch.setattr(datasets, "KMNIST", fetch)
    for _ in "ab":
        assert len(data.load("kmnist", root=tmp_path, download=True, train=True)) == 6
    assert asked == [(tmp_path, True)]

    def offline(root, download):
        raise OSError("no")

    monkeypatch.setattr(datasets, "MNIST", offline)
    with pytest.raises(OSError, match="^data: expected to download mnist to .*, got no$"):
        data.load("mnist", root=tmp_path, download=True, train=True)


def test_missing_files_in_mnists_format(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN", tmp_path)
    monkeypatch.chdir(tmp_path)
    for spec, more in (("mnist", ""), ("fashion-mnist", ", or Debian's package dataset-fashion-m")):
        with pytest.raises(FileNotFoundError, match=f"^data: expected the files of {spec} in data/"
                           rf".*raw \(or leave to download them{more}.*got none$"):  # fmt: skip
            data.load(spec, train=True)


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("images-idx3", lambda raw: raw[:-1], "expected an idx file of bytes in 3 dim.* of 4719 b"),
        ("images-idx3", lambda raw: raw + b"0", "expected an idx file of bytes in 3 .* of 4721 b"),
        ("images-idx3", lambda raw: b"", "expected an idx file of bytes in 3 .* of 0 bytes"),
        ("images-idx3", lambda raw: raw[:2] + b"\x0d" + raw[3:], "expected an idx file of bytes"),
        ("labels-idx1", lambda raw: idx(np.zeros((6, 1), np.uint8)), "expected an idx .* in 1 dim"),
        ("labels-idx1", lambda raw: idx(np.zeros(5, np.uint8)), "expected 6 labels .* got 5 up to"),
        ("labels-idx1", lambda raw: idx(np.full(6, 10, np.uint8)), "expected 6 .* got 6 up to 10"),
        ("packed", lambda raw: gzip.compress(raw)[:-9], "expected a readable file, got .*gz .*"),
        ("packed", lambda raw: b"<html>", r"expected a readable file, got .*gz \(Not a gzipped"),
    ],
)
def test_damaged_files_in_mnists_format(name, change, text, tmp_path):
    write_idx(tmp_path, packed=name == "packed")
    name = "images-idx3" if name == "packed" else name
    (path,) = tmp_path.glob(f"train-{name}-ubyte*")
    raw = path.read_bytes()
    path.write_bytes(change(raw))
    with pytest.raises(OSError, match=f"^data: {text}"):
        data.load("mnist", root=tmp_path, train=True)


@pytest.mark.parametrize("spec", ["fashion-mnist", "mnist", "kmnist"])
def test_recipe_of_a_set_in_mnists_format_trains(spec, tmp_path):
    write_idx(tmp_path, n=(300, 20))
    config = TrainConfig(data=spec, data_root=str(tmp_path), epochs=1).resolve()
    assert (config.encoder, config.image_size, config.batch_size) == ("small", 28, 256)
    assert config.views == ("small" if spec == "fashion-mnist" else "affine")
    config = replace(config, checkpoint_dir=str(tmp_path / "runs"), batch_size=16, max_steps=2)
    assert Trainer(config, progress=False).run()["step"] == 2


@pytest.mark.parametrize(
    ("spec", "package"),
    [
        ("digits", "sklearn.datasets"),
        ("cifar10", "torchvision"),
        ("patches", "skimage"),
        ("svhn", "torchvision"),
    ],
)
def test_missing_package_names_the_extra(spec, package, monkeypatch):
    data._patches.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"data {spec}: expected .*directclr-fast\[train\]"):
        data.load(spec, train=True)


@pytest.mark.parametrize("spec", ["emnist", "folder", "folder:", "digits:8", ""])
def test_unknown_spec(spec):
    with pytest.raises(ValueError, match=f"data: expected one of digits, .* got '{spec}'"):
        data.load(spec, train=True)


@pytest.mark.parametrize("spec", ["fake:n=0", "fake:m=3", "fake:n", "fake:n=-1"])
def test_bad_fake(spec):
    with pytest.raises(ValueError, match=f"data: expected fake:key=number .* got '{spec}'"):
        data.load(spec, train=True)


# ---------------------------------------------------------------- folders


def save(path, mode="RGB", size=(40, 30), colour=None):
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.new(mode, size, colour if colour is not None else 0).save(path)


@pytest.fixture
def tree(tmp_path):
    """train: cat 3, dog 2; val: dog 1. Each image has a colour of its own."""
    for k, name in enumerate(
        ["cat/0.png", "cat/1.png", "cat/deep/2.png", "dog/3.png", "dog/4.PNG"]
    ):
        save(tmp_path / "train" / name, colour=(40 * k, 0, 255))
    save(tmp_path / "val/dog/5.png", colour=(200, 0, 255))
    (tmp_path / "train/dog/notes.txt").write_text("not an image")
    (tmp_path / "train/.hidden").mkdir()
    return tmp_path


def test_folder_with_train_and_val(tree):
    train, val = (data.load(f"folder:{tree}", train=t, image_size=28) for t in (True, False))
    assert len(train) == 5 and len(val) == 1 and train.num_classes == val.num_classes == 2
    assert train.shape == (3, 28, 28)
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and val.labels.tolist() == [1]
    images, labels, *_ = train.batch(torch.tensor([4, 2]))
    assert images.shape == (2, 3, 28, 28) and images.dtype == torch.uint8
    assert images[:, 0, 5, 5].tolist() == [160, 80] and labels.tolist() == [1, 0]
    assert data.load(f"folder:{tree}", train=True).size == 224


def test_folder_without_train_is_split_by_name(tmp_path):
    for k in range(13):
        save(tmp_path / f"a/{k:02}.png", size=(2, 2))
    save(tmp_path / "b/only.png", size=(2, 2))
    train, val = (data.load(f"folder:{tmp_path}", train=t) for t in (True, False))
    assert [p.decode()[-6:] for p in val.paths] == ["01.png", "11.png"]
    assert len(train) == 12 and not set(train.paths) & set(val.paths)
    assert train.labels.tolist() == [0] * 11 + [1]


def test_folder_errors(tmp_path):
    def refused(error, text):
        with pytest.raises(error, match=text):
            data.load(f"folder:{tmp_path}/set", train=False)

    refused(FileNotFoundError, "data: expected a folder of images, got no folder .*set$")
    (tmp_path / "set").mkdir()
    refused(FileNotFoundError, "data: expected validation images in .*set, got none$")
    (tmp_path / "set/cat").mkdir()
    refused(FileNotFoundError, r".* got none; left out: 1 folders without pictures \(cat\)$")
    (tmp_path / "set/train/cat").mkdir(parents=True)
    refused(FileNotFoundError, "data: expected the validation folder beside train, got no .*val")
    save(tmp_path / "set/train/cat/0.png")
    save(tmp_path / "set/val/cow/0.png")
    refused(ValueError, "data: expected the classes of .*train in .*val, got 'cow'")


@pytest.mark.parametrize(
    ("name", "mode", "colour", "want"),
    [
        ("grey.png", "L", 77, (77, 77, 77)),
        ("bits.png", "1", 1, (255, 255, 255)),
        ("alpha.png", "RGBA", (10, 20, 30, 0), (10, 20, 30)),
        ("grey_alpha.png", "LA", (50, 9), (50, 50, 50)),
        ("deep.png", "I;16", 0x4D21, (0x4D, 0x4D, 0x4D)),
        ("deep.tif", "I;16", 0xFF21, (255, 255, 255)),
        ("cmyk.jpg", "CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("grey.jpg", "L", 77, (77, 77, 77)),
        ("colour.jpg", "RGB", (200, 100, 50), (200, 100, 50)),
        ("palette.gif", "P", 0, (0, 0, 0)),
    ],
)
def test_every_kind_of_file_becomes_rgb(name, mode, colour, want, tmp_path):
    save(tmp_path / name, mode, colour=colour)
    got = folder.decode(tmp_path / name, 16)
    assert got.shape == (3, 16, 16) and got.dtype == torch.uint8 and got.is_contiguous()
    assert (got.int() - torch.tensor(want)[:, None, None]).abs().max() <= 2  # JPEG is lossy


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_decode_cuts_the_centre(suffix, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128, 1] = 255  # the middle third is green
    image.fromarray(pixels).save(tmp_path / f"x.{suffix}", **{"quality": 95})
    got = folder.decode(tmp_path / f"x.{suffix}", 16)
    assert got[1, :, 1:-1].min() > 240 and got[[0, 2], :, 1:-1].max() < 15


def test_unreadable_file_is_named(tree):
    bad = tree / "train/cat/1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    images = data.load(f"folder:{tree}", train=True, image_size=28)
    with pytest.raises(OSError, match=r"image: expected a readable picture, got .*cat/1\.png"):
        images.batch(torch.arange(5))
    batches = data.Batches(images, data.EpochSampler(5, 5), num_workers=1)
    # The sentence alone, not the worker's traceback around it.
    with pytest.raises(
        OSError, match=r"^image: expected .*cat/1\.png.*\); --skip-unreadable goes on without it$"
    ):
        list(batches)


# ---------------------------------------------------------------- sampler


def test_order_depends_on_seed_and_epoch_alone():
    a, b = data.EpochSampler(100, 7, seed=3), data.EpochSampler(100, 9, seed=3)
    assert torch.equal(a.order(4), b.order(4))
    assert a.order(4).sort().values.equal(torch.arange(100))
    others = [a.order(5), a.order(3), data.EpochSampler(100, 7, seed=4).order(3)]
    assert all(not torch.equal(a.order(4), o) for o in others)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    list(a)
    assert torch.equal(torch.get_rng_state(), state)


def test_epoch_is_the_permutation_in_pieces():
    sampler = data.EpochSampler(100, 32)
    batches = list(sampler)
    assert [len(b) for b in batches] == [32] * 3 and len(sampler) == 3
    assert torch.equal(torch.cat(batches), sampler.order(0)[:96])
    assert sampler.position == 0  # reading ahead moves nothing


def test_sampler_resumes_at_the_exact_batch():
    one, two = (data.EpochSampler(50, 8, seed=1) for _ in "ab")
    one.next_epoch()
    one.position = 4
    two.load_state_dict(pickle.loads(pickle.dumps(one.state_dict())))
    rest = list(two)
    whole = one.order(1).split(8)
    assert len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[4:6], strict=True))
    two.next_epoch()
    assert (two.epoch, two.position) == (2, 0)
    assert torch.equal(next(iter(two)), one.order(2)[:8])


@pytest.mark.parametrize(
    ("changed", "said"),
    [(dict(n=51), "images"), (dict(batch_size=4), "batch size"), (dict(seed=2), "seed")],
)
def test_sampler_refuses_the_place_of_another_order(changed, said):
    state = data.EpochSampler(50, 8, seed=1).state_dict()
    other = data.EpochSampler(**{"n": 50, "batch_size": 8, "seed": 1, **changed})
    with pytest.raises(ValueError, match=f"^{said}: expected .* as in the checkpoint, got"):
        other.load_state_dict(state)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_process_sees(world):
    args = (50, 8, 3)
    whole = list(data.EpochSampler(*args))
    parts = [list(data.EpochSampler(*args, rank=r, world_size=world)) for r in range(world)]
    assert len(whole) == 6
    for k, batch in enumerate(whole):
        assert torch.equal(torch.cat([p[k] for p in parts]), batch)
        assert {len(p[k]) for p in parts} <= {len(batch) // world, -(-len(batch) // world)}


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            dict(n=1297, batch_size=4096, what="training images of digits"),
            r"^batch size: expected at most 1297 \(the training images of digits\), got 4096$",
        ),
        (dict(n=10, batch_size=2, world_size=3), "expected at least the 3 ranks, got 2"),
    ],
)
def test_sampler_errors(args, text):
    with pytest.raises(ValueError, match=text):
        data.EpochSampler(**args)


# ---------------------------------------------------------------- batches


def test_batches_hold_the_sampled_images_and_leave_the_random_state_alone():
    images = data.load("fake:n=20,size=4", train=True)
    batches = data.Batches(images, data.EpochSampler(20, 6), num_workers=3)
    assert len(batches.loader) == 3 and batches.loader.num_workers == 0
    state = torch.get_rng_state()
    order = batches.sampler.order(0)
    for k, (x, y, i) in enumerate(batches):
        assert torch.equal(i, order[6 * k : 6 * k + 6])
        assert torch.equal(x, images.images[i]) and torch.equal(y, images.labels[i])
        assert (batches.sampler.epoch, batches.sampler.position) == (0, k + 1)
    assert (batches.sampler.epoch, batches.sampler.position) == (1, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(next(iter(batches))[2], batches.sampler.order(1)[:6])


def run(batches, steps):
    """The next batches, whatever the epoch, each with the state a checkpoint then would hold."""
    out = []
    while True:
        for _, _, indices in batches:
            out.append((indices.tolist(), batches.sampler.state_dict()))
            if len(out) == steps:
                return out


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_resume_at_the_next_batch(workers, tree):
    images = data.load(f"folder:{tree}", train=True, image_size=28)

    def fresh():
        return data.Batches(images, data.EpochSampler(5, 2), num_workers=workers)

    whole = run(fresh(), 6)
    for k in (0, 1, 4) if workers == 0 else (2,):
        resumed = fresh()
        resumed.sampler.load_state_dict(whole[k][1])
        assert run(resumed, 5 - k) == whole[k + 1 :]


def test_workers_decode_the_same_images(tree):
    images = data.load(f"folder:{tree}", train=True, image_size=28)
    here, there = (
        list(data.Batches(images, data.EpochSampler(5, 2), num_workers=w)) for w in (0, 2)
    )
    assert len(here) == 2
    for a, b in zip(here, there, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_in_order_gives_the_whole_set_once(workers, tree):
    for spec in (f"folder:{tree}", "fake:n=5,size=4"):
        images = data.load(spec, train=True, image_size=28)
        x, y, i = map(torch.cat, zip(*data.in_order(images, 2, "cpu", workers), strict=True))
        assert torch.equal(i, torch.arange(5)) and torch.equal(y, images.labels)
        assert torch.equal(x, images.batch(i)[0])
    (tree / "train/dog/3.png").write_bytes(b"")
    with pytest.raises(OSError, match=r"^image: expected .*3\.png.*\); --skip-unr.* without it$"):
        list(data.in_order(data.load(f"folder:{tree}", train=True), 2, "cpu", workers))


def test_state_at_the_last_batch_ends_its_epoch():
    batches = data.Batches(data.load("fake:n=4,size=2", train=True), data.EpochSampler(4, 2))
    state = run(batches, 2)[-1][1]
    assert (state["epoch"], state["position"]) == (0, 2)
    batches.sampler.load_state_dict(state)
    assert list(batches) == [] and batches.sampler.epoch == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("resident", [False, True])
def test_batches_on_cuda(resident):
    images = data.load("fake:n=20,size=4", train=True)
    there = images.to("cuda") if resident else images
    for x, y, i in data.Batches(there, data.EpochSampler(20, 6), "cuda"):
        assert x.is_cuda and torch.equal(x.cpu(), images.images[i])
        assert torch.equal(y.cpu(), images.labels[i])
