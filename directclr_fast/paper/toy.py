r"""The paper's two mechanisms of collapse on linear networks: sections 4 and 5 of arXiv 2110.09348.

z = W_L ... W_1 x + b on Gaussian points x, two views x + k e with fresh noise e on the last
``noisy`` coordinates, plain SGD. Losses, each the mean over a batch of N anchors of view 1:

.. code-block:: text

    released   log sum_j exp(z_i . z'_j / t) - z_i . z'_i / t      t = 0.1, nothing normalised
    paper      Eq. 2: squared distances, negatives of the anchor's own view (theory.py)

All variants of a task and all seeds train together, as one batch of fp64 matrices (variants, seeds,
layers, n, n) with hand-written gradients: the loss reads the product P only. Networks with fewer
layers than the deepest of a task are filled up with identity layers that never move.

A seed fixes the points, the starting weights, the batches and the noise; variants of one seed
differ in nothing but what :class:`Variant` says.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..train.checkpoint import writable, write_json
from ..train.config import check_setting
from . import theory

WIDTH = 16
POINTS, FRESH, BATCH = 10_000, 1_000, 128
TEMPERATURE = 0.1
# Singular value j of a layer starts at exp(-DECAY j), j = 0 .. 15 (starts "random", "aligned").
DECAY = 0.35
MAX_LAYERS = 8
LOSSES = ("released", "paper")
# Eigenvalues of the covariance of the embeddings of FRESH points: collapsed below e^-10, small
# below a tenth of the largest.
COLLAPSED = math.exp(-10)
SMALL = 0.1
_CHUNK = 50  # steps whose batches are drawn at once


@dataclass(frozen=True)
class Variant:
    """One network: noise amplitude, number of layers, and where its weights start.

    start "uniform": entries uniform within 1/4, as ``torch.nn.Linear`` has them. "random": each
    layer has singular values scale * exp(-DECAY j) between random orthogonal bases. "aligned":
    neighbouring layers share their basis, singular values scale * exp(-2 DECAY j / layers), so
    that the product starts at exp(-2 DECAY j) whatever the number of layers.
    """

    strength: float = 0.001
    layers: int = 2
    start: str = "random"
    scale: float = 1.0


@dataclass(frozen=True)
class Task:
    """What one figure compares. ``curves`` are the quantities kept over time, see :func:`_measure`;
    ``final`` those kept at the last step only."""

    name: str
    title: str
    variants: tuple[Variant, ...]
    noisy: int
    learning_rate: float
    curves: tuple[str, ...]
    final: tuple[str, ...]
    bias: bool = False


TASKS = {
    task.name: task
    for task in (
        Task(
            "augmentation",
            "strong augmentation of 8 of 16 coordinates, one linear layer",
            tuple(Variant(k, 1, "uniform") for k in (0.01, 0.5, 1.0, 1.5, 2.0)),
            noisy=8,
            learning_rate=0.001,
            curves=("clean", "noisy"),
            final=("weights", "collapsed", "small"),
            bias=True,
        ),
        Task(
            "regularization",
            "implicit regularisation, two linear layers, next to no augmentation",
            (Variant(),),
            noisy=WIDTH,
            learning_rate=0.01,
            curves=("log_weights", "log_embedding", "collapsed"),
            final=(),
        ),
        Task(
            "depth",
            "implicit regularisation against the number of linear layers",
            tuple(
                Variant(layers=layers, start=start)
                for start, depths in (("random", (1, 2, 3, 4)), ("aligned", (1, 2, 4, 8)))
                for layers in depths
            ),
            noisy=WIDTH,
            learning_rate=0.01,
            curves=("collapsed",),
            final=("log_embedding",),
        ),
        Task(
            "alignment",
            "alignment of two linear layers, by the scale of the starting weights",
            tuple(Variant(scale=scale) for scale in (1.0, 0.3, 0.1)),
            noisy=WIDTH,
            learning_rate=0.01,
            curves=("alignment", "alignment_all", "diagonal", "live"),
            final=("matrix",),
        ),
    )
}


# ---------------------------------------------------------------- training


def released_gradient(
    x1: Tensor, x2: Tensor, product: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """(dP, db) of the released toy loss; inputs (..., N, n), P (..., n, n), b (..., n).

    With p the softmax over j of z_i . z'_j / t and q = (p - 1) / (t N): dz = q z', dz' = q^T z.
    """
    z1 = x1 @ product.mT + bias[..., None, :]
    z2 = x2 @ product.mT + bias[..., None, :]
    p = torch.softmax(z1 @ (z2.mT / TEMPERATURE), -1)
    torch.diagonal(p, 0, -2, -1).sub_(1.0)
    p *= 1.0 / (TEMPERATURE * x1.shape[-2])
    dz1, dz2 = p @ z2, p.mT @ z1
    return dz1.mT @ x1 + dz2.mT @ x2, dz1.sum(-2)  # rows of q sum to zero, so that of dz' is zero


def paper_gradient(x1: Tensor, x2: Tensor, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(dP, db) of Eq. 2: dP = -P X; the bias drops out of every difference."""
    a = theory.shares(x1 @ product.mT, x2 @ product.mT)
    return -(product @ theory.lemma2_matrix(x1, x2, a)), torch.zeros_like(bias)


