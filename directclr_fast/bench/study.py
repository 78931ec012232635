"""The frame of a study: its flags, one JSON file written after every case, what is printed of each.

A study is a module with FLAGS (a flag's name, and how argparse takes it) and ``measure``, which
yields each case as plain values with the text to print of it. It runs as
``python -m directclr_fast.bench.NAME``.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ..machine import machine
from ..train import checkpoint


def parser(study: ModuleType) -> argparse.ArgumentParser:
    """The flags of a study, and --out."""
    made = argparse.ArgumentParser(
        prog=f"python -m {study.__spec__.name}", description=study.__doc__.partition("\n")[0]
    )
    for flag, how in study.FLAGS.items():
        made.add_argument(flag, **how)
    made.add_argument("--out", metavar="FILE", help="JSON file, written after every case")
    return made


def main(study: ModuleType, argv: list[str] | None = None) -> None:
    """Measures what the flags ask for; the file of --out exists from the first case on."""
    words = sys.argv[1:] if argv is None else argv
    arguments = parser(study).parse_args(words)
    settings = {name: value for name, value in vars(arguments).items() if name != "out"}
    head = {"command": [study.__spec__.name, *words], "settings": settings}
    write = writer(arguments.out) if arguments.out else lambda result: None
    cases = []
    for case, text in study.measure(arguments):
        cases.append(case)
        print(text, flush=True)
        write({"machine": machine(), **head, "cases": cases})


def as_script(name: str) -> None:
    """Ends a study, whose module has this name: :func:`main` where it is the program."""
    if name == "__main__":
        main(sys.modules[name])


def writer(path: str | Path) -> Callable[[dict], None]:
    """A function that writes a result to ``path``, whole each time. Raises now if it cannot."""
    checkpoint.writable("out", Path(path).parent)
    return functools.partial(checkpoint.write_json, path, indent=1)
