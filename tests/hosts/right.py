"""The loss and the trainer over two to four hosts are those of one process.

    python tests/hosts/right.py --out bench/results/hosts/right.json

First tests/test_distributed.py with each of its four processes on a host of its own: both ways to
gather, uneven rows, groups of 1 to 4. Then the runs of tests/test_train_distributed.py (BatchNorm
over all rows, uneven batches, gradient caching by three rules) under torchrun on 2, 3 and 4 hosts,
against one process: losses, and how far the weights are apart, relative to how far they went; a
hundredth of it is the bound. Linux, root.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import bridge
import pytest
import torch

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS))

import test_train_distributed as cases  # noqa: E402
import waiting  # noqa: E402
from test_train_run import log_of, train  # noqa: E402

from directclr_fast.machine import machine  # noqa: E402
from directclr_fast.train import ranks  # noqa: E402
from directclr_fast.train.checkpoint import write_json  # noqa: E402


class OnHosts:
    """A plugin of pytest: processes that a test starts together each get a host."""

    def __init__(self, hosts: list[bridge.Host]) -> None:
        self.hosts, self.outcomes, self.together = hosts, {}, waiting.together

    def pytest_configure(self) -> None:
        waiting.together = self.on_hosts

    def pytest_unconfigure(self) -> None:
        waiting.together = self.together

    def on_hosts(self, commands, folder, env, **options):
        """waiting.together, each command on a host of its own."""
        placed = [host.command(command) for host, command in zip(self.hosts, commands)]
        environment = {**env, "GLOO_SOCKET_IFNAME": "eth0"}
        return self.together(placed, folder, env=environment, **options)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] = self.outcomes.get(report.outcome, 0) + 1


def of_loss() -> dict:
    """Outcomes of the tests of the loss, and what the hosts sent for them."""
    with bridge.hosts(4) as hosts:
        plugin = OnHosts(hosts)
        file = str(TESTS / "test_distributed.py")
        code = pytest.main(
            ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not triton", file], [plugin]
        )
        sent = [host.bytes()[0] for host in hosts]
    return {"exit_code": int(code), **plugin.outcomes, "bytes_sent": sent}


def of_trainer(size: int, folder: Path) -> dict:
    """How far each run on ``size`` hosts is from that of one process."""
    words = [__file__, "--runs", folder / f"{size}"]
    with bridge.hosts(size) as hosts:
        jobs = [host.torchrun(words, folder / "out", nodes=size, store=hosts[0]) for host in hosts]
        ended = lambda: all(job.poll() is not None for job in jobs)  # noqa: E731
        waiting.until(ended, lambda: waiting.sizes(folder))
    if any(job.returncode for job in jobs):
        raise RuntimeError((folder / "out").read_text()[-4000:])
    result = {}
    for name in cases.RUNS:
        many, one, start = (folder / part / name for part in (f"{size}", "one", "start"))
        only = "weight" if name == "chunk" else ""  # whose running statistics move by chunks
        losses = [[record["loss"] for record in log_of(run)[1]] for run in (many, one)]
        result[name] = {
            "apart": cases.apart(many, one, only) / cases.apart(one, start, only),
            "loss": max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True)),
        }
    return result


def main() -> None:
    """Both parts; with --runs, one rank of the second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = {k: v for k, v in cases.RUNS.items() if k != "two-pass-start"}
    for name in ("chunk", "two-pass"):  # the same chunks, whatever the number of hosts
        runs[name] = {**runs[name], "batch_size": 48, "chunk_size": 4, "epochs": 4}
    cases.RUNS = runs
    if arguments.runs is not None:
        with ranks.launched(300.0):
            for name, settings in runs.items():
                train(arguments.runs, name, **{**cases.FEW, **settings})
        return
    if reason := bridge.why_not():
        sys.exit(f"right: {reason}")
    result = {"machine": machine(), "trainer": {}}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, settings in runs.items():
            train(folder / "one", name, **{**cases.FEW, **settings})
            train(folder / "start", name, **{**cases.FEW, **settings, "max_steps": 1})
        for size in (2, 3, 4):
            result["trainer"][size] = of_trainer(size, folder)
            for name, far in result["trainer"][size].items():
                print(f"{size} hosts, {name}: weights {far['apart']:.1e} of their way apart, "
                      f"losses {far['loss']:.1e}", flush=True)  # fmt: skip
    result["loss"] = of_loss()
    print(result["loss"])
    if arguments.out:
        write_json(arguments.out, result, indent=1)
    far = [far["apart"] for of in result["trainer"].values() for far in of.values()]
    sys.exit(max(far) > 0.01 or result["loss"]["exit_code"] != 0)


if __name__ == "__main__":
    main()
