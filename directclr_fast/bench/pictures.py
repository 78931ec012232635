"""Images/s of a folder's pictures on one core: decoding, two pieces, both views, each stage.

Of scikit-image's colour photographs as JPEGs of 500 x 375, or of --pictures FOLDER. Everything
takes turns in one process on one thread, beside torchvision's own transforms of a picture;
--against CHECKOUT adds the same calls of another version of this package. Then the loader with one
worker, by how many batches it reads ahead, the batches not being used for anything.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..train import data, folder, views
from . import study, timing

FLAGS = {
    "--pictures": {"help": "folder of JPEGs (default: photographs of scikit-image)"},
    "--quality": {"type": int, "nargs": "+", "default": [90, 95], "help": "of those"},
    "--size": {"type": int, "default": 224, "help": "pixels of a view's side"},
    "--batch": {"type": int, "default": 32},
    "--rounds": {"type": int, "default": 9},
    "--against": {"metavar": "CHECKOUT", "help": "another version of this package"},
    "--gpu": {"type": int, "default": 1500, "help": "images/s that a GPU takes"},
}
AHEAD = (1, 2, 4)  # batches
STAGE = "a view's "  # timed on views.HUE_GROUP rows, everything else on all files


def photographs(out: Path, quality: int) -> list[str]:
    """The colour photographs inside scikit-image, their middle as 500 x 375 JPEGs; their paths."""
    import skimage
    from PIL import Image, ImageOps

    files, lanczos = [], Image.Resampling.LANCZOS
    for name in data.PHOTOGRAPHS:
        with Image.open(Path(skimage.__file__).parent / "data" / name) as picture:
            if picture.mode.startswith("RGB"):
                files.append(str(out / f"{Path(name).stem}.jpg"))
                picture = ImageOps.fit(picture.convert("RGB"), (500, 375), lanczos)
                picture.save(files[-1], quality=quality)
    return files


def version(checkout: str) -> types.SimpleNamespace:
    """`folder` and `views` of another checkout, beside those of this one."""
    place = os.path.join(checkout, "directclr_fast/__init__.py")
    spec = importlib.util.spec_from_file_location("another_version", place)
    package = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    folder, views = (importlib.import_module(f"{spec.name}.train.{n}") for n in ("folder", "views"))
    return types.SimpleNamespace(folder=folder, views=views)


def both_views(of, files: list[str], numbers, size: int) -> tuple[Callable, Callable]:
    """Calls that cut two pieces out of each file, and make both views of them; `of`: a version."""
    make = of.views.make_views("imagenet", size)

    def cut() -> torch.Tensor:
        pieces = [of.folder.cut(f, size, n, make.crops) for f, n in zip(files, numbers)]
        return torch.stack([p.movedim(-3, -1) for p in pieces]).movedim(-1, -3)

    def whole() -> list[torch.Tensor]:
        pieces = cut()
        drawn = make.sample(len(files), size, size, torch.Generator().manual_seed(0), boxes=False)
        sides = enumerate(zip((make.first, make.second), drawn))
        return [view.rows(pieces[:, k], parameters) for k, (view, parameters) in sides]

    return cut, whole


def theirs(size: int) -> Callable:
    """torchvision's transforms of a Pillow picture to both views, as the release composes them."""
    from torchvision import transforms as t

    def view(blur_p: float, solarise_p: float):
        jitter = t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        blur = t.RandomApply([t.GaussianBlur(23, (0.1, 2.0))], p=blur_p)
        bicubic = t.InterpolationMode.BICUBIC
        return t.Compose([
            t.RandomResizedCrop(size, interpolation=bicubic), t.RandomHorizontalFlip(), jitter,
            t.RandomGrayscale(p=0.2), blur, t.RandomSolarize(128, p=solarise_p), t.ToTensor(),
            t.Normalize(views.MEAN, views.STD),
        ])  # fmt: skip

    both = view(1.0, 0.0), view(0.1, 0.2)
    return lambda picture: [v(picture) for v in both]


