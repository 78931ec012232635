"""``directclr-fast doctor``: what is installed, what each backend says, and why it is not used.

What loads torch is imported by the bodies.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform

from . import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true")


def run(arguments: argparse.Namespace) -> None:
    values = report()
    print(json.dumps(values, indent=2) if arguments.json else text(values))


def _problem(device_type: str):
    """The paper's loss at batch 4096: what the backends are asked about."""
    from .testing import problem

    size = {"rows": 4096, "candidates": 4096, "width": 2048, "dim": 360}
    return problem(**size, device_type=device_type, differentiable=True)


def report() -> dict:
    """Versions, devices and backends as plain values; opens no CUDA context on a CPU machine."""
    from . import dispatch
    from .machine import devices, packages

    here = devices()
    kinds = sorted({entry["device"].partition(":")[0] for entry in here})
    backends = {}
    for name in dispatch.PRIORITY:
        backend = dispatch.load(name)
        backends[name] = {
            "what": inspect.getmodule(type(backend)).__doc__.splitlines()[0],
            "why_not": {kind: backend.why_not(_problem(kind)) for kind in kinds},
            "details": backend.details(),
        }
    return {
        "directclr_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "devices": here,
        "backends": backends,
        "chosen": {kind: dispatch.choose(_problem(kind)).backend for kind in kinds},
    }


def text(report: dict) -> str:
    """The report as lines to read."""
    lines = [
        f"directclr-fast {report['directclr_fast']}, Python {report['python']}, "
        f"{report['platform']}",
        "packages: "
        + ", ".join(f"{name} {version or '-'}" for name, version in report["packages"].items()),
        "devices:",
    ]
    for entry in report["devices"]:
        rest = ", ".join(f"{key} {value}" for key, value in entry.items() if key != "device")
        lines.append(f"  {entry['device']}: {rest}")
    lines.append("backends, fastest first:")
    for name, entry in report["backends"].items():
        lines.append(f"  {name}: {entry['what']}")
        for key, value in entry.get("details", {}).items():
            lines.append(f"      {key}: {value}")
        for kind, reasons in entry["why_not"].items():
            lines.append(f"      on {kind}: {'; '.join(reasons) or 'available'}")
    for kind, name in report["chosen"].items():
        lines.append(f"the paper's loss (4096 rows, 360 of 2048 columns, fp32) on {kind}: {name}")
    return "\n".join(lines)
