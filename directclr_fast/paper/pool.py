"""Processes that train runs side by side, one thread each.

On small models a process for each core does more than one process with all of them, and with one
thread results do not depend on how many there are. Each process takes one run after another and so
pays once for its start. It ends by itself if its parent does.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

from ..train.supervise import Signals, TrainingStopped
from .runs import Run, execute

TELL_EVERY = 0.5  # seconds between a run's words about its step


class Pool:
    """``with Pool(...) as pool``: ``start`` runs while ``free``, ``wait`` for results.

    ``settings``, ``out``: as for ``runs.execute``. ``on_step(name, step)`` hears of every run's
    step now and then. A signal is passed on to the runs, which save, and raises TrainingStopped.
    """

    def __init__(
        self,
        jobs: int,
        settings: dict,
        out: Path,
        on_step: Callable[[str, int], None],
    ) -> None:
        self.jobs, self.arguments, self.on_step = jobs, (settings, out), on_step
        self.context = multiprocessing.get_context("spawn")
        self.idle: list = []  # connections to processes without a run
        self.busy: dict = {}  # connection: name of its run
        self.processes: dict = {}  # connection: process

    def __enter__(self) -> Pool:
        self.signals = Signals().__enter__()
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            for line, process in self.processes.items():
                if line in self.busy:  # only after an error or a signal
                    process.terminate()
                else:
                    line.close()  # a process that reads the end of its line ends
            for process in self.processes.values():
                process.join()
        except BaseException:  # a second Ctrl-C: at once
            for process in self.processes.values():
                process.kill()
            raise
        finally:
            self.signals.__exit__()

    @property
    def free(self) -> bool:
        """Whether another run can be started."""
        return len(self.busy) < self.jobs

    def start(self, run: Run) -> None:
        if self.idle:
            line = self.idle.pop()
        else:
            line, theirs = self.context.Pipe()
            process = self.context.Process(target=_work, args=(theirs, *self.arguments))
            process.start()
            theirs.close()
            self.processes[line] = process
        line.send(run)
        self.busy[line] = run.name

    def wait(self) -> list[dict]:
        """Results of the runs that have ended, at least one. RuntimeError if one failed."""
        results: list[dict] = []
        while not results:
            if self.signals.caught:
                raise TrainingStopped(
                    f"stopped by {self.signals.caught}; what is done is kept, "
                    "the same command continues"
                )
            for line in connection.wait(list(self.busy), timeout=0.2):
                try:
                    kind, value = line.recv()
                except (EOFError, ConnectionError):
                    kind, value = "error", "its process ended"
                if kind == "step":
                    self.on_step(self.busy[line], value)
                elif kind == "result":
                    self.idle.append(line)
                    del self.busy[line]
                    results.append(value)
                elif not self.signals.caught:
                    raise RuntimeError(f"run {self.busy[line]}: expected its result, got {value}")
        return results


def _work(line, settings: dict, out: Path) -> None:
    """A process of the pool: runs from ``line`` until it is closed."""
    import torch

    parent = multiprocessing.parent_process()

    def follow() -> None:
        # An orphan could meet the run that is started in its place.
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    # Ctrl-C reaches every process of the terminal; the parent passes it on as SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    told = 0.0

    def on_step(record: dict) -> None:
        nonlocal told
        if time.monotonic() - told > TELL_EVERY:
            told = time.monotonic()
            line.send(("step", record["step"]))

    while True:
        try:
            run = line.recv()
        except EOFError:
            return
        try:
            line.send(("result", execute(run, settings, out, on_step)))
        except TrainingStopped:
            return
        except BrokenPipeError:
            return
        except Exception as error:
            line.send(("error", f"{type(error).__name__}: {error}"))
            return
