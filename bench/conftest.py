"""What pytest-benchmark stores with every run: the machine as all result files describe it."""

from directclr_fast.machine import machine


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info.pop("node", None)  # the host's name
    machine_info["directclr_fast"] = machine()


def pytest_benchmark_update_json(config, benchmarks, output_json) -> None:
    output_json.pop("commit_info", None)  # machine() has it
