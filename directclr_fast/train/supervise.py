"""Runs that are ended from outside: by a signal, after which they save, or by a crash, after which
they start again from their checkpoint. Needs no torch: the supervising process stays small."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable

FAILED, REFUSED, STOPPED, INTERRUPTED = 1, 2, 75, 130  # exit codes; 75 is sysexits' "try again"
FINAL = (0, REFUSED, STOPPED, INTERRUPTED)  # another start would end likewise, or is not wanted


class TrainingStopped(Exception):
    """A signal asked the run to stop; it did, at the end of a step."""


class Signals:
    """``caught``: the name of the SIGTERM, SIGINT or SIGHUP (a terminal that closed) that came
    during the block, otherwise None. A SIGHUP that is ignored, as under nohup, stays so.

    A second SIGINT interrupts at once if ``impatient``. (Under torchrun each signal comes twice,
    from the terminal or the scheduler and from torchrun.) Off the main thread nothing is caught.
    """

    def __init__(self, impatient: bool = True) -> None:
        self.caught: str | None = None
        self.impatient = impatient
        self.before: dict = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            hangup = getattr(signal, "SIGHUP", None)  # Windows has none
            wanted = [signal.SIGTERM, signal.SIGINT]
            if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
                wanted.append(hangup)
            for number in wanted:
                self.before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _) -> None:
        self.caught = signal.Signals(number).name
        if self.impatient:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def restarting(run: Callable, arguments, restarts: int) -> int:
    """Exit code of ``run(arguments)`` in a process of its own, which after a crash starts again.

    A crash is every end but success, refused settings, divergence and a signal that was obeyed; at
    most ``restarts`` times in all. It then has ``resume`` set and ``overwrite`` not, unless it
    ended before its first step was logged, when it starts as it was first asked to. SIGTERM is
    passed on.
    """
    context = multiprocessing.get_context("spawn")
    started = context.RawValue("b", 0)  # no lock, which a killed process would keep
    with Signals() as signals:
        for left in reversed(range(restarts + 1)):
            child = context.Process(target=_child, args=(run, arguments, started))
            child.start()
            passed = False
            while child.exitcode is None:
                child.join(0.1)
                if signals.caught in ("SIGTERM", "SIGHUP") and not passed:
                    child.terminate()
                    passed = True
            code = child.exitcode
            if code in FINAL or signals.caught or not left:
                break
            arguments.resume = arguments.resume or bool(started.value)
            arguments.overwrite = arguments.overwrite and not arguments.resume
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            count = f"restart {restarts - left + 1} of {restarts}"
            print(f"note: training ended by {how}, {count}", file=sys.stderr)
    return code if code >= 0 else 128 - code


def follow_parent() -> None:
    """This process gets SIGTERM when its parent ends: an orphan could meet the run that is started
    in its place."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


def _child(run: Callable, arguments, started) -> None:
    follow_parent()
    sys.exit(run(arguments, lambda _: setattr(started, "value", 1)))
