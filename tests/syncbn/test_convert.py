import copy
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize

import syncbn.convert
from syncbn import (
    BatchNorm,
    ConversionError,
    SyncBatchNorm,
    convert_sync_batchnorm,
    register_conversion,
    revert_sync_batchnorm,
)
from syncbn.convert import MAX_MESSAGE_CHARACTERS
from tests.dist import run_on_ranks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, eps=1e-3, momentum=None)
        self.again = self.norm

    def forward(self, x):
        return self.again(self.norm(self.conv(x)))


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class ActivatedSync(SyncBatchNorm):
    def forward(self, x):
        return super().forward(x).relu()


def state_objects(module):
    return {name: id(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


@pytest.mark.parametrize("convert", [convert_sync_batchnorm, SyncBatchNorm.convert_sync_batchnorm])
@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3, eps=1e-3, momentum=None),
        nn.BatchNorm3d(3, affine=False, dtype=torch.float64),
        nn.BatchNorm2d(3, track_running_stats=False).eval(),
        nn.SyncBatchNorm(3),
    ],
)
def test_each_kind_of_layer_is_converted_and_keeps_what_it_has(convert, layer):
    layer = copy.deepcopy(layer)
    attributes = {name: value for name, value in vars(layer).items() if name != "process_group"}
    objects = state_objects(layer)
    converted = convert(layer)
    assert type(converted) is SyncBatchNorm
    assert converted.process_group is None
    assert {name: vars(converted)[name] for name in attributes} == attributes
    assert state_objects(converted) == objects


def test_a_model_keeps_structure_parameters_flags_and_shared_layers():
    model = nn.Sequential(Block(), Block().eval(), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4))
    model[0].norm.weight.requires_grad_(False)
    objects, names = state_objects(model), [name for name, _ in model.named_modules(remove_duplicate=False)]
    state = copy.deepcopy(model.state_dict())
    assert convert_sync_batchnorm(model) is model
    assert state_objects(model) == objects
    assert [name for name, _ in model.named_modules(remove_duplicate=False)] == names
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert model[0].norm is model[0].again
    assert (type(model[0].norm), type(model[2]), type(model[3])) == (
        SyncBatchNorm,
        nn.InstanceNorm2d,
        nn.GroupNorm,
    )
    assert (model[0].norm.training, model[1].norm.training) == (True, False)
    assert (model[0].norm.weight.requires_grad, model[0].norm.bias.requires_grad) == (False, True)
    assert (model[0].norm.eps, model[0].norm.momentum) == (1e-3, None)


