"""What pytest-benchmark stores with every run: the machine as all result files describe it."""

from __future__ import annotations

from directclr_fast.machine import machine


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """The machine's description instead of its host name."""
    machine_info.pop("node", None)
    machine_info["directclr_fast"] = machine()


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    """Without what pytest-benchmark finds out about the project by itself: machine() has it."""
    output_json.pop("commit_info", None)
