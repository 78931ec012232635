"""``MultipleNegativesRankingLoss`` of sentence_transformers, and its cached form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..loss import fast_directclr_loss, info_nce
from . import initialised, own_first

_ONE = ("query_to_doc",)
_TWO = ("query_to_doc", "doc_to_query")


class MultipleNegativesRankingLoss(nn.Module):
    """InfoNCE of (anchor, positive, negative...) columns, negatives as further candidates.

    Args:
        model: called with the features of a column, returns a dict with "sentence_embedding".
        scale: 1/temperature, positive (``ValueError``).
        similarity_fct: None or sentence_transformers' ``cos_sim``.
        gather_across_devices: take candidates from all processes, equally many in each.
        directions, partition_mode: ``("query_to_doc",)``, or ``("query_to_doc", "doc_to_query")``
            with "per_direction".
        hardness_mode: must be None; ``hardness_strength`` is then without effect.

    Another similarity, direction or weighting raises ``NotImplementedError``.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = _ONE,
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale: expected a positive number, got {scale!r}")
        name = getattr(similarity_fct, "__name__", type(similarity_fct).__name__)
        if similarity_fct is not None and name not in ("cos_sim", "pytorch_cos_sim"):
            raise NotImplementedError(f"similarity_fct: expected None or cos_sim, got {name}")
        two = sorted(directions) == sorted(_TWO) and partition_mode == "per_direction"
        if not two and tuple(directions) != _ONE:
            raise NotImplementedError(
                f"directions: expected {_ONE}, or {_TWO} with partition_mode='per_direction', "
                f"got {tuple(directions)} with {partition_mode!r}"
            )
        if hardness_mode is not None:
            raise NotImplementedError(f"hardness_mode: expected None, got {hardness_mode!r}")
        self.model, self.scale, self.similarity_fct = model, scale, similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions, self.partition_mode = tuple(directions), partition_mode

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels=None) -> Tensor:
        """0-dim loss of at least two columns of features; ``labels`` are not read."""
        embeddings = [self._embed(features) for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels=None) -> Tensor:
        """0-dim loss of anchors (N, d), positives (N, d) and any number of negatives (K, d)."""
        if len(embeddings) < 2:
            raise ValueError(
                f"embeddings: expected anchors and positives, got {len(embeddings)} columns"
            )
        queries, positives, *negatives = embeddings
        temperature = 1 / self.scale
        symmetric = len(self.directions) == 2
        if not (self.gather_across_devices and initialised() and dist.get_world_size() > 1):
            candidates = torch.cat([positives, *negatives])
            return fast_directclr_loss(queries, candidates, None, temperature, symmetric=symmetric)
        candidates = torch.cat([own_first(column) for column in (positives, *negatives)])
        loss = info_nce(queries, candidates, temperature)
        if symmetric:
            loss = (loss + info_nce(positives, own_first(queries), temperature)) / 2
        return loss

    def _embed(self, features: dict[str, Any]) -> Tensor:
        return self.model(features)["sentence_embedding"]

    @property
    def temperature(self) -> float:
        """1 / scale."""
        return 1 / self.scale

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {
            "scale": self.scale,
            "similarity_fct": "cos_sim",
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
        }


class CachedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """The same, the encoder run on ``mini_batch_size`` rows at a time: its activations are those of
    one such chunk, and it is run once more in the backward pass, with the same dropout.

    Args:
        mini_batch_size: rows of a chunk, positive (``ValueError``).
        mini_batch_num_tokens: must be None (``NotImplementedError``).
        show_progress_bar: no effect.

    The others are those of :class:`MultipleNegativesRankingLoss`.
    """

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = _ONE,
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode,
            hardness_mode, hardness_strength,
        )  # fmt: skip
        if mini_batch_num_tokens is not None:
            raise NotImplementedError(
                f"mini_batch_num_tokens: expected None, got {mini_batch_num_tokens}"
            )
        if not mini_batch_size > 0:
            raise ValueError(f"mini_batch_size: expected a positive int, got {mini_batch_size!r}")
        self.mini_batch_size, self.show_progress_bar = mini_batch_size, show_progress_bar

    def _embed(self, features: dict[str, Any]) -> Tensor:
        tensors = {
            name: value
            for name, value in features.items()
            if isinstance(value, Tensor) and value.dim() > 0 and name != "prompt_length"
        }
        rows = len(next(iter(tensors.values())))
        for name, value in tensors.items():
            if len(value) != rows:
                raise NotImplementedError(
                    f"sentence_features: expected {rows} rows in every tensor, to cut it, got "
                    f"{name!r} of shape {tuple(value.shape)}"
                )
        embeddings = []
        for start in range(0, rows, self.mini_batch_size):
            part = slice(start, start + self.mini_batch_size)
            chunk = dict(features) | {name: value[part] for name, value in tensors.items()}
            embeddings.append(checkpoint(self._embed_chunk, chunk, use_reentrant=False))
        return torch.cat(embeddings)

    def _embed_chunk(self, chunk: dict[str, Any]) -> Tensor:
        # A copy: models write into the dict they are given, and this one is read twice.
        return super()._embed(dict(chunk))

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return super().get_config_dict() | {"mini_batch_size": self.mini_batch_size}
