"""Images as uint8 batches: the sets, the order in which they are drawn, and the loader.

| spec | images | where from |
|---|---|---|
| digits | 1,297 + 500 grey 8x8 | scikit-learn's handwritten digits, no download |
| patches | 5,120 + 1,280 grey 32x32 of 16 photographs, the classes | scikit-image, no download |
| cifar10, cifar100 | 50,000 + 10,000 RGB 32x32 | torchvision, in `root` |
| stl10 | 105,000 (5,000 of them labelled) + 8,000 RGB 96x96 | torchvision, in `root` |
| svhn | 73,257 + 26,032 RGB 32x32 | torchvision, in `root` |
| fashion-mnist | 60,000 + 10,000 grey 28x28 | `root`, or Debian's dataset-fashion-mnist |
| mnist, kmnist | 60,000 + 10,000 grey 28x28 | `root` |
| folder:PATH | pictures, with classes or without (folder.py) | decoded by workers |
| fake | random classes under noise, `fake:n=1024,classes=10,size=32,channels=3` | the seed |

Views are made of whole batches on the device (views.py); of a folder's pictures, which differ in
size, workers cut out the two pieces that the views see. An unlabelled image has label -1, as in a
folder without classes, and in the training part of stl10 beyond its labelled 5,000.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..machine import needs
from . import folder, views
from .config import SETS
from .folder import FolderSet


@dataclass(frozen=True)
class ImageSet:
    """A set held in memory: images uint8 (n, C, H, W), labels int64 (n,), -1 where unknown."""

    images: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    num_classes: int
    name: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return tuple(self.images.shape[1:])

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 (B, C, H, W) and int64 (B,), on this set's device, of ``indices`` int64 (B,)."""
        here = torch.as_tensor(indices, device=self.images.device)
        return self.images[here], self.labels[here], indices

    __getitems__ = batch

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on a device: its batches are made there, without a copy from the host."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def fingerprint(self) -> str:
        """Of the labels and some of the images."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        for values in (self.labels, self.images[:: -(-len(self) // folder.SIZED)]):
            digest.update(values.cpu().contiguous().numpy())
        return digest.hexdigest()


def load(
    spec: str,
    *,
    root: str | Path | None = None,
    download: bool = False,
    train: bool,
    image_size: int | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
) -> ImageSet | FolderSet:
    """The training part (train=True) or the held-out part of the set that `spec` names.

    root: folder of the torchvision sets, "data" if None; fetched into only if `download`. Of
    fashion-mnist, mnist and kmnist it may also hold the files themselves, packed (.gz) or not.
    image_size: side of the training crop in pixels: of what a folder gives (224 if None); fake
    makes images of it; the others keep their own size.
    seed: of fake; the split of the others never changes. A folder without train and val folders is
    split by name: of each class, the 2nd, 12th, 22nd ... file is held out.
    skip_unreadable: files of a folder that cannot be read are left out rather than raise.

    ValueError for an unknown spec, FileNotFoundError for missing or empty folders, ImportError for
    a missing package, OSError for a failed download or a damaged file.
    """
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        return _digits(train)
    if spec == "patches":
        return _patches(train)
    if spec in IDX:
        return _idx(spec, root, download, train)
    if spec in ("cifar10", "cifar100", *SPLITS):
        return _torchvision(spec, Path("data" if root is None else root), download, train)
    if kind == "folder" and rest:
        return folder.load(Path(rest).expanduser(), train, image_size or 224, skip_unreadable)
    if kind == "fake":
        return _fake(spec, rest, train, image_size, seed)
    raise ValueError(f"data: expected one of {', '.join(SETS)}, got {spec!r}")


def identity(dataset: ImageSet | FolderSet) -> dict:
    """What a set is, wherever it lies, in plain values: for `check_same`."""
    classes = list(dataset.classes) if isinstance(dataset, FolderSet) else dataset.num_classes
    return {"images": len(dataset), "classes": classes, "fingerprint": dataset.fingerprint()}


def check_same(saved: dict, here: dict, spec: str) -> None:
    """ValueError where `here`, the `identity` of the set `spec`, is not that a run began with."""
    if isinstance(saved["classes"], list) and isinstance(here["classes"], list):
        old, new = set(saved["classes"]), set(here["classes"])
        changes = [f"without {name!r}" for name in sorted(old - new)]
        changes += [f"with {name!r}" for name in sorted(new - old)]
        if changes:
            expected = f"the {len(old)} classes that the run began with"
            raise ValueError(
                f"data: expected {expected}, got those in {spec}: {changes[0]}"
                + (f", and {len(changes) - 1} more changes" if changes[1:] else "")
            )
    if saved != here:
        same = saved["images"] == here["images"]
        got = "others (in name, number of bytes or order)" if same else here["images"]
        expected = f"the {saved['images']} training images that the run began with"
        raise ValueError(f"data: expected {expected}, got {got} in {spec}")


def _digits(train: bool) -> ImageSet:
    with needs("data digits", "scikit-learn"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=500, stratify=labels, random_state=0)
    part = np.sort(parts[0] if train else parts[1])
    images = np.rint(images[part] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels[part]).long(), 10, "digits")


# The photographs inside scikit-image's wheel, which fetches others on demand; sides of 300 to 1411
# pixels. Left out: drawings, text, test charts, faces of 25 pixels, the motorcycle's second view.
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png",
    "coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
    "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
)  # fmt: skip
PATCH = 32  # pixels
CELLS = 5  # a photograph is cut into CELLS x CELLS cells
MARGIN = 4  # pixels between patches of different parts, at least
PATCHES = {"train": 256, "validation": 64, "test": 80}  # of each photograph


@functools.lru_cache(maxsize=2)  # one second, for which a comparison of many runs would ask often
def _patches(train: bool) -> ImageSet:
    """Squares of 32 pixels of 16 photographs at their own resolution; the class is the photograph.

    Grey, because half of the photographs are: colour would tell them apart for free. Cell (i, j) of
    the 5 x 5 cells of a photograph belongs to fold (i + 2 j) mod 5, which puts every fold once into
    each row and column. Test patches lie inside a cell of fold 0. Training patches keep 4 pixels
    away from those cells: of each class first 256 that also keep away from fold 1, then 64 inside a
    cell of fold 1, so that the last fifth of each class can be held out from the rest. Places are
    drawn by a fixed seed and overlap within a part.
    """
    with needs("data patches", "scikit-image"):
        import skimage
        from PIL import Image
    folder = Path(skimage.__file__).parent / "data"
    images, labels = [], []
    for label, name in enumerate(PHOTOGRAPHS):
        try:
            with Image.open(folder / name) as image:
                pixels = np.asarray(image.convert("L"))
        except OSError as error:
            raise FileNotFoundError(
                f"data: expected the photograph {name} in {folder}, got {error}"
            ) from error
        random = np.random.RandomState(label)  # its stream is fixed for good, unlike Generator's
        for part, allowed in _patch_places(*pixels.shape).items():
            places = random.permutation(np.flatnonzero(allowed))[: PATCHES[part]]
            if train == (part != "test"):
                windows = np.lib.stride_tricks.sliding_window_view(pixels, (PATCH, PATCH))
                images.append(windows[np.unravel_index(places, allowed.shape)])
                labels += [label] * len(places)
    images = torch.from_numpy(np.concatenate(images))[:, None]
    return ImageSet(images, torch.tensor(labels), len(PHOTOGRAPHS), "patches")


def _patch_places(height: int, width: int) -> dict[str, np.ndarray]:
    """Where the top left corner of a patch may be: bool (height - 31, width - 31) for each part."""
    rows, cols = (np.arange(n) * CELLS // n for n in (height, width))
    fold = (rows[:, None] + 2 * cols) % CELLS

    def holds(of: np.ndarray, margin: int = 0) -> np.ndarray:
        """Whether the patch at a place, `margin` wider on each side, holds a pixel that is true."""
        side = PATCH + 2 * margin
        there = F.pad(torch.from_numpy(of)[None].float(), (margin,) * 4)
        return (F.max_pool2d(F.max_pool2d(there, (side, 1), 1), (1, side), 1)[0] > 0).numpy()

    test, validation = fold == 0, fold == 1
    away = ~holds(test, MARGIN)
    return {
        "train": away & ~holds(validation, MARGIN),
        "validation": away & ~holds(~validation),
        "test": ~holds(~test),
    }


SPLITS = {"stl10": ("train+unlabeled", "test"), "svhn": ("train", "test")}


def _torchvision(spec: str, root: Path, download: bool, train: bool) -> ImageSet:
    datasets = _datasets(spec)
    if not download and not root.is_dir():
        raise FileNotFoundError(f"data: expected the folder of {spec}, got no folder {root}")
    part = {"split": SPLITS[spec][0 if train else 1]} if spec in SPLITS else {"train": train}
    try:
        with needs(f"data {spec}", "scipy"):
            source = getattr(datasets, spec.upper())(root, download=download, **part)
    except (RuntimeError, OSError) as error:
        if download:
            raise _not_fetched(spec, root, error) from error
        raise FileNotFoundError(
            f"data: expected the files of {spec} in {root} (or leave to download them), "
            "got none or damaged ones"
        ) from error
    cifar = spec not in SPLITS
    images = np.ascontiguousarray(source.data.transpose(0, 3, 1, 2) if cifar else source.data)
    labels = torch.as_tensor(np.asarray(source.targets if cifar else source.labels)).long()
    classes = len(source.classes) if cifar else 10
    return ImageSet(torch.from_numpy(images), labels, classes, spec)


def _datasets(spec: str):
    with needs(f"data {spec}", "torchvision"):
        from torchvision import datasets
    return datasets


def _not_fetched(spec: str, root: Path, error: Exception) -> OSError:
    return OSError(f"data: expected to download {spec} to {root}, got {error}")


IDX = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST", "kmnist": "KMNIST"}  # torchvision's names
DEBIAN = Path("/usr/share/datasets")  # of packages; dataset-fashion-mnist is one of them


def _idx(spec: str, root: str | Path | None, download: bool, train: bool) -> ImageSet:
    """A set in MNIST's format. torchvision only downloads it: it reads no packed files, as Debian
    has them, and says nothing of damaged ones."""
    base = Path("data" if root is None else root)
    folders = [base / IDX[spec] / "raw", base, *[DEBIAN / spec] * (root is None)]
    part = "train" if train else "t10k"

    def files() -> list[Path]:
        names = (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte")
        packed = [[f / f"{n}{end}" for n in names] for f in folders for end in ("", ".gz")]
        return next((pair for pair in packed if all(p.is_file() for p in pair)), [])

    if not files() and download:
        try:
            getattr(_datasets(spec), IDX[spec])(base, download=True)
        except (RuntimeError, OSError) as error:
            raise _not_fetched(spec, base, error) from error
    if not files():
        package = ", or Debian's package dataset-fashion-mnist" if spec == "fashion-mnist" else ""
        raise FileNotFoundError(
            f"data: expected the files of {spec} in {folders[0]} (or leave to download them"
            f"{package}), got none"
        )
    pictures, answers = files()
    images, labels = _read_idx(pictures, 3), _read_idx(answers, 1).long()
    if len(labels) != len(images) or (labels >= 10).any():
        expected = f"{len(images)} labels from 0 to 9, one for each image"
        largest = labels.max().item() if len(labels) else None
        got = f"{len(labels)} up to {largest}"
        raise OSError(f"data: expected {expected}, got {got} in {answers}")
    return ImageSet(images[:, None], labels, 10, spec)


def _read_idx(path: Path, dimensions: int) -> Tensor:
    """A file in MNIST's format, packed or not, as uint8 of so many dimensions: two zeros, 8 for
    bytes, the number of dimensions, each size in four bytes, the values."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise OSError(f"data: expected a readable file, got {path} ({error})") from error
    head = 4 + 4 * dimensions
    sizes = [int.from_bytes(raw[k : k + 4], "big") for k in range(4, head, 4)]
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) != head + math.prod(sizes):
        expected = f"an idx file of bytes in {dimensions} dimensions, whole"
        raise OSError(f"data: expected {expected}, got {path} of {len(raw)} bytes")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=head).view(sizes)


