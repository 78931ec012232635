"""What PyTorch may do around the loss: inputs of any origin, transforms, checkpoints, switches.

The numbers are those of the public reports each test answers.
"""

from __future__ import annotations

import pytest
import torch

from directclr_fast import fast_directclr_loss
from directclr_fast.products import fp32_products, may_round
from directclr_fast.testing import backends, eager_loss, evaluate, make_views, relative_error

BACKENDS = [*backends(), "reference"]
SWITCHES = {
    "all": lambda: torch.backends,
    "cuda": lambda: torch.backends.cuda.matmul,
    "cpu": lambda: torch.backends.mkldnn.matmul,
}


@pytest.fixture
def views():
    return make_views(24, 32, dtype=torch.float32)


@pytest.fixture
def switches():
    """torch's switches for fp32 products, as they were, whatever a test turns."""

    def untouched():
        torch.set_float32_matmul_precision("highest")
        for switch in SWITCHES.values():
            switch().fp32_precision = "none"

    untouched()
    yield
    untouched()


@pytest.mark.parametrize("which,value", [
    ("all", "tf32"), ("all", "ieee"), ("all", "bf16"), ("cuda", "tf32"), ("cuda", "ieee"),
    ("cpu", "tf32"), ("cpu", "bf16"), ("cpu", "ieee"),
])  # fmt: skip
def test_the_newer_precision_switches_break_no_call(which, value, views, switches):
    truth = evaluate(eager_loss, *(r.double() for r in views), 20)
    SWITCHES[which]().fp32_precision = value
    for backend in BACKENDS:
        for precision in ("auto", "highest"):
            ours = evaluate(fast_directclr_loss, *views, 20, backend=backend, precision=precision)
            assert relative_error(ours.dr1, truth.dr1) < (1e-5 if precision == "highest" else 3e-2)
    assert SWITCHES[which]().fp32_precision == value
    assert may_round("cpu") == (which != "cuda" and value != "ieee")
    assert may_round("cuda") == (which != "cpu" and value == "tf32")


def test_a_switch_is_put_back_as_it_was(switches):
    for value in ("tf32", "ieee"):
        torch.backends.fp32_precision = value
        with fp32_products("cpu", "ieee"):
            assert not may_round("cpu")
        assert may_round("cpu") == (value == "tf32")  # it follows the other one again
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    with fp32_products("cpu", "ieee"):
        assert not may_round("cpu")
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("medium")
    with fp32_products("cpu", "ieee"):
        assert not may_round("cpu")
    assert may_round("cpu") and torch.get_float32_matmul_precision() == "medium"
