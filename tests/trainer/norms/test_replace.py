import warnings
from collections import OrderedDict
from copy import deepcopy

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    EvoNorm2dB0,
    FrozenBatchNormAct2d,
    GroupNormAct,
    LayerNormAct2d,
    RmsNorm2d,
)
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm_act import LayerNormAct
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from syncbn import SyncBatchNorm
from trainer.errors import ConfigurationError
from trainer.jobspec import Norm
from trainer.norms import replace_norms, trace_forward
from trainer.norms.factory import count_groups

IMAGE, TOKENS = (8, 5, 6), (7, 8)
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


def switch(model, norm, *shape, dtype=None):
    sample = torch.zeros(2, *shape, dtype=dtype)
    return replace_norms(model, norm, trace_forward(model, sample), sample)


def norms_in(model):
    return [layer for layer in model.modules() if "Norm" in type(layer).__name__]


def model_of(layer):
    return nn.Sequential(OrderedDict(first=nn.Identity(), norm=deepcopy(layer), last=nn.Identity()))


def randomise(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


class Calling(nn.Module):
    """A model whose forward is a function of it and the input."""

    def __init__(self, forward, **children):
        super().__init__()
        self.function = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("norm", Norm)
@pytest.mark.parametrize(("layer", "shape"), CHANNELS_FIRST + CHANNELS_LAST)
def test_every_layer_is_switched_to_every_mode(layer, shape, norm):
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


def test_values_and_settings_are_kept():
    layer = nn.BatchNorm2d(8, eps=0.01, momentum=0.3, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.normal_(layer.bias).requires_grad_(False)
    layer.running_mean.fill_(2)
    model = model_of(layer)
    kept = model.norm
    assert switch(model, Norm.SYNC, *IMAGE, dtype=torch.float64).norm is kept
    for norm in (Norm.GROUP, Norm.LAYER):
        found = switch(model_of(layer), norm, *IMAGE, dtype=torch.float64).norm
        assert found.eps == 0.01
        assert torch.equal(found.weight, layer.weight)
        assert torch.equal(found.bias, layer.bias)
        assert (found.weight.requires_grad, found.bias.requires_grad) == (True, False)
        assert found.weight.dtype == torch.float64


def test_settings_of_batch_normalisation_outlive_its_class():
    layer = nn.SyncBatchNorm(8, eps=0.01, momentum=None, affine=False)
    layer.running_var.fill_(4)
    found = switch(model_of(layer), Norm.BATCH, *IMAGE).norm
    assert type(found) is nn.BatchNorm2d
    assert (found.eps, found.momentum, found.weight) == (0.01, None, None)
    assert (found.running_var == 4).all()
    untracked = nn.SyncBatchNorm(8, track_running_stats=False)
    assert switch(model_of(untracked), Norm.BATCH, *IMAGE).norm.running_mean is None
    assert switch(model_of(nn.InstanceNorm2d(8)), Norm.BATCH, *IMAGE).norm.running_mean is not None


def test_layers_that_are_of_the_mode_stay_as_they_are():
    for layer, norm, shape in [
        (nn.GroupNorm(2, 8), Norm.GROUP, IMAGE),
        (GroupNormAct(8, 2), Norm.GROUP, IMAGE),
        (nn.GroupNorm(1, 8), Norm.LAYER, IMAGE),
        (LayerNorm2d(8), Norm.LAYER, IMAGE),
        (nn.LayerNorm(8), Norm.LAYER, TOKENS),
        (nn.LayerNorm([8, 5, 6]), Norm.LAYER, IMAGE),
        (nn.BatchNorm2d(8), Norm.BATCH, IMAGE),
    ]:
        model = model_of(layer)
        kept = model.norm
        assert switch(model, norm, *shape).norm is kept


def test_activation_and_dropout_inside_a_layer_are_kept():
    layer = randomise(BatchNormAct2d(8, act_layer=nn.PReLU, drop_layer=lambda: nn.Dropout(0.5), inplace=False))
    model = switch(model_of(layer), Norm.BATCH, *IMAGE)
    assert [type(part) for part in model.norm] == [nn.BatchNorm2d, nn.Dropout, nn.PReLU]
    x = torch.randn(4, *IMAGE)
    torch.manual_seed(1)
    expected = layer.train()(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


def test_a_layer_in_several_places_stays_one():
    layer = nn.LayerNorm(8)
    model = nn.Sequential(layer, nn.Linear(8, 8), layer)
    switch(model, Norm.BATCH, 8)
    assert model[0] is model[2]
    assert type(model[0]) is nn.BatchNorm1d


def test_a_model_that_is_a_layer_is_switched():
    assert type(switch(nn.BatchNorm2d(8), Norm.LAYER, *IMAGE)) is nn.GroupNorm


def test_groups_divide_the_channels():
    expected = {100: 25, 64: 16, 512: 32, 37: 1, 3: 1}
    assert {channels: count_groups(channels) for channels in expected} == expected


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class UnknownNorm(nn.Module):
    def forward(self, x):
        return x / x.norm()


class ReadsItsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x) * self.norm.num_features


class KeepsItsNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.norms = [self.norm]

    def forward(self, x):
        return self.norms[0](x)


REFUSED = {
    r"0 \(timm.layers.evo_norm.EvoNorm2dB0\): .* not known": nn.Sequential(EvoNorm2dB0(3)),
    r"0.0 \(tests.trainer.norms.test_replace.Own\): .* not known": nn.Sequential(nn.Sequential(Own(3))),
    r"0 \(tests.trainer.norms.test_replace.UnknownNorm\): .* not known": nn.Sequential(UnknownNorm()),
    r"0 \(torch.nn.modules.normalization.LayerNorm\): it normalises over the last 3": nn.Sequential(
        nn.LayerNorm([3, 4, 4])
    ),
    r"norm \(.*\): .* does not reach it": Calling(lambda self, x: x, norm=nn.LayerNorm(3)),
    r"norm \(.*\): .* differ .* \[3, 4\]": Calling(
        lambda self, x: self.norm(x).flatten(2) + self.norm(x.flatten(2)), norm=nn.GroupNorm(1, 3)
    ),
    r"part \(.*Calling\): it normalises by layer_norm": Calling(
        lambda self, x: self.part(x), part=Calling(lambda self, x: F.layer_norm(x, [4]))
    ),
    r"the model \(.*\): it normalises by batch_norm": Calling(
        lambda self, x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_switched_is_refused_by_name(message):
    with pytest.raises(ConfigurationError, match=f"norm: cannot switch {message}"):
        switch(REFUSED[message], Norm.BATCH, 3, 4, 4)


def test_models_that_cannot_do_without_their_own_layers_are_refused():
    with pytest.raises(ConfigurationError, match=r"replaced it fails: AttributeError: .*num_features"):
        switch(ReadsItsNorm(), Norm.LAYER, 3, 4, 4)
    with pytest.raises(ConfigurationError, match=r"\(.*KeepsItsNorm\): it normalises by batch_norm"):
        switch(KeepsItsNorm(), Norm.GROUP, 3, 4, 4)


def test_scripted_modules_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    with pytest.raises(ConfigurationError, match=r"norm: cannot switch 0 \(.*\): TorchScript"):
        switch(nn.Sequential(scripted), Norm.NONE, 3, 4, 4)


def test_what_only_sounds_like_a_normalisation_is_left():
    weight_normalised = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(weight_normalised, nn.LocalResponseNorm(5), GlobalResponseNorm(8, channels_last=False))
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in switch(model, Norm.BATCH, 3, 4, 4).modules()] == kinds


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_fused_transformer_does_not_pass_by_the_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = switch(nn.TransformerEncoder(layer, 2), Norm.NONE, *TOKENS)
    x = torch.randn(2, *TOKENS)
    trained = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(x), trained)


def test_a_trace_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout())
    model[2].eval()
    before = deepcopy(model.state_dict())
    trace_forward(model, torch.randn(2, 3, 4, 4))
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        trace_forward(model, torch.randn(2, 4, 4, 4))
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
