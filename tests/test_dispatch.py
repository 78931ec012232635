"""Which backend runs, why not another, and what doctor says of it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from directclr_fast import dispatch, doctor
from directclr_fast.backends import hopper, packed
from directclr_fast.problem import NEGATIVES, PRECISIONS
from directclr_fast.testing import problem


def test_every_backend_of_the_table_loads_and_answers():
    for name in dispatch.PRIORITY:
        backend = dispatch.load(name)
        assert backend.name == name
        for negatives in NEGATIVES:
            for precision in PRECISIONS:
                reasons = backend.why_not(problem(negatives=negatives, precision=precision))
                assert all(isinstance(reason, str) and reason for reason in reasons)


def test_automatic_choice_takes_the_first_that_can():
    assert dispatch.choose(problem()).backend == dispatch.PRIORITY[0]
    assert dispatch.choose(problem(dtype=torch.float64)).backend == "torch"
    assert dispatch.choose(problem(negatives="same")).backend == "reference"


def test_refusals_carry_the_call_and_every_reason():
    with pytest.raises(NotImplementedError) as caught:
        dispatch.choose(problem(precision="fp8"))
    text = str(caught.value)
    assert "64 x 64 rows, 16 of 32 columns, float32 on cpu" in text
    assert all(f"{name}: " in text for name in dispatch.PRIORITY)


def test_sums_without_a_maximum_are_used_only_where_they_fit():
    """exp(1/temperature) times N, and the reciprocal, must stay normal fp32 numbers."""
    assert problem(rows=2**20, candidates=2**20).bounded(1 / 0.1)
    assert not problem().bounded(1 / 0.01)
    assert problem(dtype=torch.float64).bounded(1 / 0.01)


def test_doctor_reports_versions_devices_and_reasons():
    report = doctor.report()
    json.dumps(report)
    assert report["packages"]["torch"] == torch.__version__.split("+")[0]
    assert report["devices"][0]["device"] == "cpu"
    assert set(report["backends"]) == set(dispatch.PRIORITY)
    assert report["chosen"]["cpu"] == dispatch.PRIORITY[0]
    text = doctor.text(report)
    assert "on cpu: available" in text and "fp32) on cpu: " in text


@pytest.mark.parametrize("name", ["portable", "none such"])
def test_the_environment_names_the_instruction_set(name):
    pytest.importorskip("directclr_fast._cpu")
    code = "from directclr_fast.backends import cpu; print(cpu._cpu.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DIRECTCLR_FAST_ISA": name},
        capture_output=True,
        text=True,
    )
    if name == "portable":
        assert done.stdout.strip() == "portable", done.stderr
    else:
        assert "DIRECTCLR_FAST_ISA: expected one of" in done.stderr and "'none such'" in done.stderr


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_the_capability_is_that_of_the_device_of_the_views_asked_once(monkeypatch, name):
    pytest.importorskip("triton")
    asked = []
    of_devices = {0: (9, 0), 1: (7, 5)}

    def of_device(index):
        asked.append(index)
        return of_devices[index]

    monkeypatch.setattr(packed, "_capability", functools.cache(of_device))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    if hopper._cuda is None:
        monkeypatch.setattr(hopper, "_cuda", object())
    there = problem(device_type="cuda", dtype=torch.float16, precision="fp16")
    for index, wanted in ((0, False), (1, True), (None, False), (1, True)):
        reasons = dispatch.load(name).why_not(there.replace(device_index=index))
        assert any("got 7.5" in reason for reason in reasons) == wanted
    assert asked == [0, 1]
