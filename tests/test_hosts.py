"""Two hosts, which are network namespaces on a bridge: they train as one process does, and when the
link between them is cut both end with a sentence. More of it: tests/hosts/."""

from __future__ import annotations

import re

import pytest
import torch
import waiting
from hosts import bridge
from test_train_distributed import FEW, apart
from test_train_run import log_of, state_of, train

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(bool(bridge.why_not()), reason=bridge.why_not() or "can"),
]


def test_two_hosts_are_one_process_until_their_link_is_cut(tmp_path, run_dir):
    timeout = 15  # seconds; nothing here is slower on a busy machine
    settings = {**FEW, "epochs": 100_000, "max_steps": 50_000, "save_every": 1, "timeout": timeout}
    words = ["-m", "directclr_fast", "train", "--name", "run"]
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", value]
    log = tmp_path / "host0" / "run" / "log.jsonl"

    def step():
        return log.read_bytes().count(b"\n") - 1 if log.exists() else 0

    with bridge.hosts(2) as hosts:
        jobs, said = [], [tmp_path / f"{host.name}.txt" for host in hosts]
        for host, out in zip(hosts, said):
            own = [*words, "--checkpoint-dir", tmp_path / host.name]
            jobs.append(host.torchrun(own, out, nodes=2, store=hosts[0]))
        waiting.until(lambda: step() > 5 or any(job.poll() for job in jobs), step)
        hosts[1].cut()
        waiting.until(lambda: not any(host.trainers() for host in hosts), step)
    texts = [path.read_text() for path in said]
    last = state_of(tmp_path / "host0" / "run")["step"]
    assert last >= step() - 1 > 4, texts
    kept = f"; the last good checkpoint is {tmp_path / 'host0' / 'run' / 'checkpoint.pt'}"
    for text, missing in zip(texts, ("rank 1 on host1", f"rank 0 at {bridge.NETWORK}.1, where")):
        (sentence,) = [line for line in text.splitlines() if "error: no answer" in line]
        assert f"no answer from {missing}" in sentence, sentence
        at = int(re.search(rf" step (\d+), with a timeout of {timeout} s \(", sentence)[1])
        assert at in (last, last + 1, last + 2), (sentence, last)
        assert sentence.endswith(kept) == ("rank 1" in missing)
        assert "deprecated" not in text
    assert not list((tmp_path / "host1").glob("run/*"))  # the first rank alone writes

    train(run_dir, "one", **{**settings, "max_steps": last})
    train(run_dir, "start", **{**settings, "max_steps": 1})
    one, start = run_dir / "one", run_dir / "start"
    assert apart(tmp_path / "host0" / "run", one) < 0.01 * apart(start, one)
    ours, theirs = (log_of(folder)[1] for folder in (tmp_path / "host0" / "run", one))
    for a, b in zip(ours, theirs):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert torch.equal(state_of(one)["rng"]["views"], state_of(log.parent)["rng"]["views"])
