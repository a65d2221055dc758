import subprocess
import sys

import pytest
import timm
import torch
import torch.distributed as dist
import torchvision.models
from torch import nn

from syncbn import SyncBatchNorm, new_sync_groups, revert_sync_batchnorm
from tests.dist import run_on_ranks
from trainer.errors import ConfigurationError
from trainer.jobspec import CnnSpec, LibraryModelSpec, MlpSpec, Norm
from trainer.models import build_model
from trainer.norms.layers import is_norm, is_unknown_norm

IMAGE = (3, 32, 32)
MODELS = [
    ("torchvision:resnet18", IMAGE, {}, Norm.BATCH),
    ("torchvision:googlenet", IMAGE, {}, Norm.BATCH),
    ("torchvision:inception_v3", (3, 75, 75), {}, Norm.BATCH),
    ("torchvision:mobilenet_v3_small", IMAGE, {}, Norm.BATCH),
    ("torchvision:swin_t", IMAGE, {}, Norm.LAYER),
    ("timm:resnet10t", IMAGE, {}, Norm.BATCH),
    ("timm:inception_v3", (3, 75, 75), {}, Norm.BATCH),
    ("timm:efficientnet_b0", IMAGE, {}, Norm.BATCH),
    ("timm:vit_tiny_patch16_224", IMAGE, {"img_size": 32, "depth": 2, "qk_norm": True}, Norm.LAYER),
    ("timm:convnext_atto", IMAGE, {}, Norm.LAYER),
]
"""Each with the mode that is the library's own."""
LARGE = ("torchvision:googlenet", "torchvision:inception_v3", "torchvision:swin_t", "timm:inception_v3")
"""Tried in two modes, since each takes seconds."""
KINDS = {
    Norm.NONE: (),
    Norm.BATCH: (nn.BatchNorm1d, nn.BatchNorm2d),
    Norm.SYNC: (SyncBatchNorm,),
    Norm.GROUP: (nn.GroupNorm,),
    Norm.LAYER: (nn.GroupNorm, nn.LayerNorm),
}


def library_model(name, **values):
    return LibraryModelSpec(name=name, **values)


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def kinds_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_figure_1s_network():
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
def test_the_norm_stands_before_each_activation_and_replaces_the_bias(norm, kind, has_bias):
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
        ((64,), r"model: must be used with images \(channels, height, width\), not samples of \(64,\) \(got 'cnn'\)"),
        ((1, 3, 8), r"model.channels: must be at most 2 levels for images of 3x8"),
    ],
)
def test_the_small_convolutional_network_refuses_what_it_cannot_take(shape, message):
    with pytest.raises(ConfigurationError, match=message):
        build_model(CnnSpec(), Norm.SYNC, shape, 10, seed=0)
    assert build_model(CnnSpec(), Norm.NONE, (1, 4, 4), 10, seed=0)(torch.zeros(2, 1, 4, 4)).shape == (2, 10)


@pytest.mark.parametrize(
    ("spec", "shape"), [(MlpSpec(hidden=[8]), (4,)), (CnnSpec(), (3, 8, 8)), (library_model("timm:resnet10t"), IMAGE)]
)
def test_weights_depend_on_the_seed_alone(spec, shape):
    state = torch.get_rng_state()
    models = [build_model(spec, norm, shape, 3, seed=1) for norm in Norm]
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    again = build_model(spec, Norm.NONE, shape, 3, seed=1)
    other = build_model(spec, Norm.NONE, shape, 3, seed=2)
    first = dict(models[0].named_parameters())
    assert all(torch.equal(first[name], parameter) for name, parameter in again.named_parameters())
    weights = [name for name, parameter in first.items() if parameter.ndim > 1]
    assert not any(torch.equal(first[name], other.get_parameter(name)) for name in weights)
    for model in models:
        assert all(torch.equal(first[name], model.get_parameter(name)) for name in weights)


