"""Small ragged calls of the GPU backends, every kernel and option, for compute-sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 7 python tests/gates/sanitize.py --few
    compute-sanitizer --tool racecheck python tests/gates/sanitize.py --few cuda
    python tests/gates/sanitize.py --few --check triton cuda

``--few``: one shape, and of the precisions fp16 and one of each other kind, which is what fits in
some minutes under the tool. racecheck is for ``cuda`` alone and without an exit code: lanes of a
Triton reduction that hold one value write it to one word, which it reports
(triton-lang/triton#7264). ``--check``: every result is held against the reference in fp64, and a
second run against the first, bit for bit, at a size of several tiles too. The exit status is 1
where one is wrong or a backend that was named cannot run.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from directclr_fast import dispatch, fast_directclr_loss
from directclr_fast.bench.variants import Case
from directclr_fast.testing import evaluate, make_views, relative_error

SHAPES = ((129, 70), (300, 360))
PRECISIONS = ("fp16", "bf16", "tf32", "highest", "fp8")
FEW = (((129, 70), ("fp16", "highest", "fp8")), ((300, 360), ("fp16",)))
WIDTH = 400
# Rows, width and columns in the tests of a GPU, for which `make gpu-kit` compiles ahead.
TESTED = [
    (1, 4, 3), (2, 17, 17), (3, 5, 5), (7, 64, 16), (63, 200, 127), (64, 200, 128), (65, 200, 129),
    (127, 64, 1), (129, 2048, 360), (1000, 2048, 360), (4097, 2048, 360), (1031, 2048, 2047),
    (2048, 2048, 2048), (4096, 512, 256),
]  # fmt: skip
TILES = (((2100, 360), ("fp16", "highest")),)
# Of the loss and of gradients: far above rounding, far below a tile that is missing.
ALLOWED = {"highest": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2, "fp8": 0.2}


def wrongs(name: str, ours, again, r1, r2, dim: int, allowed: float, **options) -> list[str]:
    """What is wrong with a result: a second run that differs, errors against fp64."""
    truth = evaluate(
        fast_directclr_loss, r1.double(), r2.double(), dim, backend="reference",
        **{k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
           for k, v in options.items()},
    )  # fmt: skip
    found = []
    for part, value, other, right in zip(ours._fields, ours, again, truth):
        if value is None:
            continue
        if not torch.equal(value, other):
            found.append(f"{name}: {part} of a second run is another")
        if not (error := relative_error(value, right)) < allowed:
            found.append(f"{name}: {part} is off by {error:.1e}, allowed {allowed:g}")
    return found


def main() -> int:
    """Two shapes; every precision, negatives, groups, direction and kind of temperature."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backends", nargs="*", help="triton, cuda (default: both)")
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--check", action="store_true", help="results against fp64's")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal, kernels interpreted")
    arguments = parser.parse_args()
    device, backends = arguments.device, arguments.backends or ["triton", "cuda"]
    work = FEW if arguments.few else [(shape, PRECISIONS) for shape in SHAPES]
    work = [*work, *(TILES if arguments.check else ())]
    work = [(shape, precision) for shape, precisions in work for precision in precisions]
    ran, wrong = dict.fromkeys(backends, 0), []
    for ((rows, dim), precision), backend in itertools.product(work, backends):
        problem = Case(rows, WIDTH, dim, dtype="float32", device=device).problem(precision)
        if dispatch.load(backend).why_not(problem):
            continue
        r1, r2 = make_views(rows, WIDTH, kind="unrelated", dtype=torch.float32, device=device)
        columns = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))[: 3 * dim]
        columns = columns[: 3 * (len(columns) // 3)].view(3, -1).to(device)
        ran[backend] += 1
        for options in (
            {},
            {"negatives": "both"},
            {"symmetric": False, "reduction": "none"},
            {"temperature": 0.005},
            {"temperature": torch.tensor(0.1, device=device)},
            {"columns": columns},
            {"workspace_bytes": 2**16},
        ):
            asked = {"precision": precision, "backend": backend, **options}
            ours = evaluate(fast_directclr_loss, r1, r2, dim, **asked)
            if arguments.check:
                again = evaluate(fast_directclr_loss, r1, r2, dim, **asked)
                name = f"{backend} {precision}, {rows} x {dim}, {', '.join(options) or 'defaults'}"
                wrong += wrongs(name, ours, again, r1, r2, dim, ALLOWED[precision], **options)
    if device == "cuda":
        torch.cuda.synchronize()
    wrong += [f"{name}: it cannot run here" for name in arguments.backends if not ran[name]]
    print(f"ran {sum(ran.values())} of {len(work) * len(backends)} combinations", *wrong, sep="\n")
    return 1 if wrong or not any(ran.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
