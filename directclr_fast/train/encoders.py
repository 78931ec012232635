"""Encoders: (B, C, H, W) fp32 -> representation (B, R), without negative entries, R in `.width`.

All end in ReLU and a global average pool and have no classifier. The last BatchNorm of every
residual branch starts at zero, as in the paper's release.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..machine import needs
from .config import ENCODERS, check_setting

SMALL_IMAGE = 64  # pixels; up to here a ResNet keeps the full resolution in its first layers


def build(name: str, *, channels: int = 3, image_size: int | None = None) -> nn.Module:
    """The encoder `name` with random weights; `.width` is its representation's size R.

    resnet18 (R 512) and resnet50 (R 2048) are torchvision's; for image_size up to 64 they start
    with a 3x3 convolution of stride 1 and no max-pool. small (R 256) is for 8 to 32 pixels and
    trains on a CPU; above 16 pixels its stem halves the sides. small-deep (R 256) ends in one more
    block, whose shortcut is the identity, as a ResNet's last; in small-cut that shortcut is cut.
    image_size: pixels of the side; None means large. ValueError for an unknown name, ImportError if
    torchvision is needed and missing.
    """
    check_setting("encoder", name, choices=ENCODERS)
    if name.startswith("small"):
        widths = (32, 64, 128, 256, 256)[: 4 if name == "small" else 5]
        encoder = SmallEncoder(channels, widths, stem_stride=1 if (image_size or 32) <= 16 else 2)
        if name == "small-cut":
            encoder.blocks[-1].cut()
        return encoder
    with needs(f"encoder {name}", "torchvision"):
        from torchvision import models
    model = getattr(models, name)(weights=None, zero_init_residual=True)
    model.width = model.fc.in_features
    model.fc = nn.Identity()
    small = image_size is not None and image_size <= SMALL_IMAGE
    if small:
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    # A stem made here gets the initialisation that torchvision gives its own.
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def last_block(encoder: nn.Module) -> nn.Module:
    """The residual block before the average pool, of an encoder of this module."""
    return encoder.blocks[-1] if isinstance(encoder, SmallEncoder) else encoder.layer4[-1]


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut, (B, cin, H, W) -> (B, cout, H/stride, W/stride)."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(cin, cout, 3, stride, 1, bias=False),
            nn.BatchNorm2d(cout),
            nn.ReLU(inplace=True),
            nn.Conv2d(cout, cout, 3, 1, 1, bias=False),
            nn.BatchNorm2d(cout),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or cin != cout:
            # Averaged, not skipped: while the branches are zero the shortcuts are all that sees the
            # image.
            pool = nn.AvgPool2d(2, ceil_mode=True) if stride > 1 else nn.Identity()
            conv = nn.Conv2d(cin, cout, 1, bias=False)
            self.shortcut = nn.Sequential(pool, conv, nn.BatchNorm2d(cout))
        self.relu = nn.ReLU(inplace=True)

    def cut(self) -> None:
        """Leaves out the shortcut. The branch, now all there is, no longer starts at zero."""
        self.shortcut = None
        nn.init.ones_(self.branch[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)
        return self.relu(branch if self.shortcut is None else branch + self.shortcut(x))


class SmallEncoder(nn.Module):
    """A 3x3 stem, then a residual block for each of `widths`: the first, and one that is no wider
    than that before it, keep H and W, others halve them."""

    def __init__(self, channels: int, widths: tuple[int, ...], stem_stride: int):
        super().__init__()
        self.width = widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.Sequential(
            *(_Block(cin, cout, 1 if cin == cout else 2) for cin, cout in pairs)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for block in self.blocks:
            nn.init.zeros_(block.branch[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))