def _fake(spec: str, rest: str, train: bool, image_size: int | None, seed: int) -> ImageSet:
    option = {"n": 1024, "classes": 10, "size": image_size or 32, "channels": 3}
    for word in filter(None, rest.split(",")):
        key, _, value = word.partition("=")
        if key not in option or not value.isdecimal() or int(value) < 1:
            expected = f"fake:key=number with keys {', '.join(option)}"
            raise ValueError(f"data: expected {expected}, got {spec!r}")
        option[key] = int(value)
    n, classes, size, channels = option.values()
    common = torch.Generator().manual_seed(seed)  # the classes look alike in both parts
    coarse = torch.rand(classes, channels, 3, 3, generator=common)
    smooth = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
    own = torch.Generator().manual_seed(_mix(seed, int(train)))
    labels = torch.randint(classes, (n,), generator=own)
    images = torch.randint(128, (n, channels, size, size), generator=own, dtype=torch.uint8)
    images += (smooth * 127).to(torch.uint8)[labels]
    return ImageSet(images, labels, classes, "fake")


# ---------------------------------------------------------------- order and loader


def _mix(*numbers: int) -> int:
    """One 64-bit seed from several whole numbers; (1, 2) and (2, 1) give unrelated ones."""
    words = [number % 2**64 for number in numbers]  # SeedSequence takes no negative ones
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


