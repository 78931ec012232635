r"""Batches larger than activation memory: the encoder by chunks, the loss once on the whole batch.

.. code-block:: text

    1  r = encoder(view), chunk by chunk, without a graph          r1, r2 (N, R) are kept
    2  the loss of all N rows, its projector and the online head   dr1, dr2 (N, R) are kept
    3  encoder(view) again, chunk by chunk, with a graph that dr of the chunk goes back through

The chain rule and no approximation: the gradient is that of a plain step which encodes in the same
chunks and keeps every graph. Pass 3 replays the random state and the autocast of pass 1, so dropout
leaves out the same. What acts on rows of the whole batch (the loss, the projector's BatchNorm in
"simclr") acts on the whole batch. Kept are the uint8 images, the parameters of their views, four
(N, R) tensors and one chunk's activations; views are made anew in each pass.

BatchNorm inside the encoder would need the whole batch in every layer: its rule has to be chosen.

============== ===================================================================================
``cache_bn``   what normalises a chunk
============== ===================================================================================
"chunk"        The chunk's own mean and variance, with their gradient: exactly a plain step whose
               encoder is called once for each chunk. Running statistics move in pass 1.
"two-pass"     Mean and variance of each view's whole batch, as constants. A pass of its own gathers
               them before pass 1, while the layers before normalise by the chunk: exactly the whole
               batch's at the first BatchNorm or with one chunk, deeper up to the chunks' noise. The
               gradient leaves out how they depend on the weights, as no pass by chunks could tell.
               Running statistics move once for each view, as in a plain step.
"frozen-stats" The running statistics, as constants, which never move: for an encoder that has them
               (a resumed run). On new weights they are 0 and 1 and nothing is normalised. Weight
               and bias of BatchNorm are trained.
============== ===================================================================================

Several ranks each cut their own rows into chunks. "chunk" statistics are of one rank's chunk (the
running ones are then averaged over the ranks), "two-pass" ones of all ranks' rows. Gradients are
exchanged once, in the last chunk's backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .batchnorm import norms
from .config import RULES
from .ranks import Ranks

Chunk = tuple[int, slice]  # view 0 or 1, rows


def wide(device: torch.device) -> torch.dtype:
    """The widest dtype of a device: Apple's has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


