"""Waiting for other processes as long as they get on, however slow the machine.

A limit of seconds would call a busy machine a fault. Here every sign of life, a file that grows or
a line that is printed, starts the wait anew; what gives none for STILL seconds is taken to hang.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

STILL = 900.0  # seconds; importing torch on a machine that swaps has been seen to take 100


def until(done: Callable[[], object], signs: Callable[[], object] = lambda: None) -> None:
    """Returns once ``done()`` is true; fails when ``signs()`` has not changed for STILL seconds."""
    last, since = signs(), time.monotonic()
    while not done():
        assert time.monotonic() - since < STILL, f"nothing has happened for {STILL:.0f} s"
        time.sleep(0.01)
        if (now := signs()) != last:
            last, since = now, time.monotonic()


def sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below: what a process at work changes."""
    sizes = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            with contextlib.suppress(OSError):  # replaced or gone meanwhile
                state = os.stat(path)
                sizes[path] = (state.st_size, state.st_mtime_ns)
    return sizes


def together(
    commands: Sequence[Sequence[object]], folder: Path, **options
) -> list[subprocess.CompletedProcess]:
    """Runs processes side by side, each in a session of its own, until all have ended.

    Signs of life are what they print (kept in ``folder``) and every other file below ``folder``.
    Once one fails, the others are killed. Once nothing happens any more, all are, and say where
    each of their threads was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    running = []
    options["env"] = {**options.get("env", os.environ), "PYTHONFAULTHANDLER": "1"}
    looked, seen = 0.0, {}

    def signs() -> dict:
        nonlocal looked, seen
        if time.monotonic() - looked > 1:  # a walk through the files costs more than a poll
            looked, seen = time.monotonic(), sizes(folder)
        return seen

    def ended() -> bool:
        codes = [process.poll() for process in running]
        return None not in codes or any(codes)

    def printed(number: int) -> tuple[str, str]:
        parts = (folder / f"process{number}.{kind}" for kind in ("out", "err"))
        return tuple(part.read_text(errors="replace") for part in parts)

    def kill(number: int) -> None:
        for process in running:
            if process.returncode is None:  # its number still belongs to it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    try:
        for number, command in enumerate(commands):
            files = (open(folder / f"process{number}.{kind}", "w") for kind in ("out", "err"))
            with next(files) as out, next(files) as err:
                running.append(
                    subprocess.Popen(
                        [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=out,
                        stderr=err, start_new_session=True, **options,
                    )
                )  # fmt: skip
        until(ended, signs)
    except AssertionError as hang:
        kill(signal.SIGABRT)  # Python prints where it was
        time.sleep(1)
        said = "".join(text for number in range(len(running)) for text in printed(number))
        raise AssertionError(f"{hang}: {said[-20000:]}") from None
    finally:
        kill(signal.SIGKILL)
        for process in running:
            process.wait()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *printed(number))
        for number, process in enumerate(running)
    ]


def process(command: Sequence[object], folder: Path, **options) -> subprocess.CompletedProcess:
    """One process, as :func:`together`."""
    return together([command], folder, **options)[0]
