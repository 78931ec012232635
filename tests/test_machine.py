"""One description of the machine: what it says, and that doctor and result files say the same."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from directclr_fast import doctor, machine

ROOT = Path(__file__).parents[1]


def test_it_is_plain_values_with_the_versions_in_use():
    values = machine.machine()
    assert json.loads(json.dumps(values)) == values
    assert values["torch"] == torch.__version__ and values["threads"] == torch.get_num_threads()
    assert values["versions"]["torch"] == torch.__version__.split("+")[0]
    assert None not in values["versions"].values()


def test_the_commit_is_that_of_the_checkout(monkeypatch):
    def head(*_):
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    monkeypatch.setenv("DIRECTCLR_COMMIT", "of a copy")
    commit = machine.commit()
    assert commit["commit"] == head() and isinstance(commit["dirty"], bool)
    monkeypatch.setattr(machine, "_printed", lambda *_, **__: None)
    assert machine.commit() == {"commit": "of a copy", "dirty": None}


def test_no_gpu_is_asked_where_none_is_wanted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert "gpu" not in machine.machine(gpu=False) and len(machine.devices(gpu=False)) == 1


def test_gpus_are_listed_and_the_first_is_described(monkeypatch):
    card = type("Card", (), {"name": "G", "major": 9, "minor": 0, "total_memory": 3 * 2**30})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    of_card = {"name": "G", "capability": "9.0", "memory_gib": 3.0}
    assert machine.devices()[1:] == [{"device": f"cuda:{i}", **of_card} for i in (0, 1)]
    values = machine.machine()
    assert (values["gpu"], values["gpu_memory_gib"]) == ("G", 3.0)
    assert machine.describe(values).startswith(f"G, torch {torch.__version__}")


def test_doctor_says_the_same():
    report = doctor.report()
    assert report["devices"] == machine.devices() and report["packages"] == machine.packages()


def test_older_result_files_are_described():
    for path in (ROOT / "bench/results").rglob("*.json"):
        if values := json.loads(path.read_text()).get("machine"):
            assert f"torch {values['torch']}" in machine.describe(values), path


@pytest.mark.parametrize(
    "gpu,name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Tesla T4", "t4"),
    ],
)
def test_results_are_named_by_the_gpu(gpu, name):
    assert machine.short_name(gpu) == name
