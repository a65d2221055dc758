import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import SyncBatchNorm, new_sync_groups, revert_sync_batchnorm
from tests.dist import run_on_ranks
from tests.trainer.models.building import IMAGE, MODELS, kinds_of, library_model
from trainer.errors import ConfigurationError
from trainer.jobspec import CnnSpec, MlpSpec, Norm
from trainer.models import build_model
from trainer.norms.layers import is_norm, is_unknown_norm

LARGE = ("torchvision:googlenet", "torchvision:inception_v3", "torchvision:swin_t", "timm:inception_v3")
"""Tested in two modes only, since each takes seconds."""


KINDS = {
    Norm.NONE: (),
    Norm.BATCH: (nn.BatchNorm1d, nn.BatchNorm2d),
    Norm.SYNC: (SyncBatchNorm,),
    Norm.GROUP: (nn.GroupNorm,),
    Norm.LAYER: (nn.GroupNorm, nn.LayerNorm),
}


@pytest.mark.parametrize(
    ("spec", "shape"),
    [(MlpSpec(hidden=[8]), (4,)), (CnnSpec(), (3, 8, 8)), (library_model("timm:resnet10t"), IMAGE)],
)
def test_weights_depend_only_on_the_seed(spec, shape):
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


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "norm"),
    [
        (name, shape, arguments, norm)
        for name, shape, arguments, _ in MODELS
        for norm in ((Norm.NONE, Norm.SYNC) if name in LARGE else Norm)
    ],
)
def test_every_norm_of_a_library_model_is_replaced(name, shape, arguments, norm):
    model = build_model(library_model(name, arguments=arguments), norm, shape, 5, seed=0)
    norms = [
        module for path, module in model.named_modules() if is_norm(module) or is_unknown_norm(path, module)
    ]
    assert all(isinstance(layer, KINDS[norm]) for layer in norms)
    assert bool(norms) == (norm is not Norm.NONE)
    logits = model(torch.randn(4, *shape))
    assert logits.shape == (4, 5)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("values", "shape", "message"),
    [
        (
            {"name": "torchvision:resnet19"},
            IMAGE,
            r"model.name: must be a model of torchvision; .*resnet1.* 'torchvision:resnet19'",
        ),
        (
            {"name": "torchvision:fcn_resnet50"},
            IMAGE,
            r"model.name: must be a model of torchvision; .*resnet50",
        ),
        ({"name": "timm:resnet10"}, IMAGE, r"model.name: must be a model of timm; .*resnet10t"),
        ({"name": "timm:qqqqqqqqqqqqqqqqqqqqqqq"}, IMAGE, r"model.name: .* none \("),
        (
            {"name": "torchvision:resnet18", "arguments": {"depth": 3}},
            IMAGE,
            r"model.arguments: .*'depth'.*\(got {'depth': 3}",
        ),
        ({"name": "timm:resnet10t", "arguments": {"colour": 3}}, IMAGE, r"model.arguments: .*'colour'"),
        ({"name": "torchvision:resnet18"}, (64,), r"model: must accept samples of shape \(64,\)"),
        (
            {"name": "torchvision:alexnet"},
            IMAGE,
            r"model: must accept samples of shape \(3, 32, 32\): .*torchvision:alexnet",
        ),
        (
            {"name": "timm:vit_tiny_patch16_224"},
            IMAGE,
            r"model: must accept samples of shape \(3, 32, 32\): .*224",
        ),
        (
            {"name": "torchvision:googlenet", "arguments": {"transform_input": True}},
            (1, 32, 32),
            r"model: must accept samples of shape \(1, 32, 32\)",
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
            r"model.dropout: must be null or 0 for torchvision:resnet18",
        ),
        (
            {"name": "torchvision:densenet121", "activation": "tanh"},
            IMAGE,
            r"model.activation: must be null for .*DenseNet\) calls relu itself \(got 'tanh'\)",
        ),
        (
            {"name": "torchvision:googlenet", "local_response_norm_after": ["maxpool"]},
            IMAGE,
            r"model.local_response_norm_after: must be paths of the model's modules, such as "
            r".*maxpool1.*\(got 'maxpool'\)",
        ),
        ({"name": "torchvision:googlenet", "local_response_norm_after": [""]}, IMAGE, r"such as conv1"),
    ],
)
def test_configuration_errors_of_models_are_named(values, shape, message):
    with pytest.raises(ConfigurationError, match=message):
        build_model(library_model(**values), Norm.SYNC, shape, 5, seed=0)


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
        assert {type(layer) for layer in model.modules() if is_norm(layer)} <= {
            nn.BatchNorm1d,
            nn.BatchNorm2d,
        }
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
