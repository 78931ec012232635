"""Two towers and a learned scale as open_clip trains them, with one import changed.

    python examples/with_open_clip.py

Across processes (torchrun): ClipLoss(local_loss=True, gather_with_grad=True, rank=RANK,
world_size=WORLD_SIZE), as in open_clip.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# from open_clip.loss import ClipLoss
from directclr_fast.adapters.open_clip import ClipLoss

STEPS, BATCH = 60, 128


class TwoTowers(nn.Module):
    """Returns what an open_clip model returns: unit features and exp of the learned scale."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text = nn.Linear(96, 32), nn.EmbeddingBag(500, 32)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
        """images (N, 96), texts (N, words)."""
        return {
            "image_features": F.normalize(self.visual(images), dim=-1),
            "text_features": F.normalize(self.text(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def main() -> None:
    """Trains on random pictures, each with a random caption of its own."""
    torch.manual_seed(0)
    model, criterion = TwoTowers(), ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    images, texts, losses = torch.randn(512, 96), torch.randint(500, (512, 6)), []
    for _ in range(STEPS):
        batch = torch.randperm(len(images))[:BATCH]
        output = model(images[batch], texts[batch])
        loss = criterion(**output, output_dict=True)["contrastive_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {STEPS} steps")


if __name__ == "__main__":
    main()
