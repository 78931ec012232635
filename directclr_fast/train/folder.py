"""Pictures in folders: which files are taken, what is left out and why, how one is decoded.

PATH/train/<class>/* and PATH/val/<class>/*, or PATH/<class>/*; without classes PATH/train/* and
PATH/val/*, or PATH/*. Taken are the files with a known suffix, of sub-folders too. Left out, and
counted by the reason: what is hidden, other suffixes, folders without a picture, what this tool
wrote there, broken links, and links to folders that lead back into the data or were followed
already. A link to a file, and one to a folder elsewhere, is what it leads to.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..machine import needs
from . import views

SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".jp2", ".avif",
}  # fmt: skip
OUTPUTS = ({"config.json", "log.jsonl"}, {"results.json", "report.md"})  # of train, of compare
RETRIES = 100  # files in a row that may be damaged; a disk that is gone is something else
NAMED = 3  # how many of each kind that is left out are named
SIZED = 1000  # how many files show that a set is the same: all by name, these by size too


@dataclass(frozen=True)
class FolderSet:
    """Files decoded when asked for: `size` pixels square, RGB. Otherwise as ImageSet.

    crops: scale and ratio of the boxes that views cut out of a picture, for `Batches`; without,
    every picture is what an evaluation sees (`decode`). `paths` are bytes in one array, not a list
    of objects, so that worker processes share its memory. Without `classes` every label is -1.

    left_out: {why: {"count": how many, "such as": the first of them}}.
    skip: what becomes of a file that cannot be read: None ends the run, "replace" takes the next
    one that can, which depends on nothing but the files, "drop" leaves the batch shorter. `failed`
    has the reason of each, by path, in the process that trains.
    """

    paths: np.ndarray = field(repr=False)
    labels: Tensor = field(repr=False)
    classes: tuple[str, ...]
    name: str
    size: int
    base: str  # the folder of the files
    left_out: dict[str, dict] = field(default_factory=dict)
    skip: str | None = None
    failed: dict[str, str] = field(default_factory=dict)
    crops: tuple | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return 3, self.size, self.size

    def batch(
        self, indices: Tensor, numbers: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, str]]:
        """Images uint8 (B, 3, size, size), labels and indices int64 (B,) of what was read, and why
        the others were not. With numbers (B, V, NUMBERS), of the boxes, images are (B, V, 3, size,
        size). OSError names the file that cannot be read."""
        images, read, failed = [], [], {}
        for row, i in enumerate(torch.as_tensor(indices).tolist()):
            tries = min(RETRIES, len(self)) if self.skip == "replace" else 1
            for k in (j % len(self) for j in range(i, i + tries)):
                path = os.fsdecode(self.paths[k])
                try:
                    if numbers is None:
                        images.append(decode(path, self.size))
                    else:
                        images.append(cut(path, self.size, numbers[row], self.crops))
                    read.append(k)
                    break
                except OSError as error:
                    if self.skip is None:
                        raise OSError(f"{error}; --skip-unreadable goes on without it") from error
                    failed[path] = str(error.__cause__)
            else:
                if self.skip == "replace":
                    got = f"none up to {path} ({failed[path]})"
                    raise OSError(f"data: expected a picture to read among {tries}, got {got}")
        if images:  # as they are in memory: one copy of whole pictures
            images = torch.stack([x.movedim(-3, -1) for x in images]).movedim(-1, -3)
        else:
            images = torch.empty(0, *self.shape, dtype=torch.uint8)
        read = torch.tensor(read, dtype=torch.int64)
        return images, self.labels[read], read, failed

    def __getitems__(
        self, asked: Tensor | tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, dict] | str:
        # An exception leaves a worker buried in that worker's traceback; Batches raises the text.
        try:
            return self.batch(*asked) if isinstance(asked, tuple) else self.batch(asked)
        except OSError as error:
            return str(error)

    def fingerprint(self) -> str:
        """Of the files' places below `base` and the sizes of some: the same wherever they lie."""
        digest, start = hashlib.sha256(), len(os.fsencode(self.base)) + 1
        for path in self.paths:
            digest.update(path[start:] + b"\0")
        for path in self.paths[:: -(-len(self) // SIZED)]:
            digest.update(b"%d " % os.stat(path).st_size)
        return digest.hexdigest()

    def said(self) -> str:
        """How many files are taken, how many not, and why, in one line."""
        of = f"of {self.num_classes} classes" if self.classes else "without classes"
        text = f"{len(self)} pictures {of} in {self.base}"
        return text + (f"; left out: {_said(self.left_out)}" if self.left_out else "")


def decode(path: str | Path, size: int) -> Tensor:
    """A picture file as uint8 (3, size, size) RGB as an evaluation sees it: the short side resized
    to 8/7 of `size` (224 of 256), bilinear, and the centre cut out, as torchvision does.

    Grey, palette and CMYK become RGB; transparency is dropped; an orientation in EXIF is not
    applied, as torchvision does not either. Grey of more than 8 bits: see `_eight_bits`. OSError if
    it cannot be read.
    """

    def boxes(w: int, h: int) -> list[tuple]:
        side, short = round(size * 8 / 7), min(w, h)
        box = []
        for whole in (w, h):
            new = side * whole // short
            start = round((new - size) / 2)
            box.append((start * whole / new, (start + size) * whole / new))
        return [(box[0][0], box[1][0], box[0][1], box[1][1])]

    return _resized(path, size, boxes, "BILINEAR")[0].contiguous()


def cut(path: str | Path, size: int, numbers: Tensor, crops: tuple) -> Tensor:
    """Pieces (V, 3, size, size) uint8 of a picture file: boxes of the whole picture, placed by
    numbers (V, NUMBERS) with the scale and ratio `crops`, resized, bicubic. Otherwise as `decode`.
    """

    def boxes(w: int, h: int) -> list[tuple]:
        placed = [views.place_one(row, h, w, *crops) for row in numbers.tolist()]
        return [(left, top, left + width, top + height) for top, left, height, width in placed]

    return _resized(path, size, boxes, "BICUBIC")


def _resized(
    path: str | Path, size: int, boxes: Callable[[int, int], list[tuple]], filter: str
) -> Tensor:
    """Each of `boxes(width, height)`: left, top, right, bottom in pixels, together (V, 3, size,
    size), in memory as pictures are, (V, size, size, 3).

    Where every box has twice the pixels that are wanted, or more, a JPEG is decoded to a half, a
    quarter or an eighth: the result is off by half a level of 255 on average (test_crops.py). A box
    of whole pixels is cut out first, so that the filter sees nothing beyond it, and resized by
    PyTorch, as torchvision does with a tensor.
    """
    from PIL import Image

    resample = Image.Resampling[filter]
    try:
        with warnings.catch_warnings():
            # Pillow warns of half the size that it refuses.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            placed, (w, h) = boxes(*image.size), image.size
            least = min(min(x1 - x0, y1 - y0) for x0, y0, x1, y1 in placed)
            times = next((k for k in (8, 4, 2) if least >= k * size), 1)
            if times > 1:  # JPEG decodes straight to a half, quarter or eighth
                image.draft("RGB", (w // times, h // times))
            times = times if image.size != (w, h) else 1
            if image.mode == "F" or image.mode.startswith("I"):
                image = Image.fromarray(_eight_bits(np.asarray(image)))
            if times == 1 and all(isinstance(side, int) for box in placed for side in box):
                # A batch of one in channels_last: PyTorch's fast path.
                pixels, how = _pixels(image)[None].permute(0, 3, 1, 2), resample.name.lower()
                cuts = [pixels[..., y0:y1, x0:x1] for x0, y0, x1, y1 in placed]
                to = {"size": (size, size), "mode": how, "antialias": True}
                return torch.cat([F.interpolate(piece, **to) for piece in cuts])
            image = image.convert("RGB")
        pieces = []
        for box in placed:
            ends = (image.width, image.height) * 2
            box = [min(side / times, end) for side, end in zip(box, ends)]
            piece = image.resize((size, size), resample, box=box)
            pieces.append(torch.from_numpy(np.array(piece)))
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise OSError(f"image: expected a readable picture, got {path} ({error})") from error
    return torch.stack(pieces).permute(0, 3, 1, 2)


def _pixels(image) -> Tensor:
    """An opened Pillow image as uint8 (H, W, 3) RGB; a JPEG by torchvision, which has the same
    library without Pillow's copies."""
    if image.format == "JPEG" and image.mode in ("L", "RGB"):
        try:
            from torchvision.io import ImageReadMode, decode_jpeg

            image.fp.seek(0)
            raw = torch.frombuffer(bytearray(image.fp.read()), dtype=torch.uint8)
            with warnings.catch_warnings():
                # A later torchvision will be without it.
                warnings.simplefilter("ignore", DeprecationWarning)
                return decode_jpeg(raw, ImageReadMode.RGB).permute(1, 2, 0)
        except (ImportError, RuntimeError):  # Pillow says what is wrong with the file
            image.fp.seek(0)
    return torch.from_numpy(np.array(image.convert("RGB")))


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Whole or floating numbers as uint8: from 0 to the least of 255, 4095 and 65535, or of 1.0 and
    255.0, that the brightest pixel does not exceed; beyond those, from the darkest to the
    brightest. (Pillow's own conversion clips at 255.)"""
    whole = pixels.dtype.kind in "iu"
    if not (whole or np.isfinite(pixels).all()):
        raise ValueError("expected finite pixels, got nan or inf")
    low, high = pixels.min(), pixels.max()
    top = next((t for t in ((255, 4095, 65535) if whole else (1.0, 255.0)) if high <= t), None)
    if low < 0 or top is None:
        pixels = (pixels.astype(np.float64) - low) * (255 / max(float(high) - float(low), 1e-300))
    elif whole:
        pixels = pixels >> (top.bit_length() - 8)
    else:
        pixels = pixels * (255 / top)
    return np.rint(pixels).astype(np.uint8)


def said_unreadable(failed: dict[str, str]) -> str:
    """How many files could not be read, and the first of them with their reasons."""
    first = [f"{path} ({reason})" for path, reason in [*failed.items()][:NAMED]]
    more = ", ..." if len(failed) > NAMED else ""
    return f"data: left out {len(failed)} unreadable pictures: {', '.join(first)}{more}"


def _said(left_out: dict[str, dict]) -> str:
    def one(why: str, what: dict) -> str:
        more = ", ..." if what["count"] > len(what["such as"]) else ""
        return f"{what['count']} {why} ({', '.join(what['such as'])}{more})"

    return "; ".join(one(*entry) for entry in left_out.items())


def _within(path: str, folder: str) -> bool:
    return os.path.join(path, "").startswith(os.path.join(folder, ""))


class _Walk:
    """Pictures below `base`, and `left_out` as FolderSet has it. Every folder is read once."""

    def __init__(self, base: Path) -> None:
        self.base, self.real = os.fspath(base), os.path.realpath(base)
        self.left_out: dict[str, dict] = {}
        self.roots = {self.real}  # where the data lie, links followed
        self.top, self.classes = [], {}
        for entry in self._entries(self.base):
            link = entry.is_symlink()
            if not (os.path.isdir(entry.path) if link else entry.is_dir()):
                self.top.append(entry)
            elif not link or self._follows(entry):
                self.classes[entry.name] = entry.path

    def leave(self, why: str, path: str) -> None:
        what = self.left_out.setdefault(why, {"count": 0, "such as": []})
        what["count"] += 1
        if what["count"] <= NAMED:
            what["such as"].append(os.path.relpath(path, self.base))

    def _entries(self, folder: str) -> list[os.DirEntry]:
        """What is in a folder but what is hidden, by name; nothing of what this tool wrote."""
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError:
            self.leave("folders that cannot be read", folder)
            return []
        names = {entry.name for entry in entries}
        if folder != self.base and any(names >= made for made in OUTPUTS):
            self.leave("folders of this tool's output", folder)
            return []
        seen = []
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            ours = stem == "spectrum" or stem.endswith("-spectrum") or stem.startswith("toy-")
            if entry.name.startswith("."):
                self.leave("hidden", entry.path)
            elif ours and suffix == ".png" and f"{stem}.json" in names:
                self.leave("figures of this tool", entry.path)
            else:
                seen.append(entry)
        return seen

    def _follows(self, link: os.DirEntry) -> bool:
        """Whether a link to a folder is followed: what lies in the data is found without it."""
        real = os.path.realpath(link.path)
        if _within(self.real, real) or any(_within(real, root) for root in self.roots):
            self.leave("links back into the data", link.path)
            return False
        self.roots.add(real)
        return True

    def pictures(self, entries: list[os.DirEntry]) -> Iterator[str]:
        for entry in entries:
            suffix = os.path.splitext(entry.name)[1].lower()
            link = entry.is_symlink()
            if os.path.isdir(entry.path) if link else entry.is_dir():
                if link and not self._follows(entry):
                    continue
                # Behind a link that leads around the data, or around what a link led to.
                if not link and len(self.roots) > 1 and os.path.realpath(entry.path) in self.roots:
                    self.leave("folders read already", entry.path)
                    continue
                yield from self.pictures(self._entries(entry.path))
            elif not (os.path.isfile(entry.path) if link else entry.is_file()):
                self.leave("broken links" if link else "devices and pipes", entry.path)
            elif suffix in SUFFIXES:
                yield entry.path
            else:
                self.leave(f"{suffix} files" if suffix else "files without a suffix", entry.path)

    def of_class(self, name: str) -> Iterator[str]:
        return self.pictures(self._entries(self.classes[name]))

    def by_class(self) -> dict[str | None, list[str]]:
        """Sorted pictures of each class that has some, by name; without any, all that lie in the
        folder itself, by None."""
        taken = {}
        for name in self.classes:
            # Of whole paths: sub-folders stand among the files of their parent, as in ImageFolder.
            if files := sorted(self.of_class(name)):
                taken[name] = files
            else:
                self.leave("folders without pictures", self.classes[name])
        loose = sorted(self.pictures(self.top))
        if not taken and loose:
            return {None: loose}
        for path in loose:
            self.leave("pictures outside the classes", path)
        return taken


def load(root: Path, train: bool, size: int, skip_unreadable: bool = False) -> FolderSet:
    """The training or the held-out part; data.load says how it is chosen, and the errors."""
    with needs("data folder", "Pillow"):
        import PIL  # noqa: F401
    if not root.is_dir():
        raise FileNotFoundError(f"data: expected a folder of images, got no folder {root}")
    split = (root / "train").is_dir()
    base = root / "train" if split else root
    here = root / "val" if split and not train else base
    if not here.is_dir():
        raise FileNotFoundError(f"data: expected the validation folder beside train, got no {here}")
    walk = _Walk(here)
    pictures = walk.by_class()
    classes = tuple(name for name in pictures if name is not None)
    if here != base and classes:
        other = _Walk(base)
        known = tuple(name for name in other.classes if next(other.of_class(name), None))
        if strangers := sorted(set(classes) - set(known)):
            raise ValueError(
                f"data: expected the classes of {base} in {here}, got {strangers[0]!r}"
            )
        classes = known
    paths, labels = [], []
    for name, files in pictures.items():
        if not split:
            files = [f for k, f in enumerate(files) if (k % 10 == 1) != train]
        paths += map(os.fsencode, files)
        labels += [-1 if name is None else classes.index(name)] * len(files)
    if not paths:
        part = "training" if train else "validation"
        why = f"; left out: {_said(walk.left_out)}" if walk.left_out else ""
        raise FileNotFoundError(f"data: expected {part} images in {here}, got none{why}")
    skip = "replace" if skip_unreadable else None
    about = f"folder:{root}", size, os.fspath(here), walk.left_out, skip
    return FolderSet(np.array(paths), torch.tensor(labels), classes, *about)