_GRADIENTS = {"released": released_gradient, "paper": paper_gradient}


class _Draws:
    """Points, starting weights and batches of each seed, stacked over seeds: (S, ...).

    Every seed draws from a generator of its own, so that seed 3 is the same run whether there are
    4 seeds or 40. This is the one place that goes through the seeds one by one.
    """

    def __init__(self, seeds: int, noisy: int) -> None:
        self.noisy = noisy
        self.generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
        self.points = self._stack(torch.randn, POINTS, WIDTH)
        self.fresh = self._stack(torch.randn, FRESH, WIDTH)
        self.uniform = self._stack(torch.rand, MAX_LAYERS + 1, WIDTH, WIDTH)
        self.bases = torch.linalg.qr(self._stack(torch.randn, MAX_LAYERS, 2, WIDTH, WIDTH))[0]

    def _stack(self, draw: Callable, *shape: int) -> Tensor:
        drawn = [draw(*shape, generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(drawn)

    def batches(self):
        """Yields for ever (x, e, e'), each (S, BATCH, WIDTH): points and the noise of two views,
        zero in the coordinates that have none."""
        seeds = torch.arange(len(self.generators))[:, None]
        while True:
            index = torch.stack(
                [torch.randint(POINTS, (_CHUNK, BATCH), generator=g) for g in self.generators], 1
            )
            noise = self._stack(torch.randn, 2, _CHUNK, BATCH, WIDTH)
            noise[..., : WIDTH - self.noisy] = 0.0
            for step in range(_CHUNK):
                yield self.points[seeds, index[step]], noise[:, 0, step], noise[:, 1, step]

    def start(self, variant: Variant, layers: int) -> Tensor:
        """Weights (S, layers, n, n) of one variant, identity from layer ``variant.layers`` on."""
        weights = torch.eye(WIDTH, dtype=torch.float64).repeat(len(self.generators), layers, 1, 1)
        for layer in range(variant.layers):
            left, right = self.bases[:, layer, 0], self.bases[:, layer, 1]
            rate = DECAY
            if variant.start == "aligned":
                rate = 2 * DECAY / variant.layers
                right = self.bases[:, layer - 1, 0] if layer else right
            values = torch.exp(-rate * torch.arange(WIDTH, dtype=torch.float64))
            if variant.start == "uniform":
                weights[:, layer] = _as_linear(self.uniform[:, layer])
            else:
                weights[:, layer] = variant.scale * (left * values) @ right.mT
        return weights


def _as_linear(uniform: Tensor) -> Tensor:
    """Uniform numbers in (0, 1) to the range torch.nn.Linear draws from, +-1/sqrt(n)."""
    return (2 * uniform - 1) / math.sqrt(WIDTH)


@torch.no_grad()
def train(
    task: Task, loss: str, seeds: int, steps: int, progress: Callable = lambda step: None
) -> tuple[list[int], dict[str, Tensor]]:
    """Trains all variants of ``task`` for ``steps`` SGD steps.

    Returns the measured steps, and each quantity of :func:`_measure` at them, with leading
    dimensions (times, variants, seeds).
    """
    draws = _Draws(seeds, task.noisy)
    layers = max(variant.layers for variant in task.variants)
    weights = torch.stack([draws.start(variant, layers) for variant in task.variants])
    depth = torch.tensor([variant.layers for variant in task.variants])
    moves = torch.arange(layers) < depth[:, None]  # (V, L)
    rate = task.learning_rate * moves[:, None, :, None, None]
    bias = torch.zeros(len(task.variants), seeds, WIDTH, dtype=torch.float64)
    if task.bias:
        bias += _as_linear(draws.uniform[:, MAX_LAYERS, 0])
    strength = torch.tensor([v.strength for v in task.variants], dtype=torch.float64)
    strength = strength[:, None, None, None]
    centred = draws.fresh - draws.fresh.mean(1, keepdim=True)
    gradient, batches = _GRADIENTS[loss], draws.batches()
    times, measured = _times(steps), []
    for step in range(steps + 1):
        before = theory.products(weights)
        if step in times:
            measured.append(_measure(task, weights, before[-1], centred))
        progress(step)
        if step == steps:
            break
        x, e1, e2 = next(batches)
        dp, db = gradient(x + strength * e1, x + strength * e2, before[-1], bias)
        weights -= rate * theory.layer_gradients(weights, before, dp)
        if task.bias:
            bias -= task.learning_rate * db
    return times, {name: torch.stack([m[name] for m in measured]) for name in measured[0]}


def _times(steps: int) -> list[int]:
    """0, then about 8 steps per decade up to ``steps``."""
    count = 1 + round(8 * math.log10(steps))
    return sorted({0, steps, *(round(steps ** (i / count)) for i in range(count))})


def _measure(task: Task, weights: Tensor, product: Tensor, centred: Tensor) -> dict[str, Tensor]:
    """Quantities of weights (V, S, L, n, n) with product (V, S, n, n).

    weights, log_weights (V, S, L, n): singular values of each layer. embedding, log_embedding
    (V, S, n): eigenvalues of the covariance of the embeddings of ``centred`` (S, FRESH, n).
    collapsed, small (V, S): how many of those are below COLLAPSED, below SMALL of the largest.
    clean, noisy (V, S): mean singular value of the product's columns of either kind.
    alignment (V, S): of neighbouring layers, over directions not collapsed, scaled so that 1 is
    aligned and 0 what unrelated layers of these groups score; alignment_all: over all directions;
    diagonal: mean |A_kk| over those not collapsed; live: their number; matrix: A of layers 1, 2.
    """
    values = torch.linalg.svdvals(weights)
    # Squared singular values of the embeddings: small ones keep their digits, unlike eigvalsh's.
    cholesky = torch.linalg.qr(centred / math.sqrt(FRESH - 1), mode="r")[1]
    embedding = torch.linalg.svdvals(product @ cholesky.mT).square()
    tiny = torch.finfo(values.dtype).tiny
    clean = WIDTH - task.noisy
    live = embedding >= COLLAPSED
    quantities = {
        "weights": values,
        "log_weights": values.clamp_min(tiny).log(),
        "embedding": embedding,
        "log_embedding": embedding.clamp_min(tiny).log(),
        "collapsed": (~live).sum(-1).double(),
        "small": (embedding < SMALL * embedding[..., :1]).sum(-1).double(),
    }
    if clean:
        quantities["clean"] = torch.linalg.svdvals(product[..., :clean]).mean(-1)
        quantities["noisy"] = torch.linalg.svdvals(product[..., clean:]).mean(-1)
    if "alignment" in task.curves:
        a, score, chance = theory.alignment(weights[..., 0, :, :], weights[..., 1, :, :])
        diagonal = torch.diagonal(a, 0, -2, -1).abs()
        count = live.sum(-1).clamp_min(1)

        def above_chance(mask: Tensor) -> Tensor:
            score_, chance_ = (score * mask).sum(-1), (chance * mask).sum(-1)
            return (score_ - chance_) / (mask.sum(-1) - chance_).clamp_min(1e-9)

        quantities |= {
            "alignment": above_chance(live),
            "alignment_all": above_chance(torch.ones_like(live)),
            "diagonal": (diagonal * live).sum(-1) / count,
            "live": live.sum(-1).double(),
            "matrix": a.abs(),
        }
    return quantities


# ---------------------------------------------------------------- results


def run(
    name: str,
    out: str | Path,
    loss: str = "both",
    seeds: int = 5,
    steps: int = 10_000,
    say: Callable[[str], None] = print,
) -> dict:
    """Trains task ``name``, writes toy-<name>.json and toy-<name>.png to ``out``, returns the JSON.

    ``loss`` is one of LOSSES or "both"; seeds 0 to ``seeds`` - 1 are run.
    """
    check_setting("task", name, choices=TASKS)
    check_setting("loss", loss, choices=(*LOSSES, "both"))
    check_setting("seeds", seeds, low=1)
    check_setting("steps", steps, low=1)
    task = TASKS[name]
    out = writable("out", out)
    began, used = time.perf_counter(), time.process_time()
    losses = LOSSES if loss == "both" else (loss,)
    runs = _side_by_side(task, losses, seeds, steps, say)
    results = {
        "task": name,
        "title": task.title,
        "source": "arXiv 2110.09348, sections 4 and 5",
        "seeds": seeds,
        "steps": steps,
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(time.process_time() - used, 1),
        "points": POINTS,
        "batch": BATCH,
        "width": WIDTH,
        "learning_rate": task.learning_rate,
        "bias": task.bias,
        "noisy_coordinates": task.noisy,
        "temperature_of_released_loss": TEMPERATURE,
        "collapsed_below": COLLAPSED,
        "small_below_share_of_largest": SMALL,
        "spread": "standard deviation over seeds",
        "losses": {which: _summary(task, *run) for which, run in zip(losses, runs)},
    }
    path = out / f"toy-{name}.json"
    write_json(path, results)
    from . import toy_figures

    toy_figures.draw(results, path.with_suffix(".png"))
    return results


def _side_by_side(task: Task, losses: tuple, seeds: int, steps: int, say: Callable) -> list[tuple]:
    """:func:`train` for each loss, each in a thread of its own on one core.

    Steps are a few dozen operations of a tenth of a millisecond: shared out over cores one by one,
    they would wait for each other, and for long where other work runs.
    """
    stop, began = threading.Event(), time.perf_counter()

    def one(which: str) -> tuple:
        def progress(step: int) -> None:
            if stop.is_set():
                raise RuntimeError("stopped")
            if step and step * 10 // steps > (step - 1) * 10 // steps:
                seconds = time.perf_counter() - began
                say(f"toy {task.name}, {which} loss: step {step} of {steps}, {seconds:.0f} s")

        return train(task, which, seeds, steps, progress)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(len(losses)) as pool:
            runs = [pool.submit(one, which) for which in losses]
            try:
                return [run.result() for run in runs]
            finally:  # an interrupt or an error of one loss ends the other
                stop.set()
    finally:
        torch.set_num_threads(threads)


def _summary(task: Task, times: list[int], measured: dict[str, Tensor]) -> dict:
    """Plain values: per variant, mean and spread over seeds of what ``task`` keeps."""

    def mean_and_spread(values: Tensor, seeds: int) -> dict:
        correction = int(values.shape[seeds] > 1)
        return {
            "mean": _digits(values.mean(seeds)),
            "spread": _digits(values.std(seeds, correction=correction)),
        }

    variants = []
    for i, variant in enumerate(task.variants):
        row = asdict(variant) | {"curves": {}, "final": {}}
        for name in (*task.curves, *task.final):
            values = measured[name][:, i]  # (T, S, ...)
            if name in ("weights", "log_weights"):
                values = values[:, :, : variant.layers]
            if name == "matrix":  # of seed 0: a mean would blur groups of different sizes
                row["final"][name] = _digits(values[-1, 0])
            elif name in task.final:
                row["final"][name] = mean_and_spread(values[-1], 0)
            else:
                row["curves"][name] = mean_and_spread(values, 1)
        row["collapsed_per_seed"] = measured["collapsed"][-1, i].long().tolist()
        variants.append(row)
    return {"times": times, "variants": variants}


def _digits(values: Tensor) -> list | float:
    """Nested lists of numbers of four significant digits: smaller files, nothing lost."""
    if values.dim():
        return [_digits(value) for value in values]
    return float(f"{values.item():.4g}")


def lines(results: dict) -> list[str]:
    """The result of :func:`run` in a few sentences, one per variant and loss."""
    text = []
    for loss, result in results["losses"].items():
        for row in result["variants"]:
            what = f"{loss} loss, k = {row['strength']:g}, {row['layers']} layers"
            what += f", start {row['start']} x {row['scale']:g}: "
            last = {k: (v["mean"][-1], v["spread"][-1]) for k, v in row["curves"].items()}
            last |= {k: (v["mean"], v["spread"]) for k, v in row["final"].items() if k != "matrix"}
            numbers = [
                f"{k.replace('_', ' ')} {mean:.3g} +- {spread:.2g}"
                for k, (mean, spread) in last.items()
                if isinstance(mean, float)
            ]
            text.append(what + ", ".join(numbers))
    return text
