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
import json, sys, torch
from directclr_fast import fast_directclr_loss

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)

n, backend = int(sys.argv[1]), sys.argv[2]
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


def peak_bytes(rows: int, backend: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(rows), backend],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},  # a library's buffers come by the thread
    )
    if "clear_refs" in result.stderr or "VmHWM" in result.stderr:
        pytest.skip("this system does not let a process reset its peak memory")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("backend", BACKENDS)
def test_peak_memory_grows_with_the_rows_and_not_with_their_square(backend):
    """z, dz and the gradients are 6 N d floats; with them and the workspace 8,192 rows take 130
    MiB, where one N x N matrix of fp32 alone is 256 MiB."""
    row = 360 * 4
    workspace = 64 * 2**20
    peaks = {n: peak_bytes(n, backend) for n in (4096, 8192)}
    for rows, peak in peaks.items():
        assert peak <= 6 * rows * row + workspace + 32 * 2**20, peaks
    growth = peaks[8192] - peaks[4096]
    assert growth <= 4096 * 6 * row + 48 * 2**20, peaks
