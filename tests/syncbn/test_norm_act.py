"""Conversion of timm's layers that normalise and activate."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.norm_act import convert_sync_batchnorm as convert_with_timm
from timm.layers.split_batchnorm import SplitBatchNorm2d
from torch import fx, nn

import syncbn
from syncbn import ConversionError, convert_sync_batchnorm, revert_sync_batchnorm

LAYERS = {
    "plain": lambda: BatchNormAct2d(3),
    "activation that moves 0": lambda: BatchNormAct2d(3, act_layer=nn.Sigmoid, act_kwargs={}, inplace=None),
    "drop": lambda: BatchNormAct2d(3, drop_layer=lambda: nn.Dropout(1.0), act_layer=nn.Sigmoid, inplace=None),
    "no activation": lambda: BatchNormAct2d(3, apply_act=False, eps=1e-3, momentum=None),
    "no statistics": lambda: BatchNormAct2d(3, affine=False, track_running_stats=False).eval(),
}


def state_objects(module):
    return {name: id(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


@pytest.fixture(params=LAYERS)
def layer(request):
    layer = LAYERS[request.param]().double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def test_a_layer_computes_what_it_did_and_reverts_to_what_it_was(layer):
    model = nn.Sequential(layer, layer).requires_grad_(False)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    layer.qconfig = "mine"
    plain, attributes, objects = copy.deepcopy(model), dict(vars(layer)), state_objects(layer)
    children, names = dict(layer.named_children()), list(model.state_dict())
    converted = convert_sync_batchnorm(model)
    assert converted is model
    assert isinstance(model[0], syncbn.SyncBatchNorm)
    assert dict(layer.named_children()) == children
    assert (state_objects(layer), list(model.state_dict())) == (objects, names)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        y, expected = model.train(training)(x), plain.train(training)(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(output.square().sum(), x) for output in (y, expected))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    model.train(attributes["training"])
    revert_sync_batchnorm(model)
    assert model[0] is model[1] is layer
    assert type(layer) is BatchNormAct2d
    assert (vars(layer), state_objects(layer)) == (attributes, objects)


def test_copies_and_pickles_are_converted_layers_that_can_be_reverted(layer):
    convert_sync_batchnorm(layer)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is type(layer)
        torch.testing.assert_close(copied.state_dict(), layer.state_dict())
        assert type(revert_sync_batchnorm(copied)) is BatchNormAct2d


def test_a_fresh_process_unpickles_trains_and_reverts_a_converted_model(tmp_path):
    model = convert_sync_batchnorm(timm.create_model("regnety_002", num_classes=3))
    torch.save(model, tmp_path / "model.pt")
    program = f"""
import sys, torch, syncbn
assert "timm" not in sys.modules
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
model(torch.randn(2, 3, 32, 32)).sum().backward()
syncbn.revert_sync_batchnorm(model)
print(type(model.stem.bn).__qualname__, sum(isinstance(m, syncbn.SyncBatchNorm) for m in model.modules()))
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert answer.stdout.split() == ["BatchNormAct2d", "0"]


def test_what_timm_has_converted_becomes_ours_and_reverts_to_the_local_layer():
    layer = convert_with_timm(BatchNormAct2d(3, act_layer="silu"))
    assert type(layer) is SyncBatchNormAct
    x = torch.randn(4, 3, 5, 5)
    expected = BatchNormAct2d(3, act_layer="silu")(x)
    torch.testing.assert_close(convert_sync_batchnorm(layer)(x), expected)
    assert type(revert_sync_batchnorm(layer)) is BatchNormAct2d
    torch.testing.assert_close(layer(x), expected)


def test_padding_is_0_after_an_activation_that_maps_0_to_another_value():
    layer = convert_sync_batchnorm(LAYERS["activation that moves 0"]())
    x, mask = torch.randn(4, 3, 5, 5, requires_grad=True), torch.rand(4, 5, 5) > 0.5
    y = layer(x, mask)
    y.sum().backward()
    padding = ~mask.unsqueeze(1).expand_as(x)
    assert (y[padding] == 0).all()
    assert (x.grad[padding] == 0).all()
    values = x.detach().movedim(1, -1)[mask]  # (n, C)
    expected = nn.BatchNorm1d(3)(values).sigmoid()
    torch.testing.assert_close(y.movedim(1, -1)[mask], expected)


def test_a_frozen_layer_stays_and_one_with_other_statistics_is_refused():
    frozen = FrozenBatchNormAct2d(3)
    assert type(convert_sync_batchnorm(nn.Sequential(frozen))[0]) is FrozenBatchNormAct2d
    with pytest.raises(ConversionError, match=r"SplitBatchNorm2d\): a subclass"):
        convert_sync_batchnorm(SplitBatchNorm2d(3))


def test_a_converted_model_of_timm_is_traced_layer_by_layer():
    model = convert_sync_batchnorm(timm.create_model("regnety_002", num_classes=3))
    traced = fx.symbolic_trace(model)
    assert {"stem.bn", "s1.b1.conv1.bn"} <= {node.target for node in traced.graph.nodes}
    assert traced.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(traced.eval()(x), model.eval()(x))
