"""``open_clip.loss.ClipLoss``, also across processes.

The original multiplies features as they come and relies on the model to have normalised them. Here
they are normalised again: the same to rounding, in the loss and in every gradient before the
model's own normalisation. Features that are not unit rows are compared by their cosine, where the
original would compare them by their dot product.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ..loss import fast_directclr_loss, info_nce
from . import initialised, own_first


class ClipLoss(nn.Module):
    """CLIP's loss: ``ClipLoss()(image_features, text_features, logit_scale)``.

    Args:
        local_loss: with several processes, the loss of this process's rows against the features of
            all; else that of the whole batch.
        gather_with_grad: with several processes, send gradients back to the features of others.
            Without it towers get a fraction of the batch's gradient, as with the original.
        cache_labels: no effect; there are no labels here.
        rank: no effect; torch.distributed knows it.
        world_size: above 1, features are those of this process, equally many in each.
        use_horovod: must be False.

    After DistributedDataParallel's averaging, gradients are those of the original; that of
    ``logit_scale`` is, with ``local_loss`` and ``gather_with_grad``, averaged already.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise NotImplementedError(
                f"use_horovod: expected False, got {use_horovod!r}; processes talk through "
                "torch.distributed"
            )
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.cache_labels, self.rank, self.world_size = cache_labels, rank, world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """0-dim loss of features (N, d), or ``{"contrastive_loss": loss}`` with ``output_dict``.

        ``logit_scale`` is 1/temperature, positive; as a tensor of one element it receives its
        gradient. ``logit_bias`` must be None (``NotImplementedError``).
        """
        if logit_bias is not None:
            raise NotImplementedError(
                "logit_bias: expected None, got a bias; it cancels in this loss (SigLipLoss is the "
                "one that needs it)"
            )
        loss = self._loss(image_features, text_features, 1 / logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, images: Tensor, texts: Tensor, temperature: float | Tensor) -> Tensor:
        if self.world_size == 1:
            return fast_directclr_loss(images, texts, None, temperature)
        processes = dist.get_world_size() if initialised() else 1
        if processes != self.world_size:
            raise ValueError(
                f"world_size: expected {processes}, the processes of torch.distributed, "
                f"got {self.world_size}"
            )
        if not self.local_loss:
            if not self.gather_with_grad:
                images, texts = _divided(images, processes), _divided(texts, processes)
            return fast_directclr_loss(images, texts, None, temperature, group="world")
        if self.gather_with_grad:
            return fast_directclr_loss(
                images, texts, None, temperature, group="world", reduction="none"
            ).mean()
        # Anchors only have a gradient; all candidates, one's own included, are constants.
        by_image = info_nce(images, own_first(texts.detach()), temperature)
        return (by_image + info_nce(texts, own_first(images.detach()), temperature)) / 2


def _divided(features: Tensor, by: int) -> Tensor:
    """The features; their gradient is divided."""
    features = features.view_as(features)
    if features.requires_grad:
        features.register_hook(lambda grad: grad / by)
    return features
