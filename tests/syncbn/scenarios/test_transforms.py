"""The layer in transforms of torch.func, in exported programs and in the ONNX format."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from syncbn import ExportError, InputError, SyncBatchNorm
from tests.dist import run_on_ranks
from tests.syncbn.collective_recorder import record_collectives


def make_loss(norm, **options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), norm(4, **options), nn.Tanh(), nn.Linear(4, 1)).double()
    if isinstance(network[1], SyncBatchNorm):
        network[1].layer_name = "norm"
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def loss(parameters, x):
        return functional_call(network, (parameters, buffers), (x,)).pow(3).sum()

    return loss, parameters


def penalty(loss):
    return lambda parameters, x: grad(loss, argnums=1)(parameters, x).square().sum()


TRANSFORMS = {
    "gradient": (grad, (5, 3)),
    "second derivative": (lambda loss: grad(penalty(loss)), (5, 3)),
    "map": (lambda loss: vmap(loss, in_dims=(None, 0)), (4, 5, 3)),
    "map of the second dimension": (lambda loss: vmap(loss, in_dims=(None, 1)), (5, 4, 3)),
    "gradient by sample": (lambda loss: vmap(grad(loss), in_dims=(None, 0)), (4, 5, 3)),
    "gradient of a map of gradients": (
        lambda loss: grad(
            lambda parameters, x: vmap(grad(loss, argnums=1), in_dims=(None, 0))(parameters, x).square().sum()
        ),
        (4, 5, 3),
    ),
    "gradient of a map": (
        lambda loss: grad(lambda parameters, x: vmap(loss, in_dims=(None, 0))(parameters, x).sum()),
        (4, 5, 3),
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_gives_what_it_does_with_torchs_own_layer(transform):
    transformed, shape = TRANSFORMS[transform]
    x = torch.randn(shape, dtype=torch.float64)
    expected, actual = (
        transformed(loss)(parameters, x)
        for loss, parameters in (
            make_loss(norm, track_running_stats=False) for norm in (nn.BatchNorm1d, SyncBatchNorm)
        )
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def transform_on_a_rank(transform, x):
    transformed, shape = TRANSFORMS[transform]
    loss, parameters = make_loss(SyncBatchNorm, track_running_stats=False)
    with record_collectives() as issued:
        result = transformed(loss)(parameters, x.chunk(2, dim=len(shape) - 2)[dist.get_rank()])
    return result, len(issued)


@pytest.mark.dist
@pytest.mark.parametrize(("transform", "collectives"), [("gradient", 2), ("gradient by sample", 2)])
def test_a_transform_synchronises(transform, collectives):
    """The sum of the ranks' gradients is that of one process, by one collective each way for all samples."""
    transformed, shape = TRANSFORMS[transform]
    x = torch.randn(*shape[:-2], 2 * shape[-2], 3, dtype=torch.float64)
    loss, parameters = make_loss(nn.BatchNorm1d, track_running_stats=False)
    expected = transformed(loss)(parameters, x)
    results = run_on_ranks(transform_on_a_rank, 2, transform, x)
    assert [issued for _, issued in results] == [collectives] * 2
    for name, gradient in expected.items():
        total = sum(result[name] for result, _ in results)
        torch.testing.assert_close(total, gradient, rtol=1e-9, atol=1e-9)


def test_a_transform_cannot_update_running_statistics():
    loss, parameters = make_loss(SyncBatchNorm)
    with pytest.raises(InputError, match="running statistics cannot be updated in a transform"):
        grad(loss)(parameters, torch.randn(5, 3, dtype=torch.float64))


def test_a_mapped_mask_is_refused():
    layer = SyncBatchNorm(3, track_running_stats=False)
    with pytest.raises(InputError, match="mask: must not be mapped"):
        vmap(layer)(torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool))


def make_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4), nn.ReLU())
    network(torch.randn(8, 3, 5, 5) + 1)
    return network


@pytest.mark.parametrize("strict", [False, True])
def test_evaluation_is_exported_and_training_is_refused_by_name(strict):
    network, x = make_network(), torch.randn(2, 3, 5, 5)
    program = torch.export.export(network.eval(), (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), network(x))
    with pytest.raises(Exception, match="a program with synchronised statistics cannot be exported") as error:
        torch.export.export(network.train(), (x,), strict=strict)
    assert strict or isinstance(error.value, ExportError)


@pytest.mark.filterwarnings("ignore")  # of the recorders
@pytest.mark.parametrize("record", [make_fx, lambda network: lambda x: torch.jit.trace(network, (x,))])
def test_a_recorded_program_would_lack_collectives_and_is_refused(record):
    network = make_network().train()
    with pytest.raises(ExportError, match="cannot be exported"):
        record(network)(torch.randn(2, 3, 5, 5))


@pytest.mark.filterwarnings("ignore")  # of the exporter's own parts
def test_evaluation_is_written_as_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    network, x = make_network().eval(), torch.randn(2, 3, 5, 5)
    torch.onnx.export(network, (x,), tmp_path / "network.onnx", dynamo=True, verbose=False)
    model = onnx.load(tmp_path / "network.onnx")
    onnx.checker.check_model(model)
    actual = onnx.reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(actual), network(x).detach(), rtol=1e-4, atol=1e-5)
