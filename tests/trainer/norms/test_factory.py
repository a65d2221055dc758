import pytest
import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    FrozenBatchNormAct2d,
    GroupNormAct,
    LayerNormAct2d,
    RmsNorm2d,
)
from timm.layers.norm_act import LayerNormAct
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from syncbn import SyncBatchNorm
from tests.trainer.norms.normed import IMAGE, TOKENS, model_of, switch
from trainer.jobspec import Norm
from trainer.norms.factory import count_groups

CHANNELS_FIRST = [
    (nn.BatchNorm2d(8), IMAGE),
    (nn.BatchNorm1d(8), (8, 7)),
    (nn.BatchNorm3d(8), (8, 2, 3, 4)),
    (nn.SyncBatchNorm(8), IMAGE),
    (SyncBatchNorm(8), IMAGE),
    (nn.InstanceNorm2d(8), IMAGE),
    (nn.GroupNorm(2, 8), IMAGE),
    (nn.GroupNorm(1, 8), IMAGE),
    (LayerNorm2d(8), IMAGE),
    (FrozenBatchNorm2d(8), IMAGE),
    (timm.layers.LayerNorm2d(8), IMAGE),
    (RmsNorm2d(8), IMAGE),
    (BatchNormAct2d(8), IMAGE),
    (FrozenBatchNormAct2d(8), IMAGE),
    (GroupNormAct(8, 2), IMAGE),
    (LayerNormAct2d(8), IMAGE),
]


CHANNELS_LAST = [
    (nn.LayerNorm(8), (8,)),
    (nn.LayerNorm(8), TOKENS),
    (nn.LayerNorm(8), (3, 4, 8)),
    (nn.RMSNorm(8), TOKENS),
    (timm.layers.LayerNorm(8), TOKENS),
    (timm.layers.RmsNorm(8), TOKENS),
    (LayerNormAct(8), TOKENS),
]


IS_OF_MODE = {
    Norm.NONE: lambda layer: False,
    Norm.BATCH: lambda layer: type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    Norm.SYNC: lambda layer: type(layer) is SyncBatchNorm,
    Norm.GROUP: lambda layer: isinstance(layer, nn.GroupNorm) and layer.num_groups > 1,
    Norm.LAYER: lambda layer: (
        isinstance(layer, nn.LayerNorm) or (isinstance(layer, nn.GroupNorm) and layer.num_groups == 1)
    ),
}


def norms_in(model):
    return [layer for layer in model.modules() if "Norm" in type(layer).__name__]


@pytest.mark.parametrize("norm", Norm)
@pytest.mark.parametrize(("layer", "shape"), CHANNELS_FIRST + CHANNELS_LAST)
def test_every_layer_is_replaced_in_every_mode(layer, shape, norm):
    model = switch(model_of(layer), norm, *shape)
    found = norms_in(model)
    assert len(found) == (norm is not Norm.NONE)
    assert all(IS_OF_MODE[norm](each) for each in found)
    for training in (True, False):
        assert model.train(training)(torch.randn(4, *shape)).shape == (4, *shape)


@pytest.mark.parametrize(("layer", "shape"), CHANNELS_LAST)
def test_channels_last_input_is_normalised_over_all_but_its_channels(layer, shape):
    model = switch(model_of(layer), Norm.BATCH, *shape)
    x = 3 + 2 * torch.randn(16, *shape)
    expected = (x - x.flatten(0, -2).mean(0)) / x.flatten(0, -2).std(0, correction=0)
    expected = F.relu(expected) if isinstance(layer, LayerNormAct) else expected
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


def test_groups_divide_the_channels():
    expected = {100: 25, 64: 16, 512: 32, 37: 1, 3: 1}
    assert {channels: count_groups(channels) for channels in expected} == expected
