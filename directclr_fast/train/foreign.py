"""What others made, for the probe and the spectrum: files of features, weights of other networks.

A file is opened without running code that may be in it, and one that needs more is refused, unless
it is trusted by name. Weights are found by their names: of a checkpoint's networks, each under a
prefix of its own, the one is taken under whose prefix most of the encoder's tensors lie, in their
shapes, the first of equals. All of them have to be there.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..machine import needs
from . import checkpoint, probe

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


def as_tensor(array: np.ndarray) -> Tensor:
    """The values of an array of numbers, whatever its strides and byte order, in memory it owns."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def is_run(path: str | Path) -> bool:
    """Whether ``path`` is a run of this trainer: its folder, its checkpoint, or nothing at all (the
    reader of checkpoints says what is missing best)."""
    path = Path(path)
    ours = path.name.startswith("checkpoint") and (path.parent / "config.json").exists()
    if not path.is_file() or ours:
        return True
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
    try:
        if path.suffix == ".safetensors":
            with needs(f"file {path}", "safetensors", "safetensors"):
                from safetensors.torch import load_file
            return load_file(path)
        if path.suffix in SUFFIXES:
            with open(path, "rb") as file:
                arrays = np.load(file, allow_pickle=trust)
                return dict(arrays) if path.suffix == ".npz" else arrays
        return _unpickled(path, trust)
    except Exception as error:  # a damaged file raises nearly anything
        if isinstance(error, ImportError) and path.suffix == ".safetensors":
            raise
        text = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
        reason = text.splitlines()[0].partition(". ")[0]
        objects = isinstance(error, pickle.UnpicklingError) and path.suffix not in SUFFIXES
        if not trust and (objects or "allow_pickle" in reason or "TorchScript" in reason):
            raise ValueError(
                f"file: expected tensors alone, got {path}, whose pickled objects run code of "
                f"whoever made the file when they are opened ({reason}); --trust-pickle opens it "
                "all the same"
            ) from error
        raise OSError(f"file: expected a readable one, got {path} ({reason})") from error


def _unpickled(path: Path, trust: bool):
    """What torch.save or, where it is trusted, pickle wrote to ``path``."""
    with open(path, "rb") as file:
        start = file.read(2)
    if start[:1] != b"\x80" and start != b"PK":  # of a pickle, of an archive
        raise ValueError("neither NumPy's, PyTorch's nor safetensors'")
    try:
        with warnings.catch_warnings():  # of protocols and archives: what fails is said anyway
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception:
        if not trust or start == b"PK":
            raise
        with open(path, "rb") as file:  # one that torch.save did not write
            return pickle.load(file)


def _tensors(path: str | Path, trust: bool) -> dict[str, Tensor]:
    """The tensors that a file holds, by their names there; "" for one alone."""
    content = read(path, trust)
    if isinstance(content, tuple | list):
        content = {str(k): value for k, value in enumerate(content)}
    content = content if isinstance(content, dict) else {"": content}
    tensors = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = as_tensor(value)
        if isinstance(value, Tensor) and value.dim() > 0:
            tensors[str(name)] = value
    if not tensors:
        hint = "; --encoder NAME reads the weights of a network"
        raise ValueError(f"file: expected tensors or arrays, got none in {path}{hint}")
    return tensors


def features_in(path: str | Path, key: str | None = None, trust: bool = False) -> dict[str, Part]:
    """The features in a file, {"train": part} or {"train": ..., "test": ...}.

    Features are its matrix of floats, labels its vector of whole numbers. Where a file has two of
    them, those with "test" or "val" in their names are of the part to test on; ``key`` names the
    one that is meant among more. ValueError lists what there is where that does not decide.
    """
    tensors = _tensors(path, trust)
    matrices = [(n, t) for n, t in tensors.items() if t.dim() == 2 and t.is_floating_point()]
    if any(name.endswith((".weight", ".bias")) for name in tensors):
        matrices = []  # a network: its last layer is a matrix, but of no samples
    if key is not None:
        matrices = [(key, tensors[key])] if key in tensors else []
    labels = [(n, t) for n, t in tensors.items() if t.dim() == 1 and not t.is_floating_point()]
    parts: dict[str, Part] = {}
    for name, value in matrices:
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
        if key is None:
            expected += ", or --encoder NAME for the weights of a network"
        raise ValueError(f"file: expected {expected}, in {path}, got {', '.join(shapes[:4])}{more}")
    return parts


def labels_in(path: str | Path, trust: bool = False) -> Tensor:
    """The one vector of whole numbers in a file, int64 (n,). ValueError where there is none."""
    tensors = [t.squeeze() for t in _tensors(path, trust).values()]
    whole = [t for t in tensors if t.dim() == 1 and (t == t.long()).all()]
    if len(whole) != 1:
        got = f"{len(whole)} vectors of them"
        raise ValueError(f"labels: expected whole numbers in {path}, got {got}")
    return whole[0].long()