class EpochSampler:
    """Shuffled batches of indices; the order is a function of (seed, epoch) alone.

    n, batch_size: images of the set and of a batch, the latter over all ranks together. Rank r of W
    takes the r-th of W contiguous parts of every batch, as equal as can be (`share`), so that W
    ranks together see what one process would, and a run may go on with another W.
    Images that do not fill the last batch are left out; they change with the epoch. `what` names
    the images in the error: ValueError if a batch holds more than the set, or fewer than the ranks.

    Iterating gives this rank's share of the epoch's batches, int64 (b,), from `position` to its end
    and moves nothing, so that workers may read ahead: whoever trains moves `position`, and calls
    `next_epoch` at the end (see Batches). With `boxes` each comes with numbers (b, 2, NUMBERS) that
    place the boxes of the views, a function of seed, epoch and batch.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        what: str = "images",
    ):
        if batch_size > n:
            raise ValueError(f"batch size: expected at most {n} (the {what}), got {batch_size}")
        if batch_size < world_size:
            expected = f"at least the {world_size} ranks"
            raise ValueError(f"batch size: expected {expected}, got {batch_size}")
        self.n, self.batch_size, self.seed, self.what = n, batch_size, seed, what
        self.rank, self.world_size, self.boxes = rank, world_size, False
        self.epoch = self.position = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.n // self.batch_size

    def order(self, epoch: int) -> Tensor:
        """The permutation of an epoch, int64 (n,), the same on every rank."""
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
        return torch.randperm(self.n, generator=generator)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        batches = self.order(self.epoch).split(self.batch_size)[: len(self)]
        own, epoch = self.share(self.batch_size), self.epoch
        for position, batch in enumerate(batches[self.position :], self.position):
            if not self.boxes:
                yield batch[own]
                continue
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch, position))
            numbers = torch.rand(self.batch_size, 2, views.NUMBERS, generator=generator)
            yield batch[own], numbers[own]

    def share(self, n: int) -> slice:
        """Which of the n images of a batch are this rank's."""
        return slice(*(n * r // self.world_size for r in (self.rank, self.rank + 1)))

    def next_epoch(self) -> None:
        """To the first batch of the next epoch."""
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stands, and what the order depends on."""
        keys = ("epoch", "position", "n", "batch_size", "seed")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """To the place that was saved. ValueError if the order there was another one."""
        for key, said in (("n", self.what), ("batch_size", "batch size"), ("seed", "seed")):
            if state[key] != getattr(self, key):
                expected = f"{state[key]} as in the checkpoint"
                raise ValueError(f"{said}: expected {expected}, got {getattr(self, key)}")
        self.epoch, self.position = state["epoch"], state["position"]


def _as_is(batch):
    return batch


def _loader(
    dataset: ImageSet | FolderSet, batches: Iterable[Tensor], device: torch.device, workers: int
) -> DataLoader:
    workers = workers if isinstance(dataset, FolderSet) else 0
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=_as_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda" and not dataset.labels.is_cuda,
        generator=torch.Generator(),  # the loader draws a seed even where nobody uses it
    )


def _read(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in loader:
        if isinstance(batch, str):
            raise OSError(batch)
        images, labels, indices, *failed = batch
        for reasons in failed:
            loader.dataset.failed.update(reasons)
        if not len(images):  # none of them could be read
            continue
        images = images.to(device, non_blocking=True)
        yield images, labels.to(device, non_blocking=True), indices


def in_order(
    dataset: ImageSet | FolderSet,
    batch_size: int,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The whole set once, in its own order, in batches as Batches gives them; for evaluation. Files
    that may be left out are, with their labels."""
    if isinstance(dataset, FolderSet) and dataset.skip:
        dataset = replace(dataset, skip="drop")
    device = torch.device(device)
    batches = torch.arange(len(dataset)).split(batch_size)
    return _read(_loader(dataset, batches, device, num_workers), device)


class Batches:
    """The rest of the current epoch as (images uint8 (B, C, H, W), labels (B,), indices (B,)); of a
    FolderSet with `crops` images are (B, 2, C, S, S), each view's piece of each picture.

    Images and labels are on `device`, indices on the host. The sampler's position counts the
    batches handed out: saved while batch k is being trained on, after its optimiser step, a resumed
    run continues with batch k + 1. The epoch ends when the loop does, so a state saved at the last
    batch resumes at the end of its epoch.

    num_workers: processes that decode a FolderSet; a set in memory uses none. On CUDA batches are
    pinned and copied asynchronously; `dataset.to(device)` saves the copy. The global random state
    is left alone.
    """

    def __init__(
        self,
        dataset: ImageSet | FolderSet,
        sampler: EpochSampler,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
    ):
        self.sampler, self.device = sampler, torch.device(device)
        sampler.boxes = getattr(dataset, "crops", None) is not None
        self.loader = _loader(dataset, sampler, self.device, num_workers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in _read(self.loader, self.device):
            self.sampler.position += 1
            yield batch
        self.sampler.next_epoch()
