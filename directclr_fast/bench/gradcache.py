"""Peak memory of training steps with gradient caching, each run in a process of its own.

Two steps of all of N made-up 32 x 32 colour images, in chunks and without: the resident peak of the
process (ru_maxrss: interpreter, libraries, images and checkpoint included). Linux.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator

from ..train.config import TrainConfig
from ..train.loop import Trainer
from . import memory, study

FLAGS = {
    "--rows": {"type": int, "nargs": "+", "default": [2048, 16384]},
    "--plain-rows": {"type": int, "nargs": "*", "default": [512, 2048, 16384]},
    "--chunk-size": {"type": int, "default": 512},
    "--cache-bn": {"default": "chunk"},
    "--encoder": {"default": "small"},
    "--gib": {"type": float, "default": 4.0, "help": "what a run may allocate"},
}


def train(rows: int, encoder: str, chunks: dict, gib: float) -> dict:
    """Peak MiB, seconds a step and loss of two steps of all images; fails beyond ``gib``."""
    import resource

    with tempfile.TemporaryDirectory() as folder, memory.limited(int(gib * 2**30)):
        config = TrainConfig(
            data=f"fake:n={rows},size=32", encoder=encoder, batch_size=rows, epochs=2,
            optimizer="sgd", learning_rate=0.05, checkpoint_dir=folder, **chunks,
        )  # fmt: skip
        trainer = Trainer(config, progress=False)
        start = time.perf_counter()
        result = trainer.run()
        seconds = (time.perf_counter() - start) / result["step"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak_mib": peak, "seconds_per_step": seconds, "loss": result["loss"]}


def measure(arguments: argparse.Namespace) -> Iterator[tuple[dict, str]]:
    """Every N in chunks, then every N without."""
    sizes = [(n, arguments.chunk_size) for n in arguments.rows]
    for n, chunk in sizes + [(n, None) for n in arguments.plain_rows]:
        chunks = {"chunk_size": chunk, "cache_bn": arguments.cache_bn if chunk else None}
        case = {"rows": n, **chunks, "encoder": arguments.encoder}
        case |= memory.isolated(train, n, arguments.encoder, chunks, arguments.gib)
        if "failed" in case:
            shown = case["failed"]
        else:
            shown = f"peak {case['peak_mib']:.0f} MiB, {case['seconds_per_step']:.1f} s a step"
        how = f"chunks of {chunk}" if chunk else "no chunks"
        yield case, f"N {n}, {arguments.encoder}, {how}: {shown}"


study.as_script(__name__)
