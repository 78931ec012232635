"""DirectCLR in plain PyTorch: no projector, the loss on the first columns of the representation.

    python examples/plain.py

Random pictures, a small network, seconds on a CPU. For real data: `directclr-fast train`.
"""

import torch
from torch import nn

from directclr_fast import DirectCLRLoss, collapse_report

STEPS, BATCH, WIDTH = 30, 64, 64


def main() -> None:
    """Trains, then says how many dimensions the representation uses."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, WIDTH, 3, stride=2, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    criterion = DirectCLRLoss(dim=16, temperature=0.1)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
    images = torch.rand(512, 3, 16, 16)
    losses = []
    for _ in range(STEPS):
        batch = images[torch.randint(len(images), (BATCH,))]
        views = (batch + 0.1 * torch.randn_like(batch) for _ in range(2))
        loss = criterion(*(encoder(view) for view in views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} after {STEPS} steps")
    encoder.eval()
    with torch.no_grad():
        print(collapse_report(encoder(images)))


if __name__ == "__main__":
    main()
