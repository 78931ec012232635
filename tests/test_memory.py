"""Peak memory of the blocked backends: linear in N, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from directclr_fast.testing import backends

BACKENDS = backends()

# Peak resident memory above what stands before the call: inputs exist, threads and libraries are
# warm. VmHWM is reset through clear_refs where the system allows it (Linux).
CHILD = """
import json, os, sys, torch
from directclr_fast import fast_directclr_loss

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)

backend, *sizes = sys.argv[1:]
for n in map(int, sizes):  # each in a process of its own, which imports nothing
    child = os.fork()
    if not child:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
else:
    sys.exit()
generator = torch.Generator().manual_seed(0)
r1 = torch.randn(n, 360, generator=generator).requires_grad_()
r2 = torch.randn(n, 360, generator=generator).requires_grad_()
fast_directclr_loss(r1[:64], r2[:64], backend=backend).backward()
r1.grad = r2.grad = None
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
fast_directclr_loss(r1, r2, backend=backend).backward()
print(json.dumps(status("VmHWM") - before))
"""


def peak_bytes(sizes: tuple[int, ...], backend: str) -> dict[int, int]:
    """By the number of rows."""
    result = subprocess.run(
        [sys.executable, "-c", CHILD, backend, *map(str, sizes)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},  # a library's buffers come by the thread
    )
    if "clear_refs" in result.stderr or "VmHWM" in result.stderr:
        pytest.skip("this system does not let a process reset its peak memory")
    assert result.returncode == 0, result.stderr
    return dict(zip(sizes, map(json.loads, result.stdout.split()), strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("backend", BACKENDS)
def test_peak_memory_grows_with_the_rows_and_not_with_their_square(backend):
    """z, dz and the gradients are 6 N d floats; with them and the workspace 8,192 rows take 130
    MiB, where one N x N matrix of fp32 alone is 256 MiB."""
    row = 360 * 4
    workspace = 64 * 2**20
    peaks = peak_bytes((2048, 8192), backend)
    for rows, peak in peaks.items():
        assert peak <= 6 * rows * row + workspace + 32 * 2**20, peaks
    growth = peaks[8192] - peaks[2048]
    assert growth <= 6144 * 6 * row + 48 * 2**20, peaks
