"""``directclr-fast``: the commands and where they are, exit codes, an exception as a sentence."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import IO, NoReturn

from . import __version__, doctor
from .bench import command as bench
from .paper import commands as paper
from .train import commands as train
from .train import job, supervise

COMMANDS = {  # name: what adds its flags, what runs it, a word on it
    "train": (train.add_train, train.run_train, "train an encoder: DirectCLR or another mode"),
    "probe": (train.add_probe, train.run_probe, "linear probe, kNN of a run, a network, features"),
    "spectrum": (
        paper.add_spectrum,
        paper.run_spectrum,
        "collapsed dimensions of runs, networks, features",
    ),
    "toy": (paper.add_toy, paper.run_toy, "the paper's two mechanisms of collapse, as figures"),
    "compare": (paper.add_compare, paper.run_compare, "the paper's projectors compared in small"),
    "demo": (paper.add_demo, paper.run_demo, "train, probe and draw on handwritten digits"),
    "bench": (bench.add_arguments, bench.run, "time the loss beside its peers, on this machine"),
    "doctor": (doctor.add_arguments, doctor.run, "versions, devices, backends and why not"),
}


class _Display:
    """A stream that does not end a run when nobody reads it any longer: a closed pipe, a terminal
    that is gone. What is written from then on is thrown away."""

    def __init__(self, stream: IO) -> None:
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # names of files may hold anything
            return self._stream.write(text.encode("ascii", "backslashreplace").decode())
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        # What is buffered would be tried again at the end of the process, and fail there.
        with contextlib.suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def _displayed() -> Iterator[None]:
    # Python has None for a stream that was closed before it began.
    streams = [_Display(stream or io.StringIO()) for stream in (sys.stdout, sys.stderr)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in streams:
                stream.flush()


@_displayed()
def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code; what was wrong is printed in one sentence.

    0: done. 1: training failed on the way (disk, memory, device). 2: refused, or diverged. 75:
    stopped by a signal, after saving. 130: interrupted at once.
    """
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "max_restarts", None):
        return _restarting(arguments)
    return _run(arguments)


@_displayed()
def _run(arguments: argparse.Namespace, *more) -> int:
    # Under torchrun the first rank alone prints what every rank would.
    speaks = job.speaks()

    def note(message, *_, **__) -> None:
        if speaks:
            print(f"note: {message}", file=sys.stderr)

    def say(text: str) -> None:
        if speaks:
            # Errors of torch may span lines.
            print(f"directclr-fast: {' '.join(text.split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = note
        try:
            arguments.run(arguments, *more)
            return 0
        except KeyboardInterrupt:
            say("interrupted")
            return supervise.INTERRUPTED
        except supervise.TrainingStopped as stopped:
            say(str(stopped))
            return supervise.STOPPED
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            if arguments.debug:
                raise
            code = getattr(error, "exit_code", supervise.REFUSED)
            if not speaks and isinstance(error, OSError | RuntimeError):  # may be of this one alone
                print(f"directclr-fast: rank {job.place()[0]}: error: {error}", file=sys.stderr)
            say(f"error: {error}")
            return code


def _restarting(arguments: argparse.Namespace) -> int:
    expected = "at least 0" if arguments.max_restarts < 0 else None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        expected = "it given to torchrun, and --resume here"
    if expected is not None:
        problem = f"max_restarts: expected {expected}, got {arguments.max_restarts}"
        print(f"directclr-fast: error: {problem}", file=sys.stderr)
        return supervise.REFUSED
    return supervise.restarting(_run, arguments, arguments.max_restarts)


class _Parser(argparse.ArgumentParser):
    """Says what was wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"directclr-fast: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="directclr-fast",
        description="Fast, exact DirectCLR / InfoNCE: training, probes, spectra.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (add_flags, run, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        add_flags(command)
        command.set_defaults(run=run)
    return parser
