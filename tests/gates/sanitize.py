"""Small ragged calls of the GPU backends, every kernel and option, for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 7 python tests/gates/sanitize.py --few
    compute-sanitizer --tool racecheck python tests/gates/sanitize.py --few cuda

``--few``: one shape, and of the precisions fp16 and one of each other kind, which is what fits in
some minutes under the tool. racecheck is for ``cuda`` alone and without an exit code: lanes of a
Triton reduction that hold one value write it to one word, which it reports
(triton-lang/triton#7264).
"""

from __future__ import annotations

import argparse
import itertools

import torch

from directclr_fast import dispatch, fast_directclr_loss
from directclr_fast.problem import Problem
from directclr_fast.testing import make_views

SHAPES = ((129, 70), (300, 360))
PRECISIONS = ("fp16", "bf16", "tf32", "highest", "fp8")
FEW = (((129, 70), ("fp16", "highest", "fp8")), ((300, 360), ("fp16",)))


def main() -> None:
    """Two shapes; every precision, negatives, groups, direction and kind of temperature."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backends", nargs="*", help="triton, cuda (default: both)")
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal, kernels interpreted")
    arguments = parser.parse_args()
    device, backends = arguments.device, arguments.backends or ["triton", "cuda"]
    work = FEW if arguments.few else [(shape, PRECISIONS) for shape in SHAPES]
    work = [(shape, precision) for shape, precisions in work for precision in precisions]
    ran = 0
    for ((rows, dim), precision), backend in itertools.product(work, backends):
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
        ran += 1
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
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"ran {ran} of {len(work) * len(backends)} combinations")


if __name__ == "__main__":
    main()
