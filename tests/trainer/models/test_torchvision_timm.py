import pytest
import timm
import torch
import torchvision.models
from torch import nn

from tests.trainer.models.building import IMAGE, MODELS, kinds_of, library_model
from trainer.jobspec import Norm
from trainer.models import build_model


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize(("name", "shape", "arguments", "own"), MODELS)
def test_the_default_mode_keeps_the_library_network(name, shape, arguments, own):
    library, _, short = name.partition(":")

    def build():
        if library == "timm":
            return timm.create_model(short, num_classes=5, **arguments)
        heads = {"aux_logits": False, "init_weights": True} if "ception" in short or "google" in short else {}
        return torchvision.models.get_model(short, num_classes=5, **heads, **arguments)

    expected = without_dropout(seeded(build)).double()
    model = without_dropout(
        build_model(library_model(name, arguments=arguments), own, shape, 5, seed=0)
    ).double()
    x = torch.randn(4, *shape, dtype=torch.float64)
    outputs = [seeded(lambda each=each: each(x)) for each in (expected, model)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)


def test_biases_of_a_library_model():
    resnet = {norm: build_model(library_model("torchvision:resnet18"), norm, IMAGE, 5, 0) for norm in Norm}
    for norm, model in resnet.items():
        has_bias = [layer.bias is not None for layer in kinds_of(model, nn.Conv2d)]
        assert has_bias == [norm not in (Norm.BATCH, Norm.SYNC)] * 20
        assert model.fc.bias is not None
    # ConvNeXt: a depthwise convolution, a permutation of channels, the norm.
    convnext = build_model(library_model("timm:convnext_atto"), Norm.SYNC, IMAGE, 5, 0)
    assert convnext.stages[0].blocks[0].conv_dw.bias is None
    assert convnext.stages[0].blocks[0].mlp.fc1.bias is not None
    # Pre-activation: the output of a block's last convolution is added to the residual; that of the stem goes
    # into a norm and past it.
    preactivation = build_model(library_model("timm:resnetv2_50x1_bit"), Norm.NONE, IMAGE, 5, 0)
    block = preactivation.stages[0].blocks[0]
    assert [layer.bias is not None for layer in (block.conv1, block.conv2, block.conv3)] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    "name", ["torchvision:resnet18", "torchvision:googlenet", "torchvision:swin_t", "timm:resnet10t"]
)
@pytest.mark.parametrize("channels", [1, 4])
def test_images_with_other_numbers_of_channels(name, channels):
    model = build_model(library_model(name), Norm.SYNC, (channels, 32, 32), 5, seed=0)
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 5)
    first = next(iter(kinds_of(model, nn.Conv2d)))
    usual = next(iter(kinds_of(build_model(library_model(name), Norm.SYNC, IMAGE, 5, seed=0), nn.Conv2d)))
    assert first.in_channels == first.weight.shape[1] == channels
    assert 0.4 < first.weight.std() / usual.weight.std() < 2.5


def test_a_name_with_weights_gives_only_the_network():
    tagged, plain = [
        build_model(library_model(name), Norm.BATCH, IMAGE, 5, 0)
        for name in ("timm:resnet10t.c3_in1k", "timm:resnet10t")
    ]
    assert torch.equal(tagged.conv1[0].weight, plain.conv1[0].weight)
