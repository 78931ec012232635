"""Pictures in folders: which files are taken, and how one is decoded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SUFFIXES = {f".{s}" for s in "jpg jpeg png webp bmp gif tif tiff ppm pgm".split()}


@dataclass(frozen=True)
class FolderSet:
    """Files decoded when asked for: `size` pixels square, RGB. Otherwise as ImageSet.

    The short side is resized to `size` and the centre cut out. `paths` are bytes in one array, not
    a list of objects, so that worker processes share its memory.
    """

    paths: np.ndarray = field(repr=False)
    labels: Tensor = field(repr=False)
    num_classes: int
    name: str
    size: int

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        return 3, self.size, self.size

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, size, size) and int64 (B,). OSError names the file that cannot be read."""
        indices = torch.as_tensor(indices)
        images = [decode(os.fsdecode(self.paths[i]), self.size) for i in indices.tolist()]
        return torch.stack(images), self.labels[indices]

    def __getitems__(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor] | str:
        # An exception leaves a worker buried in that worker's traceback; Batches raises the text.
        try:
            return (*self.batch(indices), indices)
        except OSError as error:
            return str(error)


def decode(path: str | Path, size: int) -> Tensor:
    """A picture file as uint8 (3, size, size) RGB: short side resized to `size`, centre cut out.

    Grey, palette, CMYK and 16-bit files become RGB; transparency is dropped. OSError if it cannot
    be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))  # JPEG decodes straight to the nearest larger eighth
            if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
        w, h = image.size
        short = min(w, h)
        left, top = (w - short) / 2, (h - short) / 2
        box = (left, top, left + short, top + short)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise OSError(f"image: expected a readable picture, got {path} ({error})") from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _subfolders(path: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not e.name.startswith("."))


def _files(path: Path) -> list[str]:
    """Every picture under path, sorted; sub-folders included, as ImageFolder does."""
    return sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(path, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
    )


def load(root: Path, train: bool, size: int) -> FolderSet:
    if not root.is_dir():
        raise FileNotFoundError(f"data: expected a folder of images, got no folder {root}")
    split = (root / "train").is_dir()
    base = root / "train" if split else root
    here = root / "val" if split and not train else base
    if not here.is_dir():
        raise FileNotFoundError(f"data: expected the validation folder beside train, got no {here}")
    classes = _subfolders(base)
    if not classes:
        raise FileNotFoundError(f"data: expected a folder for each class in {base}, got none")
    if strangers := sorted(set(_subfolders(here)) - set(classes)):
        raise ValueError(f"data: expected the classes of {base} in {here}, got {strangers[0]!r}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = _files(here / name)
        if not split:
            files = [f for k, f in enumerate(files) if (k % 10 == 1) != train]
        paths += map(os.fsencode, files)
        labels += [label] * len(files)
    if not paths:
        part = "training" if train else "validation"
        raise FileNotFoundError(f"data: expected {part} images in the classes of {here}, got none")
    return FolderSet(np.array(paths), torch.tensor(labels), len(classes), f"folder:{root}", size)
