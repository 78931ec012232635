"""DirectCLR as a LightningModule.

    python examples/with_lightning.py

With several devices, group="world" takes candidates from all of them, and DDP's averaging gives the
gradient of the whole batch.
"""

import sys
import tempfile

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from directclr_fast import DirectCLRLoss

try:
    import lightning
except ImportError as error:
    sys.exit(f"This example needs Lightning (pip install lightning): {error}.")

EPOCHS, BATCH, WIDTH = 4, 128, 64


class DirectCLR(lightning.LightningModule):
    """An encoder without projector."""

    def __init__(self, devices: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 128), nn.ReLU())
        self.encoder.append(nn.Linear(128, WIDTH))
        self.criterion = DirectCLRLoss(dim=16, group="world" if devices > 1 else None)
        self.losses = []

    def training_step(self, batch, _) -> torch.Tensor:
        """Two views of one batch of pictures."""
        (images,) = batch
        views = (images + 0.3 * torch.randn_like(images) for _ in range(2))
        loss = self.criterion(*(self.encoder(view) for view in views))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of the encoder alone; the loss has no parameters."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main() -> None:
    """Trains on random pictures."""
    torch.manual_seed(0)
    model = DirectCLR(devices=1)
    loader = DataLoader(TensorDataset(torch.randn(1280, 3, 8, 8)), BATCH, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=EPOCHS, default_root_dir=folder, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, loader)
    steps = len(model.losses)
    print(f"loss: {model.losses[0]:.3f} at first, {model.losses[-1]:.3f} after {steps} steps")


if __name__ == "__main__":
    main()
