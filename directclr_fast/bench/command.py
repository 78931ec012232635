"""``directclr-fast bench``: the flags, and what is printed and written."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from ..progress import Progress
from .settings import QUICK, Settings

DESCRIPTION = """\
Times the loss (forward and backward) beside the peers that are installed, on this machine: its
ceilings first, then every variant's agreement with fp64, peak memory and time. Writes NAME.json and
four figures to DIR and prints the table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command: a flag for each field of Settings, and what is done with a result."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("result", nargs="?", help="with --against: a result file to compare, instead of a run")
    add("--quick", action="store_true", help="a small grid, under 5 minutes on 2 cores")
    add("--out", default="runs/bench", metavar="DIR", help="folder of the results")
    add("--name", default="bench", help="stem of the files, default bench")
    for field in dataclasses.fields(Settings):
        flag = {"name": f"--{field.name.replace('_', '-')}", **field.metadata["flag"]}
        add(flag.pop("name"), dest=field.name, default=None, **flag)
    add("--no-figures", dest="figures", action="store_false", help="the table and the file only")
    add("--list", action="store_true", help="the variants here, and why not; measures nothing")
    add("--against", metavar="FILE", help="compare with this result file; exit code 1 if worse")
    add(
        "--relative", type=float,
        help="smallest change that counts, as a share of the old figure (default 0.15)",
    )  # fmt: skip
    add(
        "--absolute", type=float,
        help="smallest change that counts, as a share of eager PyTorch's time (default 0.02; in "
        "ms with --ms)",
    )  # fmt: skip
    add("--ms", action="store_true", help="compare milliseconds, for one quiet machine")


def asked(arguments: argparse.Namespace) -> Settings:
    """The settings that the flags ask for; a flag that is not given leaves its default."""
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(arguments).items()
        if name in Settings.__dataclass_fields__ and value is not None
    }
    # Sizes named by hand are all that is measured.
    if "rows" in given:
        given.setdefault("both_rows", ())
    return dataclasses.replace(QUICK if arguments.quick else Settings(), **given)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command. ValueError for flags that do not fit; Regressed where figures got worse
    than those of ``--against``."""
    from . import regressions, report

    if arguments.result is not None and arguments.against is None:
        raise ValueError("result: expected --against FILE to compare it with, got none")
    if arguments.list:
        print("\n".join(listing(asked(arguments))))
        return
    # The old file is read before anything is measured: a bad name costs no minutes.
    old = report.load([arguments.against]) if arguments.against else None
    new = report.load([arguments.result]) if arguments.result else _measured(arguments)
    if old is None:
        return
    thresholds = {
        key: value
        for key in ("relative", "absolute")
        if (value := getattr(arguments, key)) is not None
    }
    changes = regressions.compare(old, new, milliseconds=arguments.ms, **thresholds)
    print(regressions.summary(changes, old, new))
    if worse := sum(change.worse is True for change in changes):
        raise regressions.Regressed(
            f"bench: expected figures as in {arguments.against}, got {worse} worse"
        )


def _measured(arguments: argparse.Namespace) -> dict:
    """A new run, written and printed."""
    from . import grid, report, study

    wanted = asked(arguments).resolved()
    out = Path(arguments.out)
    path = out / f"{arguments.name}.json"
    save = study.writer(path)
    command = ["directclr-fast", *sys.argv[1:]]
    form = "{percentage:3.0f}% |{bar}| {elapsed}{postfix}"
    with Progress(100, file=sys.stderr, bar_format=form) as progress:

        def show(text: str, share: float) -> None:
            progress.to(int(100 * share), text, f"{100 * share:3.0f} %  {text}")

        result = grid.run(wanted, show, save, command)
    print(report.table(result))
    written = [path]
    try:
        if arguments.figures:
            written += report.figures(result, out, arguments.name)
    except ImportError as error:
        print(f"note: {error}", file=sys.stderr)
    print(f"\nwritten: {', '.join(str(file) for file in written)}")
    return result


def listing(wanted: Settings) -> list[str]:
    """A line for each variant: its precision, and available or why not."""
    wanted = wanted.resolved()
    reasons: dict[str, tuple] = {}
    # Some have negatives "both" only; the case that comes nearest speaks for the variant.
    for negatives in ("cross", "both"):
        for case in dataclasses.replace(wanted, negatives=negatives, both_rows=()).cases():
            for variant in wanted.catalogue(case):
                why = variant.why_not(case)
                before = reasons.get(variant.name, (variant, why))
                reasons[variant.name] = min(before, (variant, why), key=lambda pair: len(pair[1]))
    return [
        f"{name:<24}{variant.family:<11}{variant.precision:<6}{'; '.join(why) or 'available'}"
        for name, (variant, why) in reasons.items()
    ]