def test_a_converted_model_computes_what_it_did():
    model = nn.Sequential(Block(), nn.Flatten(), nn.Linear(16, 2)).double()
    converted = convert_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    for training in (True, False):
        y = model.train(training)(x)
        torch.testing.assert_close(converted.train(training)(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(converted.state_dict(), model.state_dict(), rtol=1e-12, atol=1e-12)


def test_hooks_attributes_and_references_stay():
    layer, called = nn.BatchNorm1d(3), []
    layer.note = "mine"
    reference = weakref.ref(layer)
    layer.register_forward_pre_hook(lambda module, inputs: called.append("forward_pre"))
    forward = layer.register_forward_hook(lambda module, inputs, output: called.append("forward"))
    layer.register_full_backward_hook(lambda module, inputs, outputs: called.append("backward"))
    layer.register_state_dict_post_hook(lambda *arguments: called.append("state_dict"))
    layer.register_load_state_dict_pre_hook(lambda *arguments: called.append("load_state_dict"))
    model = convert_sync_batchnorm(nn.Sequential(layer))
    assert reference() is model[0]
    assert model[0].note == "mine"
    model(torch.randn(4, 3, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert called == ["forward_pre", "forward", "backward", "state_dict", "load_state_dict"]
    forward.remove()
    called.clear()
    model(torch.randn(4, 3))
    assert called == ["forward_pre"]


def test_an_optimizer_made_before_conversion_still_trains_the_model():
    model = nn.Sequential(nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    convert_sync_batchnorm(model)
    (model(torch.randn(4, 3)) * torch.arange(3)).pow(2).sum().backward()
    optimizer.step()
    assert model[0].weight[2] < 1


def make_parametrized():
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            Activated(3),
            r"1\.0 \(tests\.syncbn\.test_convert\.Activated\): a subclass whose behaviour would be lost",
        ),
        (make_parametrized(), r"1\.0 \(.*ParametrizedBatchNorm1d\): a subclass"),
        (nn.LazyBatchNorm2d(), r"1\.0 \(.*LazyBatchNorm2d\): its number of channels is unknown"),
    ],
)
def test_what_would_lose_its_behaviour_is_refused_by_name_and_nothing_is_converted(layer, message):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(layer))
    with pytest.raises(ConversionError, match=message):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_subclass_of_ours_is_not_reverted_and_nothing_else_is():
    parametrized = SyncBatchNorm(3)
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    model = nn.Sequential(SyncBatchNorm(3), ActivatedSync(3), parametrized)
    message = (
        r"cannot revert 1 \(tests\.syncbn\.test_convert\.ActivatedSync\): a subclass .*; 2 "
        r"\(.*Parametrized.*\): a subclass"
    )
    with pytest.raises(ConversionError, match=message):
        revert_sync_batchnorm(model)
    assert type(model[0]) is SyncBatchNorm
    assert (model[1](torch.randn(4, 3)) >= 0).all()


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 12, 200])
@pytest.mark.parametrize(
    ("change", "kind"), [(convert_sync_batchnorm, Activated), (revert_sync_batchnorm, ActivatedSync)]
)
def test_an_error_is_short_and_says_how_many_layers_it_leaves_out(change, kind, layers):
    model = nn.Sequential(*(kind(3) for _ in range(layers)))
    for length in (*range(1, 120), 1000):
        with pytest.raises(ConversionError) as raised:
            change(nn.ModuleDict({"b" * length: model}))
        message = str(raised.value)
        assert len(message) <= MAX_MESSAGE_CHARACTERS == 500
        named = message.count(f"{kind.__name__}): a subclass whose behaviour would be lost; re")
        assert named >= 1
        assert message.endswith("by hand" if named == layers else f"; and {layers - named} more")


def test_all_refused_layers_are_named():
    with pytest.raises(ConversionError, match=r"0 \(.*Activated\).*; 1 \(.*LazyBatchNorm1d\)"):
        convert_sync_batchnorm(nn.Sequential(Activated(3), nn.LazyBatchNorm1d()))
    with pytest.raises(ConversionError, match=r"the module itself \(.*Activated\)"):
        convert_sync_batchnorm(Activated(3))


def test_a_lazy_layer_can_be_converted_after_its_first_batch():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 3, 4, 4))
    assert type(convert_sync_batchnorm(model)[0]) is SyncBatchNorm


def convert_with_groups():
    inner, outer = dist.new_group([0, 1]), dist.new_group([0, 1])
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)), nn.SyncBatchNorm(3, process_group=inner)
    )
    convert_sync_batchnorm(model[1], inner)
    convert_sync_batchnorm(model, outer)
    convert_sync_batchnorm(model)
    assert [layer.process_group for layer in (model[0], model[1][0], model[2])] == [outer, inner, inner]
    return model(torch.randn(4, 3)).shape


@pytest.mark.dist
def test_layers_get_the_group_given_and_keep_the_one_they_have():
    assert run_on_ranks(convert_with_groups, 2) == [(4, 3), (4, 3)]


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(3), nn.BatchNorm2d(3, momentum=None), nn.BatchNorm3d(3).eval()]
)
def test_to_convert_and_revert_leaves_a_layer_as_it_was(layer):
    layer.qconfig = "mine"
    layer.weight.requires_grad_(False)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    attributes, objects, kind = dict(vars(layer)), state_objects(layer), type(layer)
    model = nn.Sequential(layer, layer)
    assert revert_sync_batchnorm(convert_sync_batchnorm(model)) is model
    assert model[0] is model[1] is layer
    assert type(layer) is kind
    assert vars(layer) == attributes
    assert state_objects(layer) == objects
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(2, 3, 4, 4, 4, 4))


def test_copied_and_pickled_layers_can_be_reverted_too():
    layer = convert_sync_batchnorm(nn.BatchNorm2d(3))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(revert_sync_batchnorm(copied)) is nn.BatchNorm2d


