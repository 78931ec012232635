"""What the pages show runs: every block of Python, and every command line as far as its parser."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from directclr_fast import cli

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/paper.md", "docs/testing.md", "bench/README.md", "csrc/README.md")
# What takes minutes, made shorter; its meaning stays.
SHORTER = {"steps=10_000": "steps=20", "seeds=5": "seeds=2"}


def blocks(language):
    params = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S):
            line = text[: match.start()].count("\n") + 1
            params.append(pytest.param(match[1], id=f"{page}:{line}"))
    return params


@pytest.fixture
def world():
    """The processes of a job: this one."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, world):
    torch.manual_seed(0)
    r1, r2 = (torch.randn(8, 400, requires_grad=True) for _ in range(2))
    names = {
        "torch": torch, "F": torch.nn.functional, "r1": r1, "r2": r2, "z1": r1, "z2": r2,
        "labels": torch.arange(8) % 3, "more": torch.randn(5, 400),
        "groups": torch.arange(400).reshape(2, 200), "features": torch.randn(300, 16),
    }  # fmt: skip
    if "fast_directclr_loss(" in code and "import" not in code:
        exec("from directclr_fast import fast_directclr_loss", names)
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    exec(code, names)
    if "loss" in names:
        names["loss"].sum().backward()
        assert r1.grad.isfinite().all() and r2.grad.isfinite().all()


def command_lines():
    for block in blocks("sh"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for start in ("directclr-fast", "directclr_fast"):
                if start in words and "-m" not in words[words.index(start) :]:
                    yield pytest.param(
                        words[words.index(start) + 1 :], id=f"{block.id}: {line[:60]}"
                    )


@pytest.mark.parametrize("words", list(command_lines()))
def test_command_lines_parse(words):
    assert vars(cli._parser().parse_args(words))
