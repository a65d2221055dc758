import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from tests.trainer.models.building import IMAGE, kinds_of
from trainer.errors import ConfigurationError
from trainer.jobspec import CnnSpec, MlpSpec, Norm
from trainer.models import build_model


def test_the_network_of_figure_1():
    model = build_model(MlpSpec(), Norm.NONE, (1, 28, 28), 10, seed=0)
    linear = kinds_of(model, nn.Linear)
    assert [layer.weight.shape for layer in linear] == [(100, 784), (100, 100), (100, 100), (10, 100)]
    assert abs(linear[0].weight.std().item() - 0.05) < 0.001
    assert all((layer.bias == 0).all() for layer in linear)
    assert len(kinds_of(model, nn.Sigmoid)) == 3
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(
    ("norm", "kind", "has_bias"),
    [
        (Norm.NONE, nn.Identity, True),
        (Norm.BATCH, nn.BatchNorm1d, False),
        (Norm.SYNC, SyncBatchNorm, False),
        (Norm.GROUP, nn.GroupNorm, True),
        (Norm.LAYER, nn.GroupNorm, True),
    ],
)
def test_the_norm_precedes_each_activation_and_replaces_the_bias(norm, kind, has_bias):
    model = build_model(MlpSpec(hidden=[8, 8], dropout=0.5, activation="silu"), norm, (4,), 3, seed=0)
    assert [name for name, _ in model.named_children()] == [
        "flatten",
        *("linear1", "norm1", "activation1", "dropout1"),
        *("linear2", "norm2", "activation2", "dropout2"),
        "output",
    ]
    assert type(model.norm1) is type(model.norm2) is kind
    assert (model.linear1.bias is not None) == has_bias
    assert model.output.bias is not None


def test_the_small_convolutional_network():
    spec = CnnSpec(channels=[4, 8], local_response_norm=True, dropout=0.3)
    model = build_model(spec, Norm.BATCH, (1, 9, 7), 3, seed=0)
    assert [name for name, _ in model.named_children()] == [
        *("conv1", "norm1", "activation1", "local_response_norm1", "pool1"),
        *("conv2", "norm2", "activation2"),
        *("mean", "flatten", "dropout", "output"),
    ]
    assert (model.conv1.bias, model.conv2.bias) == (None, None)
    assert model(torch.randn(2, 1, 9, 7)).shape == (2, 3)
    wide = build_model(CnnSpec(channels=[64, 64]), Norm.NONE, IMAGE, 10, seed=0)
    assert abs(wide.conv2.weight.std().item() / (2 / (64 * 9)) ** 0.5 - 1) < 0.02
    narrow = build_model(CnnSpec(channels=[64, 64], init_std=0.5), Norm.NONE, IMAGE, 10, seed=0)
    assert abs(narrow.conv2.weight.std().item() / 0.5 - 1) < 0.02


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (64,),
            r"model: must be used with images \(channels, height, width\), not with samples of shape "
            r"\(64,\) \(got 'cnn'\)",
        ),
        ((1, 3, 8), r"model.channels: must be at most 2 levels for images of 3x8"),
    ],
)
def test_the_small_convolutional_network_rejects_invalid_shapes(shape, message):
    with pytest.raises(ConfigurationError, match=message):
        build_model(CnnSpec(), Norm.SYNC, shape, 10, seed=0)
    assert build_model(CnnSpec(), Norm.NONE, (1, 4, 4), 10, seed=0)(torch.zeros(2, 1, 4, 4)).shape == (2, 10)


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize(
    "spec",
    [
        MlpSpec(hidden=[4, 5]),
        MlpSpec(hidden=[4], dropout=0.1),
        CnnSpec(channels=[4]),
        CnnSpec(channels=[4, 5, 6], dropout=0.1, local_response_norm=True),
    ],
)
def test_a_spec_knows_the_module_paths_of_built_in_networks(spec, norm):
    model = build_model(spec, norm, (1, 8, 8), 3, seed=0)
    assert [path for path, _ in model.named_modules() if path] == spec.module_paths
