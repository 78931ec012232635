"""Small ragged calls of the GPU backends, every kernel and option, for compute-sanitizer."""

from __future__ import annotations

import itertools

import torch

from directclr_fast import dispatch, fast_directclr_loss
from directclr_fast.problem import Problem
from directclr_fast.testing import make_views


def main() -> None:
    """Two shapes; every precision, negatives, groups, direction and kind of temperature."""
    device = "cuda"
    for (rows, dim), precision, backend in itertools.product(
        ((129, 70), (300, 360)), ("fp16", "bf16", "tf32", "highest", "fp8"), ("triton", "cuda")
    ):
        problem = Problem(
            rows=rows,
            candidates=rows,
            width=400,
            dim=dim,
            dtype=torch.float32,
            device_type=device,
            temperature=0.1,
            precision=precision,
        )
        if dispatch.load(backend).why_not(problem):
            continue
        r1, r2 = make_views(rows, 400, dtype=torch.float32, device=device)
        r1.requires_grad_(), r2.requires_grad_()
        temperature = torch.tensor(0.1, device=device, requires_grad=True)
        columns = torch.randperm(400, generator=torch.Generator().manual_seed(0))[: 3 * dim]
        for options in (
            {},
            {"negatives": "both"},
            {"symmetric": False, "reduction": "none"},
            {"temperature": 0.005},
            {"temperature": temperature},
            {"columns": columns[: 3 * (len(columns) // 3)].view(3, -1).to(device)},
            {"workspace_bytes": 2**16},
        ):
            loss = fast_directclr_loss(r1, r2, dim, precision=precision, backend=backend, **options)
            loss.sum().backward()
    torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    main()
