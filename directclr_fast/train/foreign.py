"""What others made, for the probe and the spectrum: files of features.

A file is opened without running code that may be in it: NumPy's without pickled objects, PyTorch's
with ``weights_only``. One that needs more is refused, unless it is trusted by name.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checkpoint

SUFFIXES = (".npy", ".npz", ".safetensors")  # of files that PyTorch does not read


class Part(NamedTuple):
    """Features (n, R) of a set, in the dtype they have, and their labels int64 (n,) or None."""

    features: Tensor
    labels: Tensor | None


def as_rows(output: Tensor) -> Tensor:
    """An encoder's output as (n, R): maps (n, R, h, w) are averaged. ValueError for others."""
    if isinstance(output, Tensor) and output.dim() == 4:
        return output.mean((2, 3))
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"encoder: expected an output (n, R) or (n, R, h, w), got {got}")
    return output


def is_run(path: str | Path) -> bool:
    """Whether ``path`` is a run of this trainer: its folder, its checkpoint, or nothing at all (the
    reader of checkpoints says what is missing best)."""
    path = Path(path)
    if not path.is_file() or (path.parent / "config.json").exists():
        return path.suffix not in SUFFIXES
    if not zipfile.is_zipfile(path) or path.suffix in SUFFIXES:
        return False
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # what it is, `read` finds out
        return False
    return (
        isinstance(state, dict) and state.get("format") == checkpoint.FORMAT and "config" in state
    )


def read(path: str | Path, trust: bool = False):
    """What a file of NumPy, PyTorch or safetensors holds; arrays as tensors, a .npz as a dict.

    ``trust``: run what a pickle asks for. ValueError where a file needs that and has not got it,
    OSError for an unreadable one, ImportError where safetensors is missing.
    """
    path = Path(path)
    unsafe = (
        f"expected tensors alone, got {path}, whose pickled objects run code of whoever made the "
        "file when they are opened ({}); --trust-pickle opens it all the same"
    )
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path)
        if path.suffix in SUFFIXES:
            # Its header decides: with objects inside, NumPy says so before it runs any.
            with open(path, "rb") as file:
                found = np.load(file, allow_pickle=trust)
                return dict(found) if path.suffix == ".npz" else found
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except ImportError:
        raise
    except pickle.UnpicklingError as error:
        first = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        reason = first.splitlines()[0].partition(". ")[0]
        if "nsupported" not in reason:  # nothing that more trust would help with
            raise OSError(f"file: expected a readable one, got {path} ({reason})") from error
        raise ValueError(f"file: {unsafe.format(reason)}") from error
    except Exception as error:  # a damaged file raises nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "allow_pickle" in reason:
            raise ValueError(f"file: {unsafe.format('an array of objects')}") from error
        raise OSError(f"file: expected a readable one, got {path} ({reason})") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"file {path}: expected safetensors, got {error}; "
            "install it with: pip install safetensors"
        ) from error
    return load_file(path)


def _tensors(found, path: Path) -> dict[str, Tensor]:
    """The tensors of what a file holds, by their names there; "" for one alone."""
    if isinstance(found, tuple | list):
        found = {str(k): value for k, value in enumerate(found)}
    found = found if isinstance(found, dict) else {"": found}
    tensors = {}
    for name, value in found.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            native = value.astype(value.dtype.newbyteorder("="), copy=False)
            value = torch.from_numpy(np.array(native))
        if isinstance(value, Tensor) and value.dim() > 0:
            tensors[str(name)] = value
    if not tensors:
        raise ValueError(f"file: expected tensors or arrays, got none in {path}")
    return tensors


def features_in(path: str | Path, key: str | None = None, trust: bool = False) -> dict[str, Part]:
    """The features in a file, {"train": part} or {"train": ..., "test": ...}.

    Features are its matrix of floats, labels its vector of whole numbers. Where a file has two of
    them, those with "test" or "val" in their names are of the part to test on; ``key`` names the
    one that is meant among more. ValueError lists what there is where that does not decide.
    """
    path = Path(path)
    tensors = _tensors(read(path, trust), path)
    kept = [(n, t) for n, t in tensors.items() if t.dim() == 2 and t.is_floating_point()]
    if key is not None:
        kept = [(key, tensors[key])] if key in tensors else []
    labels = [(n, t) for n, t in tensors.items() if t.dim() == 1 and not t.is_floating_point()]
    parts: dict[str, Part] = {}
    for name, value in kept:
        part = _part(name) if key is None else "train"
        answers = [t for n, t in labels if key is not None or _part(n) == part]
        answers = [t.long() for t in answers if len(t) == len(value)]
        if part in parts:
            parts = {}
            break
        parts[part] = Part(value, answers[0] if len(answers) == 1 else None)
    if "train" not in parts and len(parts) == 1:
        parts = {"train": parts["test"]}
    if not parts:
        shapes = [f"{n or 'a tensor'} {tuple(t.shape)}" for n, t in tensors.items()]
        more = f" and {len(shapes) - 4} more" if len(shapes) > 4 else ""
        expected = f"{key!r}" if key is not None else "one matrix of features, or --key NAME"
        if key is None and len(shapes) > 4:
            expected += ", or --encoder NAME for the weights of a network"
        raise ValueError(f"file: expected {expected}, in {path}, got {', '.join(shapes[:4])}{more}")
    return parts


def _part(name: str) -> str:
    return "test" if any(word in name.lower() for word in ("test", "val")) else "train"
