"""Peak memory of training steps with gradient caching, each run in a process of its own.

    python -m directclr_fast.bench.gradcache --out gradcache_memory.json

Runs `train` on N = 16,384 made-up 32 x 32 colour images in chunks of 512, two steps of the whole
batch, and prints the resident peak of the process (ru_maxrss: interpreter, libraries, images and
checkpoint included) beside the same at smaller N and beside plain steps. Linux.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from directclr_fast.machine import machine

CHILD = """
import resource, sys, time
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.loop import Trainer

n, chunk, rule, encoder, folder = sys.argv[1:]
chunks = {"chunk_size": int(chunk), "cache_bn": rule} if int(chunk) else {}
config = TrainConfig(
    data=f"fake:n={n},size=32", encoder=encoder, batch_size=int(n), epochs=2,
    optimizer="sgd", learning_rate=0.05, checkpoint_dir=folder, name=f"{n}-{chunk}", **chunks
)
trainer = Trainer(config, progress=False)
start = time.perf_counter()
result = trainer.run()
seconds = (time.perf_counter() - start) / result["step"]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, seconds, result["loss"])
"""


def run(n: int, chunk: int, rule: str, encoder: str, limit_gib: float) -> dict:
    """Peak bytes, seconds a step and loss of two steps of n images; chunk 0 is the plain step."""
    limit = int(limit_gib * 2**30)

    def cap() -> None:
        # A hard bound on what the process may ask for beside its libraries' address space.
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    with tempfile.TemporaryDirectory() as folder:
        words = [str(n), str(chunk), rule, encoder, folder]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *words], capture_output=True, text=True, preexec_fn=cap
        )
    case = {"rows": n, "chunk_size": chunk or None, "cache_bn": rule if chunk else None}
    if done.returncode:
        return {**case, "encoder": encoder, "failed": done.stderr.strip().splitlines()[-1][:200]}
    peak, seconds, loss = map(float, done.stdout.split())
    case |= {"encoder": encoder, "peak_mib": peak / 2**20, "seconds_per_step": seconds}
    return {**case, "loss": loss}


def main() -> None:
    """Measures the cases and prints them as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--plain-rows", type=int, nargs="*", default=[512, 2048, 16384])
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--cache-bn", default="chunk")
    parser.add_argument("--encoder", default="small")
    parser.add_argument("--gib", type=float, default=4.0, help="limit of each process")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    results = {"machine": machine(), "limit_gib": arguments.gib, "cases": []}
    sizes = [(n, arguments.chunk_size) for n in arguments.rows]
    for n, chunk in sizes + [(n, 0) for n in arguments.plain_rows]:
        case = run(n, chunk, arguments.cache_bn, arguments.encoder, arguments.gib)
        how = f"chunks of {chunk}" if chunk else "plain"
        shown = f"peak {case['peak_mib']:.0f} MiB" if "peak_mib" in case else case["failed"]
        time = f", {case['seconds_per_step']:.1f} s a step" if "peak_mib" in case else ""
        print(f"N {n}, {arguments.encoder}, {how}: {shown}{time}", flush=True)
        results["cases"].append(case)
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
