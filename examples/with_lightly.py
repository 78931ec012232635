"""SimCLR as a lightly tutorial writes it, with one import changed.

    python examples/with_lightly.py

lightly itself is not needed here: its transforms give two views of a batch, and so do two lines.
"""

import torch
from torch import nn

# from lightly.loss import NTXentLoss
from directclr_fast.adapters.lightly import NTXentLoss

STEPS, BATCH = 40, 128


class SimCLR(nn.Module):
    """A backbone and a projection head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 128), nn.ReLU())
        self.projection_head = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 8, 8) to (N, 32)."""
        return self.projection_head(self.backbone(x))


def main() -> None:
    """Trains on random pictures."""
    torch.manual_seed(0)
    model, criterion = SimCLR(), NTXentLoss(temperature=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, losses = torch.randn(1024, 3, 8, 8), []
    for _ in range(STEPS):
        batch = images[torch.randint(len(images), (BATCH,))]
        x0, x1 = (batch + 0.3 * torch.randn_like(batch) for _ in range(2))
        loss = criterion(model(x0), model(x1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {STEPS} steps")


if __name__ == "__main__":
    main()
