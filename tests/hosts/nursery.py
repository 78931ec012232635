"""On one host: starts ranks that need not import anything first.

Reads a JSON line per command on stdin and answers with one: {"start": flags of train, "out",
"environment", "fault", "ahead"} with the process's id, {"wait": id} with its exit code. ``fault``
(phase, step, where, at, done) is a moment: there the rank makes the file ``at`` and waits for
``done``. ``ahead``: seconds by which Python's clock is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

from directclr_fast import cli
from directclr_fast.train import checkpoint, loop, ranks
from directclr_fast.train.batchnorm import norms


def moment(phase: str, step: int, where: float, at: str, done: str) -> None:
    """Makes the process stop for a moment in ``phase``; ``where``, 0 to 1, says at what of it."""

    def stop(*_) -> None:
        if not Path(at).exists():
            Path(at).touch()
            while not Path(done).exists():
                time.sleep(0.001)

    def before(owner, name: str) -> None:
        function = getattr(owner, name)

        def stopping(*args, **options):
            stop()
            return function(*args, **options)

        setattr(owner, name, stopping)

    train_step, save = loop.Trainer.train_step, loop.Trainer._save

    def stepping(self, *batch):
        if self.step + 1 == step and phase in ("forward", "backward"):
            places = norms(self.model) if phase == "forward" else [*self.model.parameters()]
            place = places[int(where * len(places))]
            if phase == "forward":
                place.register_forward_pre_hook(stop)
            else:
                place.register_hook(stop)
        return train_step(self, *batch)

    def saving(self):
        if self.step == step and phase == "checkpoint":
            # Before the ranks' states are gathered, before the file, before its name.
            owners = [(self.ranks, "gather"), (self.ranks, "first"), (os, "fsync")]
            before(*owners[int(where * (3 if self.ranks.rank == 0 else 2))])
        return save(self)

    loop.Trainer.train_step, loop.Trainer._save = stepping, saving
    if phase == "rendezvous":
        before(*((ranks, "_meeting"), (torch.distributed, "init_process_group"))[int(2 * where)])


def main() -> int:
    """Until stdin ends; in a rank, its exit code."""
    torch.set_num_threads(1)
    assert checkpoint and loop  # imported before anything forks
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            answer = os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                out = os.open(command["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                nothing = os.open(os.devnull, os.O_RDONLY)
                for number, file in enumerate((nothing, out, out)):
                    os.dup2(file, number)
                os.environ.update(command["environment"])
                time.time = lambda c=time.time, s=command["ahead"]: c() + s
                if command["fault"]:
                    moment(**command["fault"])
                return cli.main(["train", *command["start"]])
        print(answer, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
