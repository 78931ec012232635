"""A job of torchrun with --nnodes 1:3 whose hosts die, join and are cut off.

    python tests/hosts/elastic.py --out bench/results/hosts/elastic.json

Two hosts begin. All that runs on the second is killed; the first must go on alone. A third joins;
there must be two ranks again. Its link is cut; the first must go on alone, and the cut host's
torchrun must end too, by the kernel's limit on unanswered packets. Seconds until each, steps of the
log without a gap. Linux, root.
"""

from __future__ import annotations

import argparse
import json
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bridge

from directclr_fast.machine import machine
from directclr_fast.train.checkpoint import write_json

SETTINGS = runpy.run_path(str(Path(__file__).parents[1] / "gates" / "faults.py"))["SETTINGS"]
TIMEOUT, RETRIES = 5, 6  # of the trainer, seconds; net.ipv4.tcp_retries2, some 25 s
PATIENCE = 300.0  # seconds without the next event


def main() -> None:
    """Prints and writes what happened when."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if reason := bridge.why_not():
        sys.exit(f"elastic: {reason}")
    events = {}
    with bridge.hosts(3) as hosts, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["-m", "directclr_fast", "train", "--resume", "--name", "run"]
        settings = {**SETTINGS, "epochs": 100_000, "timeout": TIMEOUT, "checkpoint_dir": folder}
        for setting, value in settings.items():
            words += [f"--{setting.replace('_', '-')}", value]

        def start(number: int):
            return hosts[number].torchrun(
                words, folder / f"{number}.txt", nodes="1:3", store=hosts[0],
                flags=["--max-restarts", 3], TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            )  # fmt: skip

        def steps() -> list[int]:
            log = folder / "run" / "log.jsonl"
            lines = log.read_bytes().split(b"\n")[1:-1] if log.exists() else []
            return [json.loads(line)["step"] for line in lines]

        def starts() -> list[str]:
            said = (folder / "0.txt").read_text().splitlines()
            return ["2 ranks" in line for line in said if line.startswith("directclr, dim")]

        def until(event: str, happened: Callable[[], bool]) -> None:
            begin = time.monotonic()
            while not happened():
                if time.monotonic() - begin > PATIENCE:
                    said = [path.read_text()[-3000:] for path in sorted(folder.glob("*.txt"))]
                    sys.exit(f"elastic: {event}: not within {PATIENCE:.0f} s\n" + "\n".join(said))
                time.sleep(0.1)
            events[event] = round(time.monotonic() - begin, 1)
            print(event, events[event], flush=True)

        def further(ranks: list[bool]) -> Callable[[], bool]:
            return lambda: starts() == ranks and len(steps()) > done + 5

        for host in hosts:
            setting = f"net.ipv4.tcp_retries2={RETRIES}"
            bridge.ip("ip", "netns", "exec", host.space, "sysctl", "-w", setting)
        done = 0
        start(0), start(1)
        until("two hosts train", further([True]))
        hosts[1].signal(signal.SIGKILL)
        done = len(steps())
        until("one is killed: the other goes on alone", further([True, False]))
        third, done = start(2), len(steps())
        until("a third joins: two train", further([True, False, True]))
        hosts[2].cut()
        done = len(steps())
        until("its link is cut: the first goes on alone", further([True, False, True, False]))
        until("torchrun of the host that was cut off has ended", lambda: third.poll() is not None)
        logged = steps()
        said = (folder / "2.txt").read_text()
        events["steps, without a gap"] = [len(logged), logged == [*range(1, len(logged) + 1)]]
        events["the host that was cut off said"] = [
            line for line in said.splitlines() if "directclr-fast: " in line and "error" in line
        ]
    print(json.dumps(events, indent=1))
    if arguments.out:
        settings = {"timeout_s": TIMEOUT, "tcp_retries2": RETRIES}
        write_json(arguments.out, {"machine": machine(), **settings, "events": events}, indent=1)


if __name__ == "__main__":
    main()