@pytest.mark.parametrize(("name", "shape", "arguments", "own"), MODELS)
def test_the_librarys_own_mode_is_the_librarys_own_network(name, shape, arguments, own):
    library, _, short = name.partition(":")

    def build():
        if library == "timm":
            return timm.create_model(short, num_classes=5, **arguments)
        heads = {"aux_logits": False, "init_weights": True} if "ception" in short or "google" in short else {}
        return torchvision.models.get_model(short, num_classes=5, **heads, **arguments)

    expected = without_dropout(seeded(build)).double()
    model = without_dropout(build_model(library_model(name, arguments=arguments), own, shape, 5, seed=0)).double()
    x = torch.randn(4, *shape, dtype=torch.float64)
    outputs = [seeded(lambda each=each: each(x)) for each in (expected, model)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "norm"),
    [
        (name, shape, arguments, norm)
        for name, shape, arguments, _ in MODELS
        for norm in ((Norm.NONE, Norm.SYNC) if name in LARGE else Norm)
    ],
)
def test_every_norm_of_a_library_model_is_switched(name, shape, arguments, norm):
    model = build_model(library_model(name, arguments=arguments), norm, shape, 5, seed=0)
    norms = [module for path, module in model.named_modules() if is_norm(module) or is_unknown_norm(path, module)]
    assert all(isinstance(layer, KINDS[norm]) for layer in norms)
    assert bool(norms) == (norm is not Norm.NONE)
    logits = model(torch.randn(4, *shape))
    assert logits.shape == (4, 5)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_biases_of_a_library_model():
    resnet = {norm: build_model(library_model("torchvision:resnet18"), norm, IMAGE, 5, 0) for norm in Norm}
    for norm, model in resnet.items():
        has_bias = [layer.bias is not None for layer in kinds_of(model, nn.Conv2d)]
        assert has_bias == [norm not in (Norm.BATCH, Norm.SYNC)] * 20
        assert model.fc.bias is not None
    # ConvNeXt: a depthwise convolution, then the channels are moved, then the norm.
    convnext = build_model(library_model("timm:convnext_atto"), Norm.SYNC, IMAGE, 5, 0)
    assert convnext.stages[0].blocks[0].conv_dw.bias is None
    assert convnext.stages[0].blocks[0].mlp.fc1.bias is not None
    # Pre-activation: what a block's last convolution gives goes into the sum, the stem's into a norm and past it.
    preactivation = build_model(library_model("timm:resnetv2_50x1_bit"), Norm.NONE, IMAGE, 5, 0)
    block = preactivation.stages[0].blocks[0]
    assert [layer.bias is not None for layer in (block.conv1, block.conv2, block.conv3)] == [True, True, False]


@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "torchvision:googlenet", "torchvision:swin_t", "timm:resnet10t"]
)
@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(name, channels):
    model = build_model(library_model(name), Norm.SYNC, (channels, 32, 32), 5, seed=0)
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 5)
    first = next(iter(kinds_of(model, nn.Conv2d)))
    usual = next(iter(kinds_of(build_model(library_model(name), Norm.SYNC, IMAGE, 5, seed=0), nn.Conv2d)))
    assert first.in_channels == first.weight.shape[1] == channels
    assert 0.4 < first.weight.std() / usual.weight.std() < 2.5


