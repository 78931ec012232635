"""What a result file says about where it was measured: processor, GPU, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

PACKAGES = (
    "directclr-fast", "torch", "triton", "numpy", "lightly", "pytorch-metric-learning", "memeff",
    "inf_cl", "siglip-kernel",
)  # fmt: skip
_GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.limit")


def machine() -> dict:
    """Processor, threads, memory, GPU, versions and commit: what every result file carries."""
    result = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(total_memory() / 2**30, 1),
        "available_gib": round(available_memory() / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: found for name in PACKAGES if (found := version(name))},
        **commit(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        result["gpu"] = properties.name
        result["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        result["card"] = _card()
    return result


def describe(values: dict) -> str:
    """The machine of a result file in one line."""
    where = values.get("gpu") or f"{values['processor']}, {values['threads']} threads"
    if "gpu" not in values and values.get("capability"):
        where += f", {values['capability']}"
    text = f"{where}, torch {values['torch']}"
    if values.get("commit"):
        text += f", commit {values['commit'][:8]}" + ("-dirty" if values.get("dirty") else "")
    return text


def version(name: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


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

    A tree that was copied without its history is told its commit by DIRECTCLR_COMMIT.
    """
    root = Path(__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        told = os.environ.get("DIRECTCLR_COMMIT")
        return {"commit": told, "dirty": None} if told else {}
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(root, "rev-parse", "HEAD"), "dirty": bool(changed)}


def _git(root: Path, *words: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=root
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _card() -> dict:
    """The card's name, driver, clocks and power limit as they are found."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    first = text.strip().splitlines()[0] if text.strip() else ""
    return dict(zip(_GPU_FIELDS, (part.strip() for part in first.split(","))))
