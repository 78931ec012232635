"""Ranks of a training on this machine, forked by one process that has imported everything.

    python launch.py WORLD FOLDER SETTINGS SCRIPT

SETTINGS: of every TrainConfig, as JSON. SCRIPT defines ``main(rank)``, which each of the WORLD
processes runs, from the names below. The exit status is 1 if it raises in one of them.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch
import torch._dynamo  # which every optimizer imports, in a second
import torch.distributed as dist

from directclr_fast.train import checkpoint, loop, ranks
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.loop import Trainer, TrainingDiverged, TrainingStopped


def trainer(name, *, resume=False, overwrite=False, **settings):
    config = TrainConfig(**{**SETTINGS, "checkpoint_dir": FOLDER, "name": name, **settings})
    return Trainer(config, resume=resume, overwrite=overwrite, progress=False)


def train(name, **settings):
    return trainer(name, **settings).run()


def run(rank: int, reader: int, main) -> None:
    """One rank; never returns."""
    code = 1
    try:
        port = os.read(reader, 5)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": int(port)}
        names |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        os.environ.update({k: str(v) for k, v in names.items()})
        with ranks.launched(900):
            main(rank)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    WORLD, FOLDER, SETTINGS = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    names = {
        "checkpoint": checkpoint, "dist": dist, "loop": loop, "os": os, "ranks": ranks,
        "torch": torch, "train": train, "trainer": trainer, "TrainingDiverged": TrainingDiverged,
        "TrainingStopped": TrainingStopped,
    }  # fmt: skip
    exec(sys.argv[4], names)
    reader, writer = os.pipe()
    children = []
    for rank in range(WORLD):
        children.append(os.fork())
        if children[-1] == 0:
            run(rank, reader, names["main"])
    # A store of the parent's on a port that the system gives: nobody takes it before the ranks
    # meet. It has threads, and a fork copies what they have locked: hence it comes after them.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writer, f"{store.port:5}".encode() * WORLD)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(any(codes))