def probe_features(
    path: str | Path,
    labels: str | Path | None = None,
    test: str | Path | None = None,
    test_labels: str | Path | None = None,
    *,
    key: str | None = None,
    trust: bool = False,
) -> tuple[probe.Features, str]:
    """What a probe needs, from files of features and labels, and how the part to test on was got.

    A file without such a part is cut in two: of each class the last fifth is tested on. Classes are
    the different labels there are; negative ones are unknown. ValueError where labels are missing.
    """
    parts = features_in(path, key, trust)
    if test is not None:
        there = features_in(test, key, trust)
        parts = {"train": parts["train"], "test": there.get("test", there["train"])}
    given = {
        "train": (path, labels, "--labels"),
        "test": (test or path, test_labels, "--test-labels"),
    }
    arrays: list[Tensor] = []
    for name, (features, own) in parts.items():
        file, other, flag = given[name]
        own = own if other is None else labels_in(other, trust)
        if own is None or len(own) != len(features):
            got = "none" if own is None else f"{len(own)} in {other}"
            expected = f"one for each of the {len(features)} features in {file}"
            raise ValueError(f"labels: expected {expected}, got {got}; {flag} names a file of them")
        if not features.isfinite().all():
            raise ValueError(f"features: expected finite numbers, got nan or inf in {file}")
        arrays += [features.float(), own]
    known = torch.cat(arrays[1::2])
    classes = known[known >= 0].unique()
    for k in range(1, len(arrays), 2):
        place = torch.searchsorted(classes, arrays[k])
        arrays[k] = torch.where(arrays[k] >= 0, place, -1)
    if len(parts) == 1:
        split = probe.held_out(*arrays, len(classes))
        return split, "the last fifth of each class"
    if arrays[0].shape[1] != arrays[2].shape[1]:
        widths = f"{arrays[0].shape[1]} and {arrays[2].shape[1]}"
        raise ValueError(f"features: expected two parts of one width, got {widths}")
    return probe.Features(*arrays, len(classes)), str(test or path)


def _part(name: str) -> str:
    return "test" if any(word in name.lower() for word in ("test", "val")) else "train"


# ---------------------------------------------------------------- networks


