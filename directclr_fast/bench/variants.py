"""Who takes part: this package's backends, plain PyTorch, and the peers that are installed.

Each is a small adapter of one shape: ``why_not(case)`` gives reasons, ``build(case)`` a function of
(r1, r2) that returns the loss. Names of plain PyTorch: "released", two logits matrices as in the
DirectCLR release; "eager", one; "compiled", torch.compile of that. A trailing precision ("cpu
bf16", "eager bf16") says in what the products run where it is not the inputs' own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, flops
from ..loss import fast_directclr_loss
from ..problem import Problem
from ..testing import eager_loss, make_views

Loss = Callable[[Tensor, Tensor], Tensor]

# Largest error against fp64 of a loss and its gradients that is still called the same loss, on rows
# as make_views draws them; what eager PyTorch makes under bf16 autocast is 2e-3 to 3e-2.
ALLOWED = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1, "fp8": 2e-1}
DRAWN_ROWS = 4096  # make_views draws in fp64 on the CPU; more rows are made of these
PRECISIONS = {"cpu": ("auto", "bf16", "tf32"), "cuda": ("auto", "fp16", "bf16", "fp8")}


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the grid: N rows of both views, d of R columns, and what is asked."""

    rows: int
    width: int = 2048
    dim: int = 360
    dtype: str = "float32"
    device: str = "cpu"
    negatives: str = "cross"
    temperature: float = 0.1

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def work(self) -> int:
        """Operations of forward and backward: 8 N^2 d for "cross", 16 N^2 d for "both"."""
        return flops.total(self.rows, self.rows, self.dim, self.negatives)

    def views(self, rows: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Both views (rows, width) in the case's dtype on its device."""
        rows = self.rows if rows is None else rows
        drawn = min(rows, DRAWN_ROWS)
        pair = make_views(
            drawn, self.width, dtype=self.torch_dtype, device=self.device, seed=seed
        )  # fmt: skip
        if rows == drawn:
            return pair
        generator = torch.Generator(self.device).manual_seed(seed + 1)

        def grown(r: Tensor) -> Tensor:
            out = torch.empty(rows, self.width, dtype=r.dtype, device=r.device)
            for start in range(0, rows, drawn):
                part = out[start : start + drawn]
                part.normal_(generator=generator).mul_(0.7).add_(r[: len(part)])
            return out

        return grown(pair[0]), grown(pair[1])

    def problem(self, precision: str = "auto") -> Problem:
        """What the package's backends are asked."""
        return Problem(
            rows=self.rows, candidates=self.rows, width=self.width, dim=self.dim,
            dtype=self.torch_dtype, device_type=self.device, temperature=self.temperature,
            negatives=self.negatives, precision=precision, differentiable=True,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute the loss.

    ``family``: "ours", "plain", "peer", or "neighbour" (another loss of the same cost, neither
    checked nor ranked). ``precision``: of its products at a case's dtype: fp32, tf32, bf16, fp16,
    fp8.
    """

    name: str
    family: str
    precision: str
    build: Callable[[Case], Loss]
    why_not: Callable[[Case], list[str]] = lambda case: []


def catalogue(case: Case, precisions: tuple[str, ...] | None = None) -> list[Variant]:
    """Every variant there is for the case's device and dtype, whether or not it can run.

    ``precisions``: those asked of this package's backends, by the names of ``precision=``.
    """
    asked = PRECISIONS[case.device] if precisions is None else precisions
    return [*plain(case), *ours(case, asked), *peers(case)]


def released_loss(r1: Tensor, r2: Tensor, dim: int, temperature: float = 0.1) -> Tensor:
    """The released trainer's arithmetic: each direction normalises and multiplies anew."""

    def one_direction(x, y):
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        return F.cross_entropy(x @ y.T / temperature, torch.arange(len(x), device=x.device))

    x, y = r1[:, :dim], r2[:, :dim]
    return one_direction(x, y) / 2 + one_direction(y, x) / 2


# ------------------------------------------------------------------------ plain PyTorch


def plain(case: Case) -> Iterator[Variant]:
    """The released formula and one-matrix eager PyTorch, in fp32 and under bf16 autocast."""
    for autocast in (False, True) if case.dtype == "float32" else (True,):
        suffix = " bf16" if autocast and case.dtype == "float32" else ""
        precision = "bf16" if autocast else "fp32"
        for name in ("released", "eager", "compiled"):
            build = partial(_plain, name, autocast)
            negatives = "cross" if name == "released" else None
            why_not = partial(_lacks, None, negatives, None)
            yield Variant(name + suffix, "plain", precision, build, why_not)


def _plain(name: str, autocast: bool, case: Case) -> Loss:
    function, options = released_loss, {}
    if name != "released":
        function, options = eager_loss, {"negatives": case.negatives}
    if name == "compiled":
        function = torch.compile(function, dynamic=False)

    def run(a: Tensor, b: Tensor) -> Tensor:
        return function(a, b, case.dim, case.temperature, **options)

    return torch.autocast(case.device, torch.bfloat16)(run) if autocast else run


# ------------------------------------------------------------------------ this package


def ours(case: Case, precisions: tuple[str, ...]) -> Iterator[Variant]:
    """Every backend but the reference, in each precision it is asked for."""
    for backend in dispatch.PRIORITY:
        if backend == "reference":
            continue
        usual = _precision(backend, case, "auto") if "auto" in precisions else None
        for precision in precisions:
            if precision != "auto":
                if backend == "torch" or dispatch.load(backend).why_not(case.problem()):
                    continue  # it has one precision, or its reasons stand with its name
                if _precision(backend, case, precision) == usual:
                    continue
            name = backend if precision == "auto" else f"{backend} {precision}"
            runs_in = _precision(backend, case, precision)
            # "auto" follows the inputs' dtype: named, so that fp32 copies are computed alike.
            asked = runs_in if precision == "auto" and runs_in != "fp32" else precision
            build, why_not = (partial(f, backend, asked) for f in (_ours, _our_reasons))
            yield Variant(name, "ours", runs_in, build, why_not)


def _precision(backend: str, case: Case, asked: str) -> str:
    """In what ``backend`` multiplies this case at ``precision=asked``."""
    asked = dispatch.load(backend).precision(case.problem(asked))
    return "fp32" if asked == "highest" else asked


def _ours(backend: str, precision: str, case: Case) -> Loss:
    asked = {"temperature": case.temperature, "negatives": case.negatives, "precision": precision}
    return partial(fast_directclr_loss, dim=case.dim, backend=backend, **asked)


def _our_reasons(backend: str, precision: str, case: Case) -> list[str]:
    module, problem = dispatch.load(backend), case.problem(precision)
    # They go into result files, which are no place for this machine's folders.
    reasons = [re.sub(r" \(/[^()]*\)", "", reason) for reason in module.why_not(problem)]
    if not reasons and case.device == "cpu" and module.why_not_unasked(problem):
        reasons.append("interpreted kernels are not for timing")
    return reasons


# ------------------------------------------------------------------------ peers


def peers(case: Case) -> list[Variant]:
    """Other projects' losses, at the settings that are best for them."""
    own = {"float32": "tf32", "bfloat16": "bf16", "float16": "fp16"}[case.dtype]
    as_given = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[case.dtype]
    both = partial(_lacks, "lightly", "both", None)
    metric = partial(_lacks, "pytorch_metric_learning", "both", None)
    memeff, inf_cl, siglip = (
        partial(_lacks, name, "cross", "cuda") for name in ("memeff", "inf_cl", "siglip_kernel")
    )
    metrics = {n: partial(_metric_learning, n) for n in ("SupConLoss", "NTXentLoss")}
    return [
        Variant("lightly", "peer", as_given, _lightly, both),
        Variant("metric-learning", "peer", as_given, metrics["SupConLoss"], metric),
        Variant("metric-learning ntxent", "peer", as_given, metrics["NTXentLoss"], metric),
        Variant("memeff", "peer", own, _memeff, memeff),
        Variant("inf_cl", "peer", "tf32", _inf_cl, inf_cl),
        Variant("siglip", "neighbour", own, _siglip, siglip),
    ]


def _lacks(module: str | None, negatives: str | None, device: str | None, case: Case) -> list[str]:
    """Why a case is not for what needs this module, these negatives, this device."""
    reasons = []
    if device not in (None, case.device):
        reasons.append(f"it needs {device}, got {case.device}")
    if negatives not in (None, case.negatives):
        reasons.append(f"it has negatives {negatives!r} only")
    if module is not None and importlib.util.find_spec(module) is None:
        reasons.append(f"{module} is not installed")
    return reasons


def _lightly(case: Case) -> Loss:
    from lightly.loss import NTXentLoss

    module = NTXentLoss(temperature=case.temperature)
    return lambda a, b: module(a[:, : case.dim], b[:, : case.dim])


def _metric_learning(name: str, case: Case) -> Loss:
    """With two views the supervised contrastive loss is NT-Xent, from one matrix; its NTXentLoss
    lists every pair of pairs, 8 N^3 entries."""
    from pytorch_metric_learning import losses

    module = losses.SelfSupervisedLoss(getattr(losses, name)(temperature=case.temperature))
    return lambda a, b: module(a[:, : case.dim], b[:, : case.dim])


def _memeff(case: Case) -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    # Its default rescales the gradient; stable=False is the loss that the others compute.
    module = MemoryEfficientCLIPLoss(temperature=case.temperature, stable=False)
    return lambda a, b: module(a[:, : case.dim].contiguous(), b[:, : case.dim].contiguous())


def _inf_cl(case: Case) -> Loss:
    from inf_cl import cal_flash_loss

    # It walks the columns in heads of a power of two; zero columns change no product.
    head = next((h for h in (256, 128, 64) if case.dim % h == 0), 64)
    padding = -case.dim % head

    def run(a: Tensor, b: Tensor) -> Tensor:
        x, y = (F.pad(F.normalize(r[:, : case.dim].float(), dim=1), (0, padding)) for r in (a, b))
        options = {"scale": 1 / case.temperature, "head_dim": head}
        return (cal_flash_loss(x, y, **options).mean() + cal_flash_loss(y, x, **options).mean()) / 2

    return run


def _siglip(case: Case) -> Loss:
    from siglip_kernel import fused_siglip_loss

    scale = torch.tensor(1 / case.temperature, device=case.device).log().requires_grad_()
    bias = torch.tensor(-10.0, device=case.device, requires_grad=True)

    def run(a: Tensor, b: Tensor) -> Tensor:
        scale.grad = bias.grad = None
        x, y = (F.normalize(r[:, : case.dim], dim=1) for r in (a, b))
        return fused_siglip_loss(x, y, scale, bias)

    return run
