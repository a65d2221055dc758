import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from trainer.models import build_model
from trainer.norms import build_norm
from trainer.optim import build_optimizer
from trainer.spec import MlpSpec, Norm, SgdSpec


def test_figure_1s_network():
    model = build_model(MlpSpec(), Norm.NONE, 784, 10, seed=0)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [layer.weight.shape for layer in linear] == [(100, 784), (100, 100), (100, 100), (10, 100)]
    assert abs(linear[0].weight.std().item() - 0.05) < 0.001
    assert all((layer.bias == 0).all() for layer in linear)
    assert sum(isinstance(layer, nn.Sigmoid) for layer in model) == 3
    assert model(torch.zeros(2, 28, 28)).shape == (2, 10)


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
def test_the_norm_stands_before_each_activation_and_replaces_the_bias(norm, kind, has_bias):
    model = build_model(MlpSpec(hidden=[8, 8]), norm, 4, 3, seed=0)
    assert type(model.norm1) is type(model.norm2) is kind
    assert (model.linear1.bias is not None) == has_bias
    assert model.output.bias is not None


def test_groups_divide_the_channels():
    assert build_norm(Norm.GROUP, 100).num_groups == 25
    assert build_norm(Norm.GROUP, 64).num_groups == 16
    assert build_norm(Norm.GROUP, 512).num_groups == 32
    assert build_norm(Norm.GROUP, 37).num_groups == build_norm(Norm.GROUP, 3).num_groups == 1
    assert build_norm(Norm.LAYER, 100).num_groups == 1


def test_weights_depend_on_the_seed_alone():
    first, again, other = [
        build_model(MlpSpec(), norm, 4, 3, seed) for norm, seed in [("none", 1), ("sync", 1), ("none", 2)]
    ]
    assert torch.equal(first.linear1.weight, again.linear1.weight)
    assert torch.equal(first.output.weight, again.output.weight)
    assert not torch.equal(first.linear1.weight, other.linear1.weight)


def test_only_weight_matrices_decay():
    model = build_model(MlpSpec(hidden=[8]), Norm.BATCH, 4, 3, seed=0)
    decayed, kept = build_optimizer(SgdSpec(lr=0.1, weight_decay=0.01), model).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model.linear1.weight), id(model.output.weight)}
    assert {id(p) for p in kept["params"]} == {id(model.norm1.weight), id(model.norm1.bias), id(model.output.bias)}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0)
