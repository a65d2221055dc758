"""The layer under torch.fx, where it is one call as torch's own layers are."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from syncbn import SyncBatchNorm, convert_sync_batchnorm
from tests.dist import run_on_ranks
from tests.syncbn.collective_recorder import record_collectives


def make_model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def nodes(graph):
    return [(node.op, node.target, node.args, node.kwargs) for node in graph.nodes]


def test_a_converted_model_has_the_graph_of_the_plain_one():
    model = torchvision.models.mobilenet_v3_small(num_classes=3)
    plain = fx.symbolic_trace(model).graph
    traced = fx.symbolic_trace(convert_sync_batchnorm(model))
    assert [(op, target) for op, target, *_ in nodes(traced.graph)] == [
        (op, target) for op, target, *_ in nodes(plain)
    ]
    traced.graph.lint()
    assert traced.state_dict().keys() == model.state_dict().keys()


def test_nodes_of_torchvision_have_the_names_of_the_plain_model():
    model = torchvision.models.resnet18(num_classes=3)
    expected = get_graph_node_names(model)
    convert_sync_batchnorm(model)
    assert get_graph_node_names(model) == expected
    extractor = create_feature_extractor(model, ["layer1.0.bn1", "layer2"])
    layer = model.layer1[0].bn1
    expected = []
    layer.register_forward_hook(lambda layer, inputs, output: expected.append(output))
    features = extractor(torch.randn(2, 3, 32, 32))
    assert features.keys() == {"layer1.0.bn1", "layer2"}
    torch.testing.assert_close(features["layer1.0.bn1"].relu(), expected[0].relu())
    assert extractor.state_dict().keys() < model.state_dict().keys()


def test_hooks_run_when_the_traced_model_runs_and_only_then():
    model, called = convert_sync_batchnorm(make_model()), []
    model[1].register_forward_pre_hook(lambda layer, inputs: called.append(type(inputs[0])))
    model[1].register_forward_hook(lambda layer, inputs, output: output + 1)
    traced = fx.symbolic_trace(model)
    assert called == []
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(copy.deepcopy(traced)(x), model(x))
    assert called == [torch.Tensor, torch.Tensor]


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = SyncBatchNorm(3)

    def forward(self, x, mask):
        return self.norm(mask=mask, input=x)


def test_arguments_are_recorded_as_they_are_given():
    traced = fx.symbolic_trace(Masked())
    node = next(node for node in traced.graph.nodes if node.op == "call_module")
    assert (node.target, len(node.args), set(node.kwargs)) == ("norm", 0, {"input", "mask"})
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) > 0.5
    torch.testing.assert_close(traced(x, mask), Masked()(x, mask))


class Reluctant(fx.Tracer):
    """Tracer that has no leaves."""

    def is_leaf_module(self, module, name):
        return False


def test_a_tracer_that_traces_into_all_modules_records_the_layer_as_one_call_too():
    graph = Reluctant().trace(convert_sync_batchnorm(make_model()))
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["1"]


def train_traced():
    model = convert_sync_batchnorm(make_model().double())
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    traced = pickle.loads(pickle.dumps(fx.symbolic_trace(model)))
    results = []
    for module in (model, traced):
        with record_collectives() as issued:
            module(x).square().sum().backward()
        gradients = [parameter.grad for parameter in module.parameters()]
        results.append((gradients, module.state_dict(), issued))
    return results


@pytest.mark.dist
def test_a_traced_model_trains_with_synchronisation():
    ranks = run_on_ranks(train_traced, 2)
    for (gradients, state, issued), (traced_gradients, traced_state, traced_issued) in ranks:
        assert len(issued) == 2
        assert traced_issued == issued
        torch.testing.assert_close(traced_gradients, gradients, rtol=0, atol=0)
        torch.testing.assert_close(traced_state, state, rtol=0, atol=0)
    torch.testing.assert_close(ranks[0][1][1], ranks[1][1][1], rtol=0, atol=0)
