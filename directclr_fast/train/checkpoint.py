"""Checkpoints that are whole or not there: written aside, synced, renamed, the last one kept.

One ``torch.save`` file of plain containers and tensors, read with ``weights_only=True`` and checked
by the CRC of every record.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch

FORMAT = 1
PREVIOUS = ".previous"


class CheckpointError(RuntimeError):
    """No readable checkpoint where one was expected."""


def previous(path: Path) -> Path:
    """Where the checkpoint before ``path`` is kept."""
    return path.with_name(path.stem + PREVIOUS + path.suffix)


def exists(path: Path) -> bool:
    """Whether there is one at ``path``, or the one before it."""
    return path.exists() or previous(path).exists()


def save(path: str | os.PathLike, state: dict) -> None:
    """Writes ``state`` to ``path`` so that at every moment a whole checkpoint is on the disk.

    The new file takes the old one's name, and only then the old one becomes
    ``<stem>.previous<suffix>``. A failure (full disk, read-only folder) raises OSError, leaves a
    whole checkpoint and no other file.
    """
    path = Path(path)
    spare = path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        spare.unlink(missing_ok=True)
        with replacing(path, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            if path.exists():
                try:
                    os.link(path, spare)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, spare)
        if spare.exists():
            os.replace(spare, previous(path))
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            spare.unlink(missing_ok=True)
        # torch.save hides a failed write behind an error about its own position in the file.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"checkpoint: could not write {path} ({cause})") from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """A file that takes the name ``path`` when its block ends, whole and synced, or never."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike, values: dict, indent: int | None = None) -> None:
    """``values`` as a whole file at ``path``, or nothing."""
    with replacing(path) as file:
        file.write(json.dumps(values, indent=indent) + "\n")


def writable(name: str, folder: str | os.PathLike) -> Path:
    """``folder``, created where missing; OSError naming the setting ``name`` if not writable."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(f"{name}: expected a folder to write to, got {folder} ({error})") from error


def load(path: str | os.PathLike) -> dict:
    """The state saved at ``path``, or at the previous checkpoint where that one is damaged.

    ``path`` may be the file or the folder that holds ``checkpoint.pt``. Raises
    :class:`CheckpointError` naming every file tried and what was wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    problems = []
    for candidate in (path, previous(path)):
        try:
            state = _read(candidate)
        except FileNotFoundError:
            problems.append(f"{candidate} does not exist")
            continue
        except Exception as error:  # a damaged archive raises nearly anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            problems.append(f"{candidate} is unreadable ({reason})")
            continue
        if problems:
            warnings.warn(
                f"checkpoint: {problems[0]}; using the previous one, {candidate}", stacklevel=2
            )
        return state
    raise CheckpointError(f"checkpoint: expected one at {path}, got none: {'; '.join(problems)}")


def _read(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"checksum of {damaged} does not match")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        got = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"expected checkpoint format {FORMAT}, got {got}")
    return state


def _sync_folder(folder: Path) -> None:
    """Makes the renames themselves durable, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rng_state(views: torch.Generator) -> dict:
    """State of every random generator a run draws from, ``views`` being that of the views."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        # Where CUDA was not used, asking would open a context on every device.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "views": views.get_state(),
    }


def set_rng_state(state: dict, views: torch.Generator) -> None:
    """Puts every generator back to where :func:`rng_state` found it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda"]])
    saved = state["views"].cpu()
    if len(saved) == len(views.get_state()):
        views.set_state(saved)
        return
    warnings.warn(
        "device: expected the kind the run was on to repeat its views, got another", stacklevel=2
    )
    # Neither the views from the start again, nor any that were seen.
    views.manual_seed(zlib.crc32(saved.numpy().tobytes()))
