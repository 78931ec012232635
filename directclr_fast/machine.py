"""What this machine is: for doctor, every result file, a comparison's report, a run's log."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from . import __version__

PACKAGES = (  # what this one runs on, then the peers of `bench`
    "torch", "triton", "numpy", "torchvision", "scikit-learn", "scikit-image", "matplotlib", "tqdm",
    "lightly", "pytorch-metric-learning", "memeff", "inf_cl", "siglip-kernel",
)  # fmt: skip
_GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit")


def machine(gpu: bool | None = None) -> dict:
    """Processor, threads, memory, GPU, versions and commit.

    ``gpu``: whether to describe the first GPU; None: where there is one. Asking wakes the driver.
    """
    cpu = devices(gpu=False)[0]
    result = {
        "directclr_fast": __version__, "python": platform.python_version(),
        "platform": platform.platform(), "torch": torch.__version__,
        "versions": {name: version for name, version in packages().items() if version},
        "processor": cpu["name"], "cores": cpu["cores"], "threads": cpu["threads"],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(total_memory() / 2**30, 1),
        "available_gib": round(available_memory() / 2**30, 1), **commit(),
    }  # fmt: skip
    if first := devices(gpu)[1:2]:
        result["gpu"], result["gpu_memory_gib"] = first[0]["name"], first[0]["memory_gib"]
        result["card"] = _card()
    return result


def devices(gpu: bool | None = None) -> list[dict]:
    """The processor, then every GPU (``gpu``: as for :func:`machine`): plain values."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    cpu = {"device": "cpu", "name": processor(), "cores": cores, "threads": threads}
    count = torch.cuda.device_count() if gpu is not False and torch.cuda.is_available() else 0
    gpus = []
    for index, of in enumerate(map(torch.cuda.get_device_properties, range(count))):
        gpus.append({
            "device": f"cuda:{index}", "name": of.name, "capability": f"{of.major}.{of.minor}",
            "memory_gib": round(of.total_memory / 2**30, 1),
        })  # fmt: skip
    return [cpu, *gpus]


def describe(values: dict) -> str:
    """:func:`machine` in one line. Files of other versions may lack a part of it."""
    where = values.get("gpu") or values["processor"]
    if "gpu" not in values and values.get("threads"):
        where += f", {values['threads']} threads"
    if "gpu" not in values and values.get("capability"):
        where += f", {values['capability']}"
    text = f"{where}, torch {values['torch']}"
    if values.get("commit"):
        text += f", commit {values['commit'][:8]}" + ("-dirty" if values.get("dirty") else "")
    return text


def packages() -> dict[str, str | None]:
    """Version of each of PACKAGES, None where it is not installed."""
    versions = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@contextlib.contextmanager
def needs(what: str, package: str, install: str = "'directclr-fast[train]'") -> Iterator[None]:
    """Around an import: where it fails, the ImportError says what to install, and for ``what``."""
    try:
        yield
    except ImportError as error:
        hint = f"install it with: pip install {install}"
        raise ImportError(f"{what}: expected {package}, got {error}; {hint}") from error


def processor() -> str:
    """Name of the processor as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def total_memory() -> int:
    """Bytes of this machine's memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def available_memory() -> int:
    """Bytes a process may still take: what the system has free, and a container's limit."""
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(re.search(r"^MemAvailable:\s+(\d+)", text, re.M)[1]) * 1024
    except (OSError, TypeError):
        return total_memory()
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(limit) - used)
    except (OSError, ValueError):  # no such container, or "max"
        pass
    return max(free, 0)


def commit() -> dict:
    """{"commit", "dirty"} of the checkout this package runs from, empty for an installed copy.

    DIRECTCLR_COMMIT names the commit of a tree that was copied without its history.
    """
    root = Path(__file__).resolve().parents[1]
    top = _printed("git", "rev-parse", "--show-toplevel", at=root)
    if top is None or Path(top).resolve() != root:
        named = os.environ.get("DIRECTCLR_COMMIT")
        return {"commit": named, "dirty": None} if named else {}
    changed = _printed("git", "status", "--porcelain", "--untracked-files=no", at=root)
    return {"commit": _printed("git", "rev-parse", "HEAD", at=root), "dirty": bool(changed)}


def _printed(*words: str, at: Path | None = None) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=at)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _card() -> dict:
    """The card's name, driver, power limit, and its clocks at this moment."""
    query = f"--query-gpu={','.join(_GPU_FIELDS)}"
    first = (_printed("nvidia-smi", query, "--format=csv,noheader") or "").partition("\n")[0]
    return dict(zip(_GPU_FIELDS, map(str.strip, first.split(",")))) if first else {}


def short_name(gpu: str) -> str:
    """What to call the results of a GPU: "h100" of "NVIDIA H100 80GB HBM3"."""
    words = re.sub(r"[^a-z0-9]+", " ", gpu.lower()).split()
    maker = {"nvidia", "amd", "tesla", "geforce", "instinct", "radeon"}
    form = re.compile(r"\d+gb|hbm\d*e?|pcie|sxm\d*|nvl|oam|graphics")
    return "-".join(word for word in words if word not in maker and not form.fullmatch(word))
