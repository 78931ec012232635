"""Training over hosts whose network, power, disk and patience fail: a campaign.

    python tests/hosts/faults.py --faults 200 --out bench/results/hosts/faults.json

Two or three hosts on a bridge share a tiny run that saves at every step. At a random moment of a
random phase something happens to one of them. What is left ends soon after the timeout, each rank
with one sentence that says who is missing; the checkpoint loads; the run is resumed, and so on. A
run that reaches its end must have the bits of one that nothing happened to. Links that are back
after two seconds, processes that stop for two and hosts that are slow must not end it. Every fourth
run goes on with one, two or three ranks by chance: of it the order of the data is compared. In a
third of jobs Python's clock on the second host is an hour ahead. (faketime cannot show more: what
waits until a time by the system's clock then waits an hour longer, on this host alone.) A campaign
that was interrupted goes on where its file ends. Linux, root.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import bridge
import torch

from directclr_fast.machine import machine
from directclr_fast.train import checkpoint

HERE = Path(__file__).parent
GATE = runpy.run_path(str(HERE.parent / "gates" / "faults.py"))
PHASES = ("rendezvous", "forward", "backward", "checkpoint")
# What the run must get over, and what it must end by.
PASSING = ("link away for 2 s", "stopped for 2 s", "slow for 3 s")
LASTING = ("link cut", "killed", "power off", "stopped", "disk full")
EPOCHS = 15  # of 3 steps


class Rank:
    """One process of a job, on its host."""

    def __init__(self, nursery: Nursery, process: int, out: Path) -> None:
        self.nursery, self.process, self.out = nursery, process, out
        self.ended: float | None = None

    def over(self) -> bool:
        """Whether it has ended, and since when (``ended``)."""
        if self.ended is None:
            state = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0]
            self.ended = time.monotonic() if state == "Z" else None
        return self.ended is not None

    def code(self) -> int:
        """Its exit code, once it is over."""
        return self.nursery.ask(wait=self.process)

    def sentences(self) -> list[str]:
        """What it gave as its end."""
        return [line for line in self.out.read_text().splitlines() if "error: " in line]


class Nursery:
    """The process on a host that starts ranks there."""

    def __init__(self, host: bridge.Host) -> None:
        self.host = host
        own = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, HERE / "nursery.py"]
        self.process = host.start(command, env={**os.environ, **own}, **pipes)

    def ask(self, **command) -> int:
        """The answer to a command."""
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


class Campaign:
    """``timeout``: of the runs; ``late``: seconds after it from which an end counts as a hang."""

    def __init__(self, folder: Path, hosts: list[bridge.Host], timeout: float, late: float) -> None:
        self.folder, self.timeout, self.late = folder, timeout, late
        self.nurseries = [Nursery(host) for host in hosts]
        self.jobs, self.undisturbed = 0, {}

    def start(
        self,
        size: int,
        run: Path,
        fault: dict | None = None,
        victim: int = 0,
        ahead: float = 0.0,
    ) -> list[Rank]:
        """A job of ``size`` ranks that goes on with ``run``; the second's clock is ``ahead``."""
        self.jobs += 1
        store = self.nurseries[0].host.address
        flags = ["--resume", "--name", run.name, "--checkpoint-dir", str(run.parent)]
        flags += ["--epochs", str(EPOCHS), "--timeout", str(self.timeout)]
        for name, value in GATE["SETTINGS"].items():
            flags += [f"--{name.replace('_', '-')}", str(value)]
        ranks = []
        for rank, nursery in enumerate(self.nurseries[:size]):
            environment = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": store}
            environment |= {"LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 20_000 + self.jobs % 10_000}
            out = self.folder / f"job{self.jobs}-rank{rank}.txt"
            started = nursery.ask(
                start=flags, out=str(out), fault=fault if rank == victim else None,
                environment={name: str(value) for name, value in environment.items()},
                ahead=ahead if rank == 1 else 0.0,
            )  # fmt: skip
            ranks.append(Rank(nursery, started, out))
        return ranks

    def whole(self, size: int) -> tuple:
        """Outcome of a run of ``size`` ranks that nothing happened to."""
        if size not in self.undisturbed:
            run = self.folder / f"whole{size}"
            if any(self.wait(self.start(size, run), 600)):
                raise RuntimeError(f"faults: the run of {size} that is left alone failed")
            self.undisturbed[size] = GATE["outcome"](run)
        return self.undisturbed[size]

    def wait(self, ranks: list[Rank], seconds: float) -> list[int]:
        """Exit codes; whoever has not ended after ``seconds`` is killed, and has None."""
        until(lambda: all([rank.over() for rank in ranks]), seconds)
        hung = [not rank.over() for rank in ranks]
        for rank, hangs in zip(ranks, hung):
            if hangs:
                os.kill(rank.process, signal.SIGKILL)
        codes = [rank.code() for rank in ranks]
        return [None if hangs else code for hangs, code in zip(hung, codes)]

    def fault(self, run: Path, size: int, chance: random.Random) -> dict:
        """One job with one fault, from where ``run`` is; what happened."""
        kind = chance.choice(PASSING + LASTING) if size > 1 else "killed"
        phase = "checkpoint" if kind == "disk full" else chance.choice(PHASES)
        victim = 0 if kind == "disk full" else chance.randrange(size)
        step = step_of(run) + chance.randrange(1, 5)
        at, done = self.folder / "at", self.folder / "done"
        for path in (at, done):
            path.unlink(missing_ok=True)
        where = {"phase": phase, "step": step, "where": chance.random()}
        told = {"kind": kind, "ranks": size, "victim": victim, **where}
        told["clocks apart"] = chance.random() < 1 / 3
        hook = None if kind == "disk full" else {**where, "at": str(at), "done": str(done)}
        ranks = self.start(size, run, hook, victim, 3600.0 * told["clocks apart"])
        host, process = self.nurseries[victim].host, ranks[victim].process
        filled = run.parent / "filled"
        if kind == "disk full":
            arrived = until(lambda: step_of(run) >= step or all(r.over() for r in ranks), 120)
            with contextlib.suppress(OSError), open(filled, "wb") as file:
                while True:
                    file.write(bytes(1 << 16))
        else:
            arrived = until(lambda: at.exists() or all(r.over() for r in ranks), 120)
        begin = time.monotonic()
        if "link" in kind or kind == "power off":
            host.cut()
        if kind in ("killed", "power off"):
            os.kill(process, signal.SIGKILL)
        if "stopped" in kind:
            os.kill(process, signal.SIGSTOP)
        done.touch()
        if kind in PASSING:
            share = 0.95 if kind == "slow for 3 s" else 1.0  # of the time that it stands still
            end = begin + (3.0 if share < 1 else 2.0)
            while time.monotonic() < end:
                time.sleep(0.1 * share)
                if share < 1:
                    os.kill(process, signal.SIGCONT)
                    time.sleep(0.1 * (1 - share))
                    os.kill(process, signal.SIGSTOP)
            host.mend()
            os.kill(process, signal.SIGCONT)
            goal = step + 3
            until(lambda: step_of(run) >= goal or all([r.over() for r in ranks]), 60)
            over = any([r.over() for r in ranks])
            told["went on"] = step_of(run) >= goal and not (over and step_of(run) < 3 * EPOCHS)
            for rank in ranks:
                if not rank.over():
                    os.kill(rank.process, signal.SIGKILL)
            codes = self.wait(ranks, 60)
            told["seconds"] = None
            living = []
        else:
            watched = [
                r for k, r in enumerate(ranks) if kind in ("link cut", "disk full") or k != victim
            ]
            codes = self.wait(watched, self.timeout + self.late)
            took = [r.ended - begin for r in watched if r.ended]
            told["seconds"] = round(max(took), 1) if took else None
            if len(watched) < size:
                os.kill(process, signal.SIGKILL)
                self.wait([ranks[victim]], 60)
            host.mend()
            filled.unlink(missing_ok=True)
            living = watched
        told["arrived"] = bool(arrived)
        told["hung"], told["codes"] = codes.count(None), codes
        told["said"] = [s[-1] if (s := rank.sentences()) else "" for rank in living]
        told["all say it"] = all(
            len(rank.sentences()) == 1 and names(kind, victim, number, rank.sentences()[0])
            for number, rank in enumerate(ranks)
            if rank in living
        )
        with warnings.catch_warnings(record=True) as damaged:
            warnings.simplefilter("always")
            there = any(run.glob("checkpoint*.pt"))
            try:
                told["checkpoint"] = checkpoint.load(run)["step"] if there else 0
            except checkpoint.CheckpointError:
                told["checkpoint"] = None
        told["damaged"] = len(damaged)
        return told


def compared(got: tuple, want: tuple) -> dict:
    """Whether a run's outcome is another's to the bit; its data's order; how far its weights are,
    relative to their size."""
    same = GATE["same"]
    parts = [(state["sampler"], state["rng"]["views"]) for state, _ in (got, want)]
    steps = [[record["step"] for record in records] for _, records in (got, want)]
    a, b = (
        torch.cat([v.double().flatten() for v in state["model"].values()])
        for state, _ in (got, want)
    )
    apart = float((a - b).norm() / b.norm())
    order = same(*map(list, parts)) and steps[0] == steps[1]
    return {"bitwise": same(got, want), "order": order, "apart": apart}


def names(kind: str, victim: int, number: int, said: str) -> bool:
    """Whether the sentence of rank ``number`` says what is missing."""
    if kind == "disk full":
        return "could not write" in said or "No space left" in said or f"rank {victim}" in said
    if number == victim:  # it is alone: its host lost the others
        return "no answer from" in said or "did not come" in said
    return f"rank {victim}" in said


def until(true, seconds: float) -> bool:
    """Whether ``true()`` became true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def step_of(run: Path) -> int:
    """The last step in the log of ``run``, 0 for none."""
    with contextlib.suppress(FileNotFoundError):
        lines = (run / "log.jsonl").read_bytes().split(b"\n")[:-1]
        return json.loads(lines[-1]).get("step", 0) if lines else 0
    return 0


def table(faults: list[dict]) -> str:
    """Markdown: what happened, how often, how it ended."""
    heads = ("fault", "times", *PHASES, "longest end, s", "all say it", "went on", "lost")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for kind in PASSING + LASTING:
        of = [fault for fault in faults if fault["kind"] == kind]
        phases = collections.Counter(fault["phase"] for fault in of)
        ends = [fault["seconds"] for fault in of if fault["seconds"] is not None]
        cells = [kind, len(of), *(phases[phase] for phase in PHASES), max(ends, default="")]
        passing = kind in PASSING
        cells += ["" if passing else sum(fault["all say it"] for fault in of)]
        cells += [sum(fault["went on"] for fault in of) if passing else ""]
        cells += [sum(map(lost, of))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def lost(fault: dict) -> bool:
    """Whether a fault left what it must not: a process that hangs, a checkpoint that does not load,
    a rank without its sentence or exit code 1, a run that ended where it should have gone on."""
    failed = fault["kind"] in LASTING and set(fault.get("codes", ())) - {1}
    return bool(
        failed or fault["hung"] or fault["checkpoint"] is None or not fault["all say it"]
        or not fault.get("went on", True)
    )  # fmt: skip


def main() -> None:
    """Runs the campaign, or goes on with it, and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=5.0, help="--timeout of the runs")
    parser.add_argument("--late", type=float, default=20.0, help="seconds after it: a hang")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if reason := bridge.why_not():
        sys.exit(f"faults: {reason}")
    result = {"machine": machine(), "timeout_s": arguments.timeout, "faults": [], "runs": []}
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text())
    faults, runs = result["faults"], result["runs"]
    with bridge.hosts(3) as hosts, tempfile.TemporaryDirectory() as folder, small_disk() as disk:
        campaign = Campaign(Path(folder), hosts, arguments.timeout, arguments.late)
        run = disk / "run"
        while len(faults) < arguments.faults:
            chance, first = random.Random(f"{arguments.seed} {len(faults)}"), len(faults)
            sizes = chance.choice(((2,), (2,), (3,), (1, 2, 3)))
            whole = campaign.whole(sizes[-1])
            shutil.rmtree(run, ignore_errors=True)
            while step_of(run) < 3 * EPOCHS - 8:
                chance = random.Random(f"{arguments.seed} {len(faults)}")
                told = campaign.fault(run, chance.choice(sizes), chance)
                faults.append(told)
                print(len(faults), "LOST" if lost(told) else "", json.dumps(told), flush=True)
                checkpoint.write_json(arguments.out, result, indent=1)
            codes = campaign.wait(campaign.start(chance.choice(sizes), run), 120)
            ended = {"ranks": sizes, "faults": len(faults) - first, "codes": codes}
            if not any(codes):
                ended |= compared(GATE["outcome"](run), whole)
            runs.append(ended)
            print("run:", json.dumps(ended), flush=True)
            checkpoint.write_json(arguments.out, result, indent=1)
    print(table(faults))
    kept, changed = ([r for r in runs if (len(r["ranks"]) > 1) == many] for many in (False, True))
    print(
        f"{sum(map(lost, faults))} of {len(faults)} faults lost something; bitwise equal: "
        f"{sum(run.get('bitwise', False) for run in kept)} of {len(kept)} runs that kept their "
        f"number of ranks; data in order: {sum(run.get('order', False) for run in changed)} of "
        f"{len(changed)} that changed it"
    )


@contextlib.contextmanager
def small_disk():
    """A folder that holds 64 MiB."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


if __name__ == "__main__":
    main()
