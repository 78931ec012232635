"""Encoders: widths, stems, gradients, memory format, messages."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from directclr_fast.train import encoders


@pytest.mark.parametrize(
    ("name", "channels", "size", "width", "image_size"),
    [
        ("small", 1, 8, 256, 8),
        ("small", 3, 32, 256, 32),
        ("small", 3, 13, 256, None),  # odd sides: branch and shortcut must agree
        ("resnet18", 3, 32, 512, 32),
        ("resnet18", 1, 64, 512, None),
        ("resnet50", 2, 32, 2048, 32),
    ],
)
def test_representation(name, channels, size, width, image_size):
    if not name.startswith("small"):
        pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = encoders.build(name, channels=channels, image_size=image_size)
    x = torch.randn(4, channels, size, size)
    r = model(x)
    assert model.width == width and r.shape == (4, width) and r.dtype == torch.float32
    assert (r >= 0).all() and (r.std(0) > 0).float().mean() > 0.2
    r.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    model.eval()
    last = model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = model(x)
        got = last(x.to(memory_format=torch.channels_last))
    # Kernels of the two layouts add up in orders of their own: each is held against fp64.
    with torch.no_grad():
        truth = model.double()(x.double())
    for r in (got, want):
        assert (r - truth).norm() < 1e-4 * truth.norm()


def test_stems():
    pytest.importorskip("torchvision")
    large = encoders.build("resnet18")
    assert large.conv1.stride == (2, 2) and isinstance(large.maxpool, nn.MaxPool2d)
    assert encoders.build("resnet18", image_size=65).conv1.kernel_size == (7, 7)
    small = encoders.build("resnet18", image_size=64, channels=4)
    assert small.conv1.kernel_size == (3, 3) and small.conv1.stride == (1, 1)
    assert small.conv1.in_channels == 4 and isinstance(small.maxpool, nn.Identity)
    assert encoders.build("resnet18", channels=1).conv1.in_channels == 1
    assert not any(isinstance(m, nn.Linear) for m in large.modules())
    for stride, size in ((1, 8), (1, 16), (2, 17), (2, 32), (2, None)):
        stem = encoders.build("small", image_size=size).stem[0]
        assert stem.stride == (stride, stride), size


def test_residual_branches_start_at_zero():
    pytest.importorskip("torchvision")
    model = encoders.build("resnet50", image_size=32)
    assert not any(block.bn3.weight.any() for block in model.layer1)
    for name in ("small", "small-deep"):
        small = encoders.build(name)
        assert not any(block.branch[-1].weight.any() for block in small.blocks)


def test_the_last_shortcut_is_the_identity_or_cut():
    deep, cut = (
        encoders.build(f"small-{kind}", channels=1, image_size=8) for kind in ("deep", "cut")
    )
    assert len(deep.blocks) == len(cut.blocks) == 5 and not [*deep.blocks[-1].shortcut.parameters()]
    h = torch.rand(2, 256, 2, 2)
    assert torch.equal(deep.blocks[-1](h), h)
    branch = cut.blocks[-1].branch
    assert torch.equal(cut.blocks[-1](h), branch(h).relu()) and branch(h).std() > 0.1
    assert [*deep.state_dict()] == [*cut.state_dict()]


def test_untrained_small_encoder_sees_the_whole_image():
    """Shortcuts that skip pixels would leave it the top left corner until the branches learn."""
    model = encoders.build("small", channels=1, image_size=8).eval()
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    model(x).sum().backward()
    assert (x.grad != 0).all()


def test_small_encoder_learns():
    torch.manual_seed(0)
    model = encoders.build("small", channels=1, image_size=8)
    head = nn.Linear(model.width, 4)
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 4
    optimiser = torch.optim.AdamW([*model.parameters(), *head.parameters()], 3e-3)
    for _ in range(25):
        loss = nn.functional.cross_entropy(head(model(x)), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.2  # from log 4


def test_bad_input_gets_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match="encoder: expected one of resnet18, .*, got 'vit'"):
        encoders.build("vit")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"encoder resnet18: expected torchvision.*\[train\]"):
        encoders.build("resnet18")
    encoders.build("small")
