"""Hosts of a network that this machine can make, and break: network namespaces on a bridge.

    with Hosts(2) as hosts:
        hosts[0].start([sys.executable, "..."], folder)
        hosts[1].cut()

Each host has a name, an address and a link of its own to the bridge, which is in a namespace too:
the network of the machine itself stays as it is. Linux, root, iproute2.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

NETWORK = "10.77.0"  # of this bridge alone, so that it collides with nobody's


def why_not() -> str:
    """Why this machine cannot make hosts, empty where it can."""
    if not shutil.which("ip") or not shutil.which("tc"):
        return "needs iproute2 (ip, tc)"
    trial = subprocess.run(
        ["unshare", "--net", "--uts", "ip", "link", "add", "one", "type", "veth", "peer", "two"],
        capture_output=True,
        text=True,
    )
    return "" if trial.returncode == 0 else f"no network namespaces here: {trial.stderr.strip()}"


def ip(*words: object) -> str:
    """What a command of iproute2 prints."""
    return subprocess.run(
        [str(word) for word in words], check=True, capture_output=True, text=True
    ).stdout


class Host:
    """One of the hosts; ``address`` is its IPv4 address, ``name`` its host name."""

    def __init__(self, job: str, number: int) -> None:
        self.name, self.address = f"host{number}", f"{NETWORK}.{number + 1}"
        self.space, self.switch, self.port = f"{job}-{number}", f"{job}-s", f"port{number}"

    def start(self, command: Sequence[object], **options) -> subprocess.Popen:
        """A process on this host."""
        return subprocess.Popen(self.command(command), start_new_session=True, **options)

    def command(self, command: Sequence[object]) -> list[str]:
        """The command that runs ``command`` on this host."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name]
        return [str(word) for word in ("ip", "netns", "exec", self.space, *named, *command)]

    def torchrun(
        self,
        words: Sequence[object],
        out: Path,
        *,
        nodes: object,
        store: Host,
        flags: Sequence[object] = (),
        **environment: str,
    ) -> subprocess.Popen:
        """``python WORDS`` under this host's torchrun, one process, for a job of ``nodes`` that
        meets on the host ``store``; what it says goes to ``out``."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes]
        command += ["--nproc-per-node", 1, "--rdzv-backend", "c10d", "--local-addr", self.address]
        command += ["--rdzv-endpoint", f"{store.address}:29400"]
        command += ["--rdzv-conf", f"is_host={int(self is store)}", *flags, *words]
        own = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", **environment}
        with open(out, "a") as file:
            quiet = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            return self.start(command, env={**os.environ, **own}, **quiet)

    def trainers(self) -> list[int]:
        """Of this host's processes those that train, not the torchrun that started them."""
        training = []
        for process in self.processes():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if b"torch.distributed.run" not in Path(f"/proc/{process}/cmdline").read_bytes():
                    training.append(process)
        return training

    def processes(self) -> list[int]:
        """Of every process on this host."""
        return [int(number) for number in ip("ip", "netns", "pids", self.space).split()]

    def signal(self, number: int) -> None:
        """Sends every process of this host a signal."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def cut(self) -> None:
        """Takes the cable out."""
        ip("ip", "-n", self.switch, "link", "set", self.port, "down")

    def mend(self) -> None:
        """Puts it back."""
        ip("ip", "-n", self.switch, "link", "set", self.port, "up")

    def rate(self, bits: float) -> None:
        """Limits what the link carries each way, bits/s."""
        burst = max(20_000, bits / 8 * 2e-3)  # bytes of 2 ms, more than a timer's tick
        for space, link in ((self.space, "eth0"), (self.switch, self.port)):
            limit = ["rate", f"{bits:.0f}bit", "burst", f"{burst:.0f}", "latency", "50ms"]
            ip("tc", "-n", space, "qdisc", "replace", "dev", link, "root", "tbf", *limit)

    def bytes(self) -> tuple[int, int]:
        """Sent and received by its interface since it was made, headers of Ethernet included."""
        link = json.loads(ip("ip", "-n", self.space, "-s", "-j", "link", "show", "eth0"))[0]
        return link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"]


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """``count`` hosts on a bridge; whatever runs on them ends with the block, or, should this
    process be killed, when the next one makes hosts."""
    for space in ip("ip", "netns", "list").split():
        job = space.partition("-")[0]
        if job.startswith("dclr") and not Path(f"/proc/{job[4:]}").exists():
            _remove(space)
    job = f"dclr{os.getpid()}"
    switch = f"{job}-s"
    made = [Host(job, number) for number in range(count)]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        ip("ip", "netns", "add", switch)
        ip("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("ip", "-n", switch, "link", "set", "bridge", "up")
        for host in made:
            ip("ip", "netns", "add", host.space)
            ends = ["link", "add", host.port, "type", "veth", "peer", "eth0", "netns", host.space]
            ip("ip", "-n", switch, *ends)
            ip("ip", "-n", switch, "link", "set", host.port, "master", "bridge", "up")
            ip("ip", "-n", host.space, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("ip", "-n", host.space, "link", "set", "eth0", "up")
            ip("ip", "-n", host.space, "link", "set", "lo", "up")
        yield made
    finally:
        for space in (switch, *(host.space for host in made)):
            _remove(space)
        signal.signal(signal.SIGTERM, before)


def _remove(space: str) -> None:
    """A namespace and every process in it."""
    with contextlib.suppress(subprocess.CalledProcessError):
        for process in ip("ip", "netns", "pids", space).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        ip("ip", "netns", "delete", space)
