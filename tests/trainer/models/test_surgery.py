import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from tests.trainer.models.building import IMAGE, kinds_of, library_model
from trainer.errors import ConfigurationError
from trainer.jobspec import Norm
from trainer.models import build_model


def test_inception_is_modified_as_in_the_paper():
    # Section 4.2.1: batch normalisation in, dropout and local response normalisation out; and the variant
    # with sigmoids.
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
    [
        ("torchvision:inception_v3", (3, 75, 75)),
        ("timm:inception_v3", (3, 75, 75)),
        ("timm:efficientnet_b0", IMAGE),
    ],
)
def test_every_activation_is_replaced(name, shape):
    model = build_model(library_model(name, activation="tanh", dropout=0.5), Norm.BATCH, shape, 5, seed=0)
    assert kinds_of(model, nn.Tanh)
    assert not kinds_of(model, nn.ReLU | nn.SiLU)
    # Gates are not activations of the network.
    assert bool(kinds_of(model, nn.Sigmoid)) == ("efficientnet" in name)
    dropped = [
        getattr(module, "p", None) or module.drop_rate
        for module in model.modules()
        if hasattr(module, "drop_rate")
    ]
    assert set(dropped) <= {0.5}
    assert all(module.p == 0.5 for module in kinds_of(model, nn.Dropout))
    torch.manual_seed(0)
    x = torch.randn(2, *shape)
    assert not torch.equal(model(x), model(x))


def test_a_missing_activation_cannot_be_replaced():
    with pytest.raises(
        ConfigurationError,
        match=r"model.activation: must be null for timm:.*, which has no activation to replace \(got "
        r"'tanh'\)",
    ):
        build_model(
            library_model("timm:vit_tiny_patch16_224", arguments={"depth": 0}, activation="tanh"),
            Norm.BATCH,
            IMAGE,
            5,
            0,
        )


def test_only_initial_weights_are_scaled():
    arguments = {"img_size": 32, "depth": 1}
    plain, scaled = [
        build_model(
            library_model("timm:vit_tiny_patch16_224", arguments=arguments, init_scale=scale),
            Norm.LAYER,
            IMAGE,
            5,
            0,
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
