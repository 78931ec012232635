"""``NTXentLoss`` and ``SupConLoss`` of pytorch_metric_learning for two views, and its
``SelfSupervisedLoss``.

``NTXentLoss`` also works inside the library's own ``SelfSupervisedLoss``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..loss import fast_directclr_loss, info_nce


class NTXentLoss(nn.Module):
    """NT-Xent of pairs by label: ``NTXentLoss(temperature)(embeddings, labels)``.

    Labels have to say that rows are two views: each label once in the first half and in the same
    place of the second, or once in ``embeddings`` and in the same place of ``ref_emb``. Labels that
    more rows share (there each of their pairs has a denominator of its own), miners, and other
    distances, reducers and regularizers need the original.
    """

    def __init__(self, temperature: float = 0.07, **kwargs) -> None:
        super().__init__()
        for name, value in kwargs.items():
            if value is not None:
                raise NotImplementedError(
                    f"{name}: expected None (cosine similarity, mean over pairs), got "
                    f"{type(value).__name__}"
                )
        self.temperature = temperature

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple=None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """0-dim loss of embeddings (2N, d) and labels (2N,), over both directions; or of
        embeddings and ref_emb (N, d), labels and ref_labels (N,), for the anchors of the first."""
        if indices_tuple is not None:
            raise NotImplementedError("indices_tuple: expected None, got the pairs of a miner")
        alone = ref_emb is None
        if alone and labels is not None:
            half = len(labels) // 2
            labels, ref_labels = labels[:half], labels[half:]
            embeddings, ref_emb = embeddings[:half], embeddings[half:]
        if labels is None or ref_labels is None or not self._has_pairs(labels, ref_labels, alone):
            raise NotImplementedError(f"labels: expected {self._pairs}, got others")
        return self._of_pairs(embeddings, ref_emb, ref_labels, alone)

    _pairs = "each twice, in the same place of either view"

    def _has_pairs(self, labels: Tensor, ref_labels: Tensor, alone: bool) -> bool:
        return torch.equal(labels, ref_labels) and len(labels.unique()) == len(labels)

    def _of_pairs(self, z1: Tensor, z2: Tensor, labels: Tensor, symmetric: bool) -> Tensor:
        return _loss(z1, z2, self.temperature, symmetric)


class SupConLoss(NTXentLoss):
    """Supervised contrastive loss: ``SupConLoss(temperature)(embeddings, labels)``.

    Called as :class:`NTXentLoss`, and ``ref_emb`` may have more rows. Any rows may share a label,
    but every anchor has a positive in a place of its own: row i of the second half, or of
    ``ref_emb``, has the label of row i.
    """

    def __init__(self, temperature: float = 0.1, **kwargs) -> None:
        super().__init__(temperature, **kwargs)

    _pairs = "row i of the second half, or of ref_emb, to have the label of row i"

    def _has_pairs(self, labels: Tensor, ref_labels: Tensor, alone: bool) -> bool:
        return torch.equal(labels, ref_labels if alone else ref_labels[: len(labels)])

    def _of_pairs(self, z1: Tensor, z2: Tensor, labels: Tensor, symmetric: bool) -> Tensor:
        # There a negative label is as good as another.
        return _loss(z1, z2, self.temperature, symmetric, labels=labels - labels.min())


class SelfSupervisedLoss(nn.Module):
    """``SelfSupervisedLoss(NTXentLoss())(embeddings, ref_emb)``: labels are never made.

    Args:
        loss: an :class:`NTXentLoss` of this module (``TypeError``).
        symmetric: candidates from both views and anchors too; False takes the anchors of
            ``embeddings`` and the candidates of ``ref_emb``.
    """

    def __init__(self, loss: NTXentLoss, symmetric: bool = True) -> None:
        super().__init__()
        if not isinstance(loss, NTXentLoss):
            raise TypeError(
                f"loss: expected NTXentLoss of directclr_fast.adapters, got {type(loss).__name__}"
            )
        self.loss, self.symmetric = loss, symmetric

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """0-dim loss of two views (N, d)."""
        return _loss(embeddings, ref_emb, self.loss.temperature, self.symmetric)


def _loss(z1: Tensor, z2: Tensor, temperature: float, symmetric: bool, **options) -> Tensor:
    if symmetric:
        return fast_directclr_loss(z1, z2, None, temperature, negatives="both", **options)
    return info_nce(z1, z2, temperature, **options)