@pytest.mark.parametrize("kind", [SyncBatchNorm, nn.SyncBatchNorm])
def test_a_layer_that_never_was_unsynchronised_takes_any_dimension_afterwards(kind):
    layer = convert_sync_batchnorm(kind(3))
    x = torch.randn(4, 3, 2)
    expected = copy.deepcopy(layer)(x)
    torch.testing.assert_close(revert_sync_batchnorm(layer)(x), expected)
    assert type(layer) is BatchNorm
    layer(torch.randn(4, 3, 2, 2, 2, 2))
    with pytest.raises(ValueError, match="two or more dimensions"):
        layer(torch.randn(3))
    assert type(convert_sync_batchnorm(layer)) is SyncBatchNorm


def test_converted_layers_are_called_by_their_path():
    model = convert_sync_batchnorm(nn.Sequential(Block(), nn.BatchNorm2d(4)))
    assert [model[0].norm.layer_name, model[1].layer_name] == ["0.norm", "1"]


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class ScaledSync(SyncBatchNorm):
    def forward(self, x, mask=None):
        return 2 * super().forward(x, mask)


class ScaledAfterwards(Scaled):
    pass


class ScaledMore(ScaledSync):
    pass


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("syncbn.convert._conversions", dict(syncbn.convert._conversions))


@pytest.mark.parametrize(
    ("classes", "reverted"),
    [((Scaled, ScaledSync), Scaled), ((Scaled, ScaledSync, ScaledAfterwards), ScaledAfterwards)],
)
@pytest.mark.usefixtures("registry")
def test_a_registered_class_is_converted_and_reverted(classes, reverted):
    register_conversion(*classes)
    layer = Scaled(3)
    attributes, objects, x = dict(vars(layer)), state_objects(layer), torch.randn(4, 3, 2, 2)
    expected = copy.deepcopy(layer)(x)
    model = convert_sync_batchnorm(nn.Sequential(layer))
    assert type(layer) is ScaledSync
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    assert revert_sync_batchnorm(model)[0] is layer
    assert type(layer) is reverted
    assert (vars(layer), state_objects(layer)) == (attributes, objects)


@pytest.mark.usefixtures("registry")
def test_subclasses_of_registered_classes_are_refused():
    register_conversion(Scaled, ScaledSync)
    with pytest.raises(ConversionError, match=r"ScaledAfterwards\): a subclass"):
        convert_sync_batchnorm(ScaledAfterwards(3))
    converted = convert_sync_batchnorm(Scaled(3))
    converted.__class__ = ScaledMore
    for layer in (converted, ScaledSync(3)):  # the second was never converted: no class is known for it
        with pytest.raises(ConversionError, match=r"cannot revert .*Scaled\w+\): a subclass"):
            revert_sync_batchnorm(layer)


@pytest.mark.usefixtures("registry")
def test_the_newest_registration_of_a_class_holds():
    register_conversion(Scaled, SyncBatchNorm)
    register_conversion(Scaled, ScaledSync)
    assert type(convert_sync_batchnorm(Scaled(3))) is ScaledSync


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((Scaled, Scaled), r"to_sync: must be a subclass of SyncBatchNorm \(got .*Scaled'>\)"),
        ((Scaled, print), r"to_sync: must be a subclass of SyncBatchNorm \(got <built-in function print>\)"),
        ((Scaled, ScaledSync, print), r"to_local: must be .* \(got <built-in function print>\)"),
        (
            (nn.Linear, ScaledSync),
            r"type: must be a subclass of torch's batch normalisation .*\(got .*Linear'>\)",
        ),
        ((ScaledSync, ScaledSync), r"type: must be .* not of SyncBatchNorm \(got .*ScaledSync'>\)"),
        ((Scaled, ScaledSync, SyncBatchNorm), r"to_local: must be .* \(got .*SyncBatchNorm'>\)"),
    ],
)
@pytest.mark.usefixtures("registry")
def test_a_registration_of_other_classes_is_refused(classes, message):
    with pytest.raises(ConversionError, match=message):
        register_conversion(*classes)
    with pytest.raises(ConversionError, match="cannot convert"):
        convert_sync_batchnorm(Scaled(3))