@pytest.mark.parametrize(
    ("values", "shape", "message"),
    [
        (
            {"name": "torchvision:resnet19"},
            IMAGE,
            r"model.name: must be a model of torchvision; .*resnet1.* 'torchvision:resnet19'",
        ),
        ({"name": "torchvision:fcn_resnet50"}, IMAGE, r"model.name: must be a model of torchvision; .*resnet50"),
        ({"name": "timm:resnet10"}, IMAGE, r"model.name: must be a model of timm; .*resnet10t"),
        ({"name": "timm:qqqqqqqqqqqqqqqqqqqqqqq"}, IMAGE, r"model.name: .* none \("),
        (
            {"name": "torchvision:resnet18", "arguments": {"depth": 3}},
            IMAGE,
            r"model.arguments: .*'depth'.*\(got {'depth': 3}",
        ),
        ({"name": "timm:resnet10t", "arguments": {"colour": 3}}, IMAGE, r"model.arguments: .*'colour'"),
        ({"name": "torchvision:resnet18"}, (64,), r"model: does not take samples of shape \(64,\)"),
        (
            {"name": "torchvision:alexnet"},
            IMAGE,
            r"model: does not take samples of shape \(3, 32, 32\): .*torchvision:alexnet",
        ),
        ({"name": "timm:vit_tiny_patch16_224"}, IMAGE, r"model: does not take samples of shape \(3, 32, 32\): .*224"),
        (
            {"name": "torchvision:googlenet", "arguments": {"transform_input": True}},
            (1, 32, 32),
            r"model: does not take samples of shape \(1, 32, 32\)",
        ),
        (
            {"name": "timm:resnet10t", "arguments": {"features_only": True}},
            IMAGE,
            r"to logits of shape \(2, 5\), not to list",
        ),
        ({"name": "timm:resnet18.a_tag"}, IMAGE, r"model.name: must be a model of timm; .*resnet18\."),
        (
            {"name": "torchvision:resnet18", "dropout": 0.5},
            IMAGE,
            r"model.dropout: torchvision:resnet18 has no dropout layer",
        ),
        (
            {"name": "torchvision:densenet121", "activation": "tanh"},
            IMAGE,
            r"model.activation: cannot be replaced in .*DenseNet\) calls relu itself \(got 'tanh'\)",
        ),
        (
            {"name": "torchvision:googlenet", "local_response_norm_after": ["maxpool"]},
            IMAGE,
            r"model.local_response_norm_after: must be paths of the model's modules, such as .*maxpool1.*\(got 'maxpool'\)",
        ),
        ({"name": "torchvision:googlenet", "local_response_norm_after": [""]}, IMAGE, r"such as conv1"),
    ],
)
def test_what_a_user_can_mend_is_named(values, shape, message):
    with pytest.raises(ConfigurationError, match=message):
        build_model(library_model(**values), Norm.SYNC, shape, 5, seed=0)


def test_a_name_with_the_name_of_weights_gives_the_network_alone():
    tagged, plain = [
        build_model(library_model(name), Norm.BATCH, IMAGE, 5, 0)
        for name in ("timm:resnet10t.c3_in1k", "timm:resnet10t")
    ]
    assert torch.equal(tagged.conv1[0].weight, plain.conv1[0].weight)


def test_inception_as_the_paper_had_it_before_and_after():
    # Section 4.2.1: batch normalisation in, dropout and local response normalisation out; and the variant of sigmoids.
    path = ["maxpool1", "conv3"]
    inception = library_model("torchvision:googlenet", local_response_norm_after=path, dropout=0.4)
    before = build_model(inception, Norm.NONE, IMAGE, 5, seed=0)
    assert len(kinds_of(before, nn.LocalResponseNorm)) == 2
    assert type(before.maxpool1[0]) is nn.MaxPool2d
    assert (before.maxpool1[1].size, before.dropout.p) == (5, 0.4)
    after = build_model(
        library_model("torchvision:googlenet", dropout=0.0, activation="sigmoid"), Norm.SYNC, IMAGE, 5, seed=0
    )
    assert len(kinds_of(after, nn.Sigmoid)) == len(kinds_of(after, SyncBatchNorm)) == 57
    assert after.dropout.p == 0
    usual = build_model(library_model("torchvision:googlenet"), Norm.SYNC, IMAGE, 5, seed=0)
    assert list(after.state_dict()) == list(usual.state_dict())
    assert torch.equal(after.conv1.conv.weight, usual.conv1.conv.weight)
    x = torch.rand(2, *IMAGE)
    torch.testing.assert_close(after.conv1(x), torch.sigmoid(usual.conv1.bn(usual.conv1.conv(x))))
    for model in (before, after):
        assert model(x).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("torchvision:inception_v3", (3, 75, 75)), ("timm:inception_v3", (3, 75, 75)), ("timm:efficientnet_b0", IMAGE)],
)
def test_every_activation_is_replaced(name, shape):
    model = build_model(library_model(name, activation="tanh", dropout=0.5), Norm.BATCH, shape, 5, seed=0)
    assert kinds_of(model, nn.Tanh)
    assert not kinds_of(model, nn.ReLU | nn.SiLU)
    # Gates are no nonlinearities of the network.
    assert bool(kinds_of(model, nn.Sigmoid)) == ("efficientnet" in name)
    dropped = [
        getattr(module, "p", None) or module.drop_rate for module in model.modules() if hasattr(module, "drop_rate")
    ]
    assert set(dropped) <= {0.5}
    assert all(module.p == 0.5 for module in kinds_of(model, nn.Dropout))
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    assert not torch.equal(model(x), model(x))


