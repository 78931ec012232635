"""Imports every module of an installed directclr_fast; run outside the checkout."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import directclr_fast


def main() -> int:
    """Prints what was imported from where; fails on the first module that does not import."""
    where = Path(directclr_fast.__file__).parent
    names = [
        module.name
        for module in pkgutil.walk_packages(directclr_fast.__path__, "directclr_fast.")
        if not module.name.endswith("__main__")
    ]
    for name in names:
        importlib.import_module(name)
    packages = {name.split(".")[1] for name in names}
    missing = {"backends", "kernels", "train", "paper", "loss", "reference"} - packages
    print(f"{len(names)} modules of {where} imported")
    if missing:
        print(f"missing: {', '.join(sorted(missing))}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
