"""What is looked at while a comparison trains: spectra, and where the gradient goes."""

from __future__ import annotations

import pytest
import torch

from directclr_fast.paper import mechanism
from directclr_fast.train import encoders
from directclr_fast.train.config import TrainConfig
from directclr_fast.train.loop import Model

SETTINGS = {"data": "fake:n=96,size=8,channels=1", "views": "affine", "image_size": 8}
SETTINGS |= {"batch_size": 32, "device": "cpu"}


def model_of(encoder, mode, branch=1.0):
    """A model whose last branch has this weight; it starts at zero."""
    config = TrainConfig(mode=mode, encoder=encoder, dim=20, **SETTINGS).resolve()
    model = Model(config, 1, 10)
    encoders.last_block(model.encoder).branch[-1].weight.data.fill_(branch)
    return config, model


def directions(encoder, mode, branch=1.0):
    config, model = model_of(encoder, mode, branch)
    of = mechanism.look(model, config)["gradient"]
    return {name: values["directions"] for name, values in of.items()}


def test_gradients_before_and_behind_the_last_block():
    """DirectCLR's gradient has d0 directions at r. Before the last block it has as many while the
    branch is zero, the shortcut being the identity, and more through the branch."""
    assert directions("small-deep", "directclr", 0.0) == {"output": 20, "input": 20}
    through = directions("small-deep", "directclr")
    assert through["output"] == 20 and through["input"] > 60
    cut = directions("small-cut", "directclr")
    assert cut["output"] == 20 and cut["input"] > 20
    assert directions("small-deep", "baseline")["output"] > 20


def test_columns_that_no_loss_reads_have_no_gradient():
    config, model = model_of("small-deep", "directclr")
    views = torch.rand(2, 16, 1, 8, 8)
    of = mechanism.gradients(model, *views)
    assert of["output"].shape == (32, 256) and not of["output"][:, 20:].any()
    assert of["output"][:, :20].any(0).all()
    assert of["input"].shape == (32, 256) and of["input"].any(0).all()  # one pixel is left of 8 x 8


def test_a_look_changes_nothing():
    config, model = model_of("small-deep", "simclr")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    a, b = (mechanism.look(model, config) for _ in range(2))
    assert a == b and model.training and all(part.training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert set(a["spectra"]) == {"representation", "embedding"}
    assert len(a["spectra"]["representation"]["log10"]) == 256 / mechanism.EVERY


def test_steps():
    assert mechanism.steps(640) == [0, 10, 20, 40, 80, 160, 320, 640]
    assert mechanism.steps(2) == [0, 1, 2]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_last_block_of_a_resnet(name):
    pytest.importorskip("torchvision")
    encoder = encoders.build(name, image_size=32)
    block = encoders.last_block(encoder)
    assert block.downsample is None and [*encoder.layer4.children()][-1] is block