def test_an_activation_that_is_not_there_cannot_be_replaced():
    with pytest.raises(
        ConfigurationError, match=r"model.activation: timm:.* has no activation to replace \(got 'tanh'\)"
    ):
        build_model(
            library_model("timm:vit_tiny_patch16_224", arguments={"depth": 0}, activation="tanh"),
            Norm.BATCH,
            IMAGE,
            5,
            0,
        )


def test_initial_weights_are_scaled_and_nothing_else():
    arguments = {"img_size": 32, "depth": 1}
    plain, scaled = [
        build_model(
            library_model("timm:vit_tiny_patch16_224", arguments=arguments, init_scale=scale), Norm.LAYER, IMAGE, 5, 0
        )
        for scale in (1.0, 3.0)
    ]
    scaled_weights = {
        "patch_embed.proj.weight",
        "head.weight",
        *[f"blocks.0.{each}.weight" for each in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")],
    }
    for name, parameter in plain.named_parameters():
        assert torch.equal(scaled.get_parameter(name), parameter * (3 if name in scaled_weights else 1)), name


LOAD = """
import sys
sys.modules["syncbn"] = sys.modules["trainer"] = None
import torch
for path in sys.argv[1:]:
    model = torch.load(path, weights_only=False)
    print(model.eval()(torch.ones(2, 3, 32, 32)).sum().item())
"""


def test_a_reverted_model_loads_without_this_projects_code(tmp_path):
    specs = [MlpSpec(), CnnSpec(), library_model("torchvision:resnet18"), library_model("timm:convnext_atto")]
    paths, expected = [], []
    for number, spec in enumerate(specs):
        model = build_model(spec, Norm.SYNC, IMAGE, 5, seed=0)
        model(torch.randn(4, *IMAGE))
        expected.append(model.eval()(torch.ones(2, *IMAGE)).sum().item())
        revert_sync_batchnorm(model)
        assert {type(layer) for layer in model.modules() if is_norm(layer)} <= {nn.BatchNorm1d, nn.BatchNorm2d}
        paths.append(str(tmp_path / f"{number}.pt"))
        torch.save(model, paths[-1])
    command = [sys.executable, "-W", "ignore", "-c", LOAD, *paths]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [float(line) for line in result.stdout.split()] == pytest.approx(expected, rel=1e-5)


def groups_and_weights():
    torch.manual_seed(dist.get_rank())
    group = new_sync_groups(1)
    model = build_model(CnnSpec(channels=[4, 4]), Norm.SYNC, (3, 8, 8), 5, seed=7, process_group=group)
    assert all(layer.process_group is group for layer in kinds_of(model, SyncBatchNorm))
    model(torch.randn(2, 3, 8, 8))
    return [parameter.detach() for parameter in model.parameters()], model.norm1.running_mean


@pytest.mark.dist
def test_ranks_have_the_same_weights_and_their_groups_own_statistics():
    (first, mean), (second, other_mean) = run_on_ranks(groups_and_weights, 2)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not torch.equal(mean, other_mean)


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
def test_a_spec_knows_the_paths_of_its_own_networks(spec, norm):
    model = build_model(spec, norm, (1, 8, 8), 3, seed=0)
    assert [path for path, _ in model.named_modules() if path] == spec.module_paths
