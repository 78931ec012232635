"""Training under kill -9: whole runs at random moments, and one rank of two under torchrun.

    python tests/gates/faults.py --out bench/results/cpu-2core-zen5/faults.json

A tiny run that saves at every step, so that much of its time goes into saving. First campaign: the
run is killed at a random moment, its checkpoint read, the run resumed, and so on; each run that
reaches its end must have the bits of one that nobody killed. Second: one of the two processes of a
torchrun job is killed at random steps, and torchrun restarts the job, which must go on, without a
step for no more than --timeout seconds, and end with the bits of an undisturbed job. Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded: forked children cannot share a pool

import torch
import torch._dynamo  # which every optimizer imports, in a second

from directclr_fast.machine import machine
from directclr_fast.train import checkpoint
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.loop import Trainer

KEPT = {f.name for f in dataclasses.fields(TrainConfig) if f.metadata["resumed"] == "same"}

SETTINGS = {
    "data": "fake:n=48,size=8,channels=1",
    "encoder": "small",
    "image_size": 8,
    "views": "affine",
    "batch_size": 16,
    "optimizer": "adamw",
    "learning_rate": 2e-3,
    "save_every": 1,
    "device": "cpu",
}


def same(a, b) -> bool:
    """Bitwise equality of nested containers of tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """What a finished run left: its checkpoint and its log, without times and places."""
    state = checkpoint.load(folder)
    state["config"] = {k: v for k, v in state["config"].items() if k in KEPT}
    del state["log_bytes"]
    for random_state in (state["rng"], *state["rng_of_other_ranks"]):
        del random_state["python"], random_state["numpy"]  # a process starts with any, uses neither
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    return state, [{k: v for k, v in r.items() if k != "images_per_second"} for r in records]


def forked(folder: Path, epochs: int) -> int:
    """Process id of a run in ``folder``, started anew or resumed; nothing is imported again."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        settings = {**SETTINGS, "epochs": epochs, "checkpoint_dir": str(folder.parent)}
        config = TrainConfig(**settings, name=folder.name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(config, resume=True, progress=False).run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kills(count: int, folder: Path, epochs: int = 20, seed: int = 0) -> dict:
    """The first campaign, ``count`` kills long."""
    whole, killed = folder / "whole", folder / "killed"
    begin = time.monotonic()
    if os.waitpid(forked(whole, epochs), 0)[1] != 0:
        raise RuntimeError("faults: the run that nobody kills failed")
    duration = time.monotonic() - begin
    want = outcome(whole)
    chance = random.Random(seed)
    tally = {"kills": 0, "while_saving": 0, "before_the_first_checkpoint": 0, "unloadable": 0}
    tally |= {"newest_damaged": 0, "runs": 0, "runs_bitwise_equal": 0, "failed": 0}

    def finished(status: int) -> None:
        tally["runs"] += 1
        tally["failed"] += status != 0
        tally["runs_bitwise_equal"] += status == 0 and same(outcome(killed), want)
        shutil.rmtree(killed)

    while tally["kills"] < count:
        child = forked(killed, epochs)
        time.sleep(chance.random() * 0.4 * duration)
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            finished(status)
            continue
        tally["kills"] += 1
        tally["while_saving"] += any(killed.glob(".checkpoint.pt*"))
        if not any(killed.glob("checkpoint*.pt")):
            tally["before_the_first_checkpoint"] += 1
            continue
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                checkpoint.load(killed)
            except checkpoint.CheckpointError:
                tally["unloadable"] += 1
        tally["newest_damaged"] += bool(said)
    finished(os.waitpid(forked(killed, epochs), 0)[1])
    return {**tally, "seconds": round(time.monotonic() - begin, 1)}


def rank_kills(count: int, folder: Path, timeout: float = 120.0, seed: int = 0) -> dict:
    """The second campaign, ``count`` kills long."""
    chance = random.Random(seed)
    steps = 12 * count
    settings = {**SETTINGS, "epochs": steps // 3}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(count), "--monitor-interval", "0.2", "--standalone"]
    command += ["--local-addr", "127.0.0.1"]  # the machine's own name need not resolve
    command += ["-m", "directclr_fast", "train", "--resume", "--name", "pair-killed"]
    for name, value in {**settings, "checkpoint_dir": folder}.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    begin = time.monotonic()
    whole = [sys.executable, Path(__file__).parents[1] / "launch.py", "2", folder]
    whole += [json.dumps(settings), "def main(rank): train('pair')"]
    subprocess.run(whole, check=True, timeout=10 * timeout, **quiet)
    tally = {"kills": 0, "resumed": 0, "hangs": 0, "longest_stop_s": 0.0, "steps": []}
    log = folder / "pair-killed" / "log.jsonl"
    goals = sorted(chance.sample(range(2, steps - 5), count))
    job = subprocess.Popen(command, **quiet)
    try:
        for goal in goals:
            _wait(lambda goal=goal: _step(log) >= goal, job, log, timeout)
            while not (pair := _children(job.pid)):
                # It was at its end before this process, held up, saw the goal: another one.
                job.wait()
                shutil.rmtree(log.parent)
                job = subprocess.Popen(command, **quiet)
                _wait(lambda goal=goal: _step(log) >= goal, job, log, timeout)
            victim = chance.choice(pair)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            step, moment = _step(log), time.monotonic()
            tally["kills"] += 1
            tally["steps"].append(step)

            def goes_on(job=job, victim=victim, step=step) -> bool:
                now = _children(job.pid)
                # The other rank may have been a step or two ahead of the log.
                return len(now) == 2 and victim not in now and _step(log) > step + 2

            _wait(goes_on, job, log, timeout)
            tally["resumed"] += 1
            tally["longest_stop_s"] = max(tally["longest_stop_s"], time.monotonic() - moment)
        _wait(lambda: job.poll() is not None, job, log, timeout)
        tally["exit_code"] = job.poll()
    except TimeoutError:
        tally["hangs"] += 1
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    tally["bitwise_equal"] = tally["hangs"] == 0 and same(
        outcome(folder / "pair"), outcome(folder / "pair-killed")
    )
    tally["longest_stop_s"] = round(tally["longest_stop_s"], 1)
    return {**tally, "seconds": round(time.monotonic() - begin, 1)}


def _wait(until, job: subprocess.Popen, log: Path, timeout: float) -> None:
    """Returns when ``until()`` is true or the job has ended well. TimeoutError if it failed or has
    logged no step for ``timeout`` seconds: a slow machine is no hang."""
    step, end = _step(log), time.monotonic() + timeout
    while not until() and job.poll() != 0:
        if job.poll() is not None or time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)
        if _step(log) != step:
            step, end = _step(log), time.monotonic() + timeout


def _step(log: Path) -> int:
    """The last step that is wholly in the log; 0 for none."""
    try:
        lines = log.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return json.loads(lines[-1]).get("step", 0) if lines else 0


def _children(parent: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def main() -> None:
    """Runs both campaigns and prints their tallies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rank-kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=20, help="of 3 steps, of the killed run")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds without a step: a hang"
    )
    parser.add_argument("--out")
    arguments = parser.parse_args()
    result = {"machine": machine(), "timeout_s": arguments.timeout}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.kills:
            result["kill_9"] = kills(arguments.kills, Path(folder), arguments.epochs)
            print("kill -9:", json.dumps(result["kill_9"]), flush=True)
        if arguments.rank_kills:
            tally = rank_kills(arguments.rank_kills, Path(folder), arguments.timeout)
            result["rank_killed"] = tally
            print("rank killed:", json.dumps(tally), flush=True)
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