class Foreign(nn.Module):
    """A network of others as an encoder: images (n, C, H, W) to rows (n, R), grey ones repeated for
    a network of three channels. ``said``: where its weights are from; ``width``: R, once
    :meth:`check` has found it."""

    def __init__(self, network: nn.Module, said: str) -> None:
        super().__init__()
        self.network, self.said, self.width = network, said, None
        convolutions = (m for m in network.modules() if isinstance(m, nn.Conv2d))
        self.channels = next((m.in_channels for m in convolutions), None)

    def forward(self, images: Tensor) -> Tensor:
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return as_rows(self.network(images))

    def check(self, channels: int, size: int) -> None:
        """Encodes two images of ``size`` pixels. ValueError where they do not fit."""
        device = next((p.device for p in self.parameters()), None)
        images = torch.zeros(2, channels, size, size, device=device)
        training = self.training
        try:
            with torch.no_grad():
                self.width = self.eval()(images).shape[1]
        except (RuntimeError, TypeError, AssertionError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            expected = f"one for images of {channels} channels and {size} pixels"
            raise ValueError(
                f"encoder: expected {expected}, got: {reason}; --image-size says another size"
            ) from error
        finally:
            self.train(training)


def load_encoder(name: str, path: str | Path | None = None, trust: bool = False) -> Foreign:
    """The network ``name`` without its classifier, with the weights in the file ``path``.

    name: a classification model of torchvision or, where it is installed, timm; or
    "module:function", which returns a module, taken as it is. path: None leaves the weights it has.
    Raises ValueError where a weight is missing or of another shape, and as :func:`read`.
    """
    network = _build(name)
    if path is None:
        return Foreign(network, f"{name} with the weights it starts with")
    path = Path(path)
    content = read(path, trust)
    best = _best(network, content)
    if _adapt_stem(network, best):
        best = _best(network, content)
    lacking = [key for key in _wanted(network) if key not in best.names]
    if lacking:
        raise ValueError(_misfit(name, path, network, best, lacking))
    network.load_state_dict({k: best.tensors[v] for k, v in best.names.items()}, strict=False)
    return Foreign(network, _said(name, path, best))


class Match(NamedTuple):
    """Where in a file an encoder's tensors are: the place of their mapping, its tensors, the prefix
    of their names there, and the name there of each."""

    place: str
    tensors: dict[str, Tensor]
    prefix: str
    names: dict[str, str]


def _build(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    if function:
        here = os.getcwd()  # where `python -m` would look, too
        sys.path.insert(0, here)
        try:
            network = getattr(importlib.import_module(module), function)()
        except Exception as error:  # of whoever wrote it
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"encoder: expected a module from {name}(), got {reason}") from error
        finally:
            sys.path.remove(here)
        if not isinstance(network, nn.Module):
            got = type(network).__name__
            raise ValueError(f"encoder: expected a module from {name}(), got {got}")
        return network
    absent = []
    try:
        from torchvision import models
    except ImportError:
        absent.append("torchvision")
    else:
        if name in models.list_models(module=models):
            return _without_classifier(models.get_model(name, weights=None), name)
    try:
        import timm
    except ImportError:
        absent.append("timm")
    else:
        if timm.is_model(name):
            return timm.create_model(name, pretrained=False, num_classes=0)
    missing = f" (pip install {' '.join(absent)} for more)" if absent else ""
    expected = f"a model of torchvision or timm{missing}, or module:function"
    raise ValueError(f"encoder: expected {expected}, got {name!r}")


def _without_classifier(network: nn.Module, name: str) -> nn.Module:
    linear = [key for key, part in network.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise ValueError(f"encoder: expected a network that ends in a linear layer, got {name}")
    place, _, last = linear[-1].rpartition(".")
    setattr(network.get_submodule(place), last, nn.Identity())
    return network


def _wanted(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def _states(content, place: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping from names to tensors in what a file holds, and where it lies there."""
    content = content.state_dict() if isinstance(content, nn.Module) else content
    if not isinstance(content, Mapping):
        return
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield place, tensors
    for key, value in content.items():
        if isinstance(value, Mapping | nn.Module):
            yield from _states(value, f"{place}.{key}" if place else str(key))


def _best(network: nn.Module, content) -> Match:
    """The mapping, prefix and way of naming under which most of the network's tensors are found."""
    wanted = _wanted(network)
    # nn.Sequential(*children) of a network, as lightly's examples have it, numbers what had names.
    place_of = {child: str(k) for k, (child, _) in enumerate(network.named_children())}
    numbered = {k: ".".join((place_of.get(k.split(".")[0], ""), *k.split(".")[1:])) for k in wanted}
    best, most = Match("", {}, "", {}), -1
    for place, tensors in _states(content):
        for naming in ({k: k for k in wanted}, numbered):
            count = Counter(
                name.removesuffix(other)
                for name, tensor in tensors.items()
                for key, other in naming.items()
                if f".{name}".endswith(f".{other}") and tensor.shape == wanted[key].shape
            )
            for prefix, _ in count.most_common(1):
                there = {k: prefix + o for k, o in naming.items() if prefix + o in tensors}
                fit = {k: n for k, n in there.items() if tensors[n].shape == wanted[k].shape}
                if len(fit) > most:
                    best, most = Match(place, tensors, prefix, fit), len(fit)
    return best


def _adapt_stem(network: nn.Module, best: Match) -> bool:
    """Gives a ResNet the first convolution of the file, where only that has another shape: 3 x 3
    means the form for small images, of stride 1 and without max-pool. Whether it did."""
    conv = getattr(network, "conv1", None)
    names = (f"{best.prefix}conv1.weight", f"{best.prefix}0.weight")
    there = next((best.tensors[name] for name in names if name in best.tensors), None)
    if "conv1.weight" in best.names or there is None or there.dim() != 4:
        return False
    if not isinstance(conv, nn.Conv2d) or len(there) != conv.out_channels:
        return False
    channels, side = there.shape[1], there.shape[2]
    small = side == 3
    network.conv1 = nn.Conv2d(
        channels, len(there), side, 1 if small else conv.stride, side // 2, bias=False
    )
    if small and hasattr(network, "maxpool"):
        network.maxpool = nn.Identity()
    return True


def _misfit(name: str, path: Path, network: nn.Module, best: Match, lacking: list[str]) -> str:
    wanted = _wanted(network)
    first = lacking[0]
    other = best.tensors.get(best.prefix + first)
    shape = tuple(wanted[first].shape)
    why = "is not there" if other is None else f"is {tuple(other.shape)} there, {shape} in {name}"
    under = f" under {best.prefix!r}" if best.prefix else ""
    return (
        f"encoder: expected all {len(wanted)} tensors of {name} in {path}, got "
        f"{len(best.names)}{under}: {first} {why}"
        + (f", and {len(lacking) - 1} more" if len(lacking) > 1 else "")
    )


def _said(name: str, path: Path, best: Match) -> str:
    left = [k for k in best.tensors if k not in set(best.names.values())]
    left = [k for k in left if not k.endswith("num_batches_tracked")]
    place = f" of {best.place!r}" if best.place else ""
    under = f" under {best.prefix!r}" if best.prefix else ""
    text = f"{name} from {path}: {len(best.names)} tensors{place}{under}"
    if left:
        own = sorted(left, key=lambda key: not key.startswith(best.prefix))
        text += f"; {len(left)} left there, such as {', '.join(own[:3])}"
    return text