def calls(files: list[str], size: int, against: str | None) -> dict[str, Callable]:
    """What is timed, by name; each treats all the files once, a STAGE the first of them."""
    from PIL import Image
    from torchvision import io

    numbers = torch.rand(len(files), 2, views.NUMBERS, generator=torch.Generator().manual_seed(0))
    versions = {"": types.SimpleNamespace(folder=folder, views=views)}
    versions |= {", before": version(against)} if against else {}

    def opened(then: Callable) -> Callable:
        def call() -> None:
            for file in files:
                with Image.open(file) as picture:
                    then(picture.convert("RGB"))

        return call

    def decoded() -> None:
        for file in files:
            io.decode_jpeg(io.read_file(file), io.ImageReadMode.RGB)

    made = {"decode, Pillow": opened(lambda picture: None), "decode, torchvision": decoded}
    for name, of in versions.items():
        cut, whole = both_views(of, files, numbers, size)
        made |= {f"decode and cut{name}": cut, f"both views{name}": whole}
    made["both views, torchvision"] = opened(theirs(size))
    # A stage's rows are as many as `View.rows` takes at a time of large ones.
    view, n = views.make_views("imagenet", size).first, views.HUE_GROUP
    pieces = both_views(versions[""], (files * n)[:n], numbers.repeat(n, 1, 1), size)[0]()[:, 0]
    p = view.sample(n, size, size, torch.Generator().manual_seed(0), boxes=False)
    x, jitter = views.as_float(pieces), [p[name] for name in ("factors", "order", "hue")]
    jitter.append(p["hue_place"].argsort(stable=True))
    for name, v in ((name, of.views) for name, of in versions.items()):
        made |= {
            f"{STAGE}to fp32{name}": functools.partial(v.as_float, pieces),
            f"{STAGE}jitter{name}": functools.partial(v.jitter, x, *jitter),
            f"{STAGE}hue, all rows{name}": functools.partial(v.rotate_hue, x, p["hue"]),
            f"{STAGE}blur{name}": functools.partial(v.blur, x, p["sigma"], view.blur_kernel),
            f"{STAGE}normalise{name}": functools.partial(v.normalise, x),
        }
    return made


def ahead(files: list[str], size: int, batch: int) -> dict[int, float]:
    """Images/s of a loader with one worker, by the batches it reads ahead."""
    images = folder.load(Path(files[0]).parent, True, size)
    paths = images.paths.repeat(-(-8 * batch // len(images)))
    images = replace(images, paths=paths, labels=torch.full((len(paths),), -1))
    images = replace(images, crops=views.make_views("imagenet", size).crops)
    rates = {}
    for count in AHEAD:
        batches = data.Batches(images, data.EpochSampler(len(paths), batch), "cpu", 1)
        batches.loader.prefetch_factor = count
        for _ in range(2):  # the first starts the worker
            start = time.perf_counter()
            seen = sum(len(labels) for _, labels, _ in batches)
            rates[count] = seen / (time.perf_counter() - start)
    return rates


def measure(arguments: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """For each quality: images/s of everything, what a GPU then needs, reading ahead."""
    threads, size = torch.get_num_threads(), arguments.size
    torch.set_num_threads(1)
    for quality in [None] if arguments.pictures else arguments.quality:
        with tempfile.TemporaryDirectory() as made:
            if arguments.pictures:
                files = sorted(str(path) for path in Path(arguments.pictures).rglob("*.jp*g"))
            else:
                files = photographs(Path(made), quality)
            kib = sum(os.path.getsize(file) for file in files) / len(files) / 1024
            timed = calls(files, size, arguments.against)
            case = {"quality": quality, "files": len(files), "kib": kib, "load": os.getloadavg()}
            case["variants"] = times = timing.interleaved(timed, arguments.rounds)
            case["ahead"] = ahead(files, size, arguments.batch)
        rate = {
            k: (views.HUE_GROUP if k.startswith(STAGE) else len(files)) / v["median"]
            for k, v in times.items()
            if "median" in v
        }
        lines = [f"{len(files)} JPEGs of {kib:.0f} KiB, quality {quality}: images/s of one core"]
        lines += [f"  {k:<32} {v:8.0f}  {1e3 / v:6.2f} ms" for k, v in rate.items()]
        decoder = max(("decode, Pillow", "decode, torchvision"), key=rate.get)
        share = timing.ratio(times[decoder], times["decode and cut"])
        case["of_plain_decoder"] = share
        lines.append(f"  decode and cut: {share:.2f} of the fastest plain decoder")
        for name in ("decode and cut", "both views"):
            if f"{name}, before" in times:
                case[f"{name}, times before"] = timing.ratio(times[f"{name}, before"], times[name])
                lines.append(f"  {name}: {case[f'{name}, times before']:.2f} times before")
        workers = arguments.gpu / rate["decode and cut"]
        lines.append(f"  a GPU of {arguments.gpu} images/s needs {workers:.1f} cores that cut")
        said = (f"{v:.0f} with {k}" for k, v in case["ahead"].items())
        lines.append(f"  one worker, batches ahead: {', '.join(said)} images/s")
        yield case, "\n".join(lines)
    torch.set_num_threads(threads)


study.as_script(__name__)
