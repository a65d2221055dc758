import warnings
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    EvoNorm2dB0,
    GroupNormAct,
)
from torch import nn
from torchvision.models.convnext import LayerNorm2d

from tests.trainer.norms.normed import IMAGE, TOKENS, model_of, switch
from trainer.errors import ConfigurationError
from trainer.jobspec import Norm
from trainer.norms import trace_forward


def randomise(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


class Calling(nn.Module):
    """Model whose forward is a given function of the model and its input."""

    def __init__(self, forward, **children):
        super().__init__()
        self.function = forward
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


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


def test_settings_are_kept_between_batch_norm_classes():
    layer = nn.SyncBatchNorm(8, eps=0.01, momentum=None, affine=False)
    layer.running_var.fill_(4)
    found = switch(model_of(layer), Norm.BATCH, *IMAGE).norm
    assert type(found) is nn.BatchNorm2d
    assert (found.eps, found.momentum, found.weight) == (0.01, None, None)
    assert (found.running_var == 4).all()
    untracked = nn.SyncBatchNorm(8, track_running_stats=False)
    assert switch(model_of(untracked), Norm.BATCH, *IMAGE).norm.running_mean is None
    assert switch(model_of(nn.InstanceNorm2d(8)), Norm.BATCH, *IMAGE).norm.running_mean is not None


def test_layers_already_of_the_mode_are_unchanged():
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
    layer = randomise(
        BatchNormAct2d(8, act_layer=nn.PReLU, drop_layer=lambda: nn.Dropout(0.5), inplace=False)
    )
    model = switch(model_of(layer), Norm.BATCH, *IMAGE)
    assert [type(part) for part in model.norm] == [nn.BatchNorm2d, nn.Dropout, nn.PReLU]
    x = torch.randn(4, *IMAGE)
    torch.manual_seed(1)
    expected = layer.train()(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), expected)


def test_a_shared_layer_stays_shared():
    layer = nn.LayerNorm(8)
    model = nn.Sequential(layer, nn.Linear(8, 8), layer)
    switch(model, Norm.BATCH, 8)
    assert model[0] is model[2]
    assert type(model[0]) is nn.BatchNorm1d


def test_a_model_that_is_a_single_layer_is_replaced():
    assert type(switch(nn.BatchNorm2d(8), Norm.LAYER, *IMAGE)) is nn.GroupNorm


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
    r"0 \(timm.layers.evo_norm.EvoNorm2dB0\): .* not supported": nn.Sequential(EvoNorm2dB0(3)),
    r"0.0 \(tests.trainer.norms.test_replace.Own\): .* not supported": nn.Sequential(nn.Sequential(Own(3))),
    r"0 \(tests.trainer.norms.test_replace.UnknownNorm\): .* not supported": nn.Sequential(UnknownNorm()),
    r"0 \(torch.nn.modules.normalization.LayerNorm\): it normalises over the last 3": nn.Sequential(
        nn.LayerNorm([3, 4, 4])
    ),
    r"norm \(.*\): .* does not reach it": Calling(lambda self, x: x, norm=nn.LayerNorm(3)),
    r"norm \(.*\): .* differ .* \[3, 4\]": Calling(
        lambda self, x: self.norm(x).flatten(2) + self.norm(x.flatten(2)), norm=nn.GroupNorm(1, 3)
    ),
    r"part \(.*Calling\): it calls layer_norm": Calling(
        lambda self, x: self.part(x), part=Calling(lambda self, x: F.layer_norm(x, [4]))
    ),
    r"the model \(.*\): it calls batch_norm": Calling(
        lambda self, x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_layers_that_cannot_be_replaced_are_rejected_by_name(message):
    with pytest.raises(
        ConfigurationError, match=f"norm: must be a mode of all layers; cannot replace {message}"
    ):
        switch(REFUSED[message], Norm.BATCH, 3, 4, 4)


def test_models_that_depend_on_their_own_layers_are_rejected():
    with pytest.raises(
        ConfigurationError, match=r"fails with replaced normalisation layers: AttributeError: .*num_features"
    ):
        switch(ReadsItsNorm(), Norm.LAYER, 3, 4, 4)
    with pytest.raises(ConfigurationError, match=r"\(.*KeepsItsNorm\): it calls batch_norm"):
        switch(KeepsItsNorm(), Norm.GROUP, 3, 4, 4)


def test_scripted_modules_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    with pytest.raises(
        ConfigurationError, match=r"norm: must be a mode of all layers; cannot replace 0 \(.*\): TorchScript"
    ):
        switch(nn.Sequential(scripted), Norm.NONE, 3, 4, 4)


def test_a_trace_does_not_change_the_model():
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