class GradientCache:
    """Losses and gradients of ``model`` (loop.Model), at most ``chunk_size`` rows of a view at a
    time, in chunks as equal as can be.

    ``module`` is the model or its DistributedDataParallel; ``scope()`` a new autocast context.
    ValueError if the encoder has BatchNorm and ``rule`` does not say what to do with it.
    """

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        chunk_size: int,
        rule: str | None,
        scope: Callable[[], contextlib.AbstractContextManager],
        ranks: Ranks,
    ) -> None:
        self.norms = norms(model.encoder)
        if self.norms and rule not in RULES:
            raise ValueError(
                f"cache_bn: expected one of {', '.join(RULES)}, since chunk_size is given and the "
                f"encoder has BatchNorm, got {rule!r}"
            )
        self.model, self.module, self.chunk_size, self.rule = model, module, chunk_size, rule
        self.scope, self.ranks = scope, ranks

    def backward(
        self,
        make: Callable[[int, slice], Tensor],
        labels: Tensor,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradients of the step to the parameters; returns loss and online accuracy.

        make(v, rows): these rows of view v, (b, C, S, S). labels (n,). scale: of a GradScaler.
        """
        n = len(labels)
        count = -(-n // self.chunk_size)
        # As equal as can be: a last one of one row has no variance.
        ends = [n * k // count for k in range(count + 1)]
        chunks = [(view, slice(*rows)) for view in (0, 1) for rows in zip(ends, ends[1:])]
        device = labels.device
        with self._constants(make, chunks) as choose:
            random, parts = [], ([], [])
            for view, rows in chunks:
                choose(view)
                random.append(_random_state(device))
                # A context for each chunk: autocast keeps the weights it has cast, and those of
                # this pass have no gradient.
                with torch.no_grad(), self.scope():
                    parts[view].append(self.model.encoder(make(view, rows)))
            r = [torch.cat(part).requires_grad_() for part in parts]
            del parts
            with self.scope():
                loss, head_loss, accuracy = self.model.losses(*r, labels)
            inside = {id(p) for p in self.model.encoder.parameters()}
            rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in inside]
            *dr, d1, d2 = torch.autograd.grad(scale(loss + head_loss), [*rest, *r])

            with _statistics_stay(self.norms):
                for number, (view, rows) in enumerate(chunks):
                    last = number == len(chunks) - 1
                    alone = self.ranks.size > 1 and not last
                    choose(view)
                    _set_random_state(random[number], device)
                    with self.module.no_sync() if alone else contextlib.nullcontext():
                        with self.scope():
                            out = self.module(make(view, rows))
                        roots, grads = [out], [(d1, d2)[view][rows]]
                        if last:  # the other parameters, once: DDP waits for a gradient of each
                            roots, grads = roots + rest, grads + dr
                        torch.autograd.backward(roots, grads)
        return loss.detach(), accuracy

    # ------------------------------------------------------------------------ BatchNorm

    @contextlib.contextmanager
    def _constants(self, make, chunks: list[Chunk]) -> Iterator[Callable[[int], None]]:
        """Puts the rule in force; yields what chooses the statistics of a view."""
        if not self.norms or self.rule == "chunk":
            yield lambda view: None
            if self.ranks.size > 1:
                for norm in self.norms:
                    for value in (norm.running_mean, norm.running_var):
                        self.ranks.sum(value).div_(self.ranks.size)
            return
        running = [(norm.running_mean, norm.running_var) for norm in self.norms]
        whole = self._whole(make, chunks) if self.rule == "two-pass" else None

        def choose(view: int) -> None:
            for norm, (mean, var, *_) in zip(self.norms, whole[view] if whole else running):
                norm.running_mean, norm.running_var = mean, var

        for norm in self.norms:
            norm.eval()
        try:
            yield choose
        finally:
            for norm, (mean, var) in zip(self.norms, running):
                norm.running_mean, norm.running_var = mean, var
                norm.train()
        for view in whole or ():
            for norm, (mean, var, rows) in zip(self.norms, view):
                norm.num_batches_tracked += 1
                norm.running_mean.lerp_(mean, norm.momentum)
                norm.running_var.lerp_(var * (rows / (rows - 1)), norm.momentum)

    @torch.no_grad()
    def _whole(self, make, chunks: list[Chunk]) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
        """By view and BatchNorm: mean and variance of its input over the rows of all ranks, and
        how many values of a channel these were."""
        sums = torch.zeros(2, len(self.norms)).tolist()
        view = 0

        def gather(index: int) -> Callable:
            def hook(norm, inputs) -> None:
                x = inputs[0]
                var, mean = torch.var_mean(x.float(), [0, *range(2, x.dim())], correction=0)
                var, mean = var.to(wide(x.device)), mean.to(wide(x.device))
                count = torch.full_like(mean, x.numel() // x.shape[1])
                sums[view][index] += torch.stack((count, count * mean, count * (var + mean**2)))

            return hook

        handles = [m.register_forward_pre_hook(gather(i)) for i, m in enumerate(self.norms)]
        device = next(self.model.parameters()).device
        before = _random_state(device)  # pass 1 leaves out the same
        with _statistics_stay(self.norms):
            for view, rows in chunks:
                with self.scope():
                    self.model.encoder(make(view, rows))
        _set_random_state(before, device)
        for handle in handles:
            handle.remove()

        def finish(norm, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            count, mean, square = self.ranks.sum(total)
            mean = mean / count
            var = (square / count - mean**2).clamp_min(0)
            like = norm.running_mean
            return mean.to(like), var.to(like), count.to(like)

        return [[finish(*pair) for pair in zip(self.norms, totals)] for totals in sums]


@contextlib.contextmanager
def _statistics_stay(norms: list[nn.Module]) -> Iterator[None]:
    """Running statistics do not move, while chunks are normalised as before."""
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _random_state(device: torch.device) -> list[Tensor]:
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
