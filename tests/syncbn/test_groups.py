import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from syncbn import GroupError, SyncBatchNorm, new_sync_groups
from syncbn.autograd import _NormaliseCompiled
from tests.dist import run_on_ranks


def normalise_in_ghost_batches():
    group = new_sync_groups(2)
    assert new_sync_groups(4) is None
    with pytest.raises(GroupError, match=r"size: must divide the number of ranks, 4 \(got 3\)"):
        new_sync_groups(3)
    layer = SyncBatchNorm(1, eps=0.0, process_group=group)
    again = pickle.loads(pickle.dumps(layer))
    copied = copy.deepcopy(layer)
    assert again.process_group is copied.process_group is group
    x = torch.tensor([[float(dist.get_rank() ** 2)]])
    return [norm(x).item() for norm in (layer, again, copied)]


@pytest.mark.dist
def test_groups_of_neighbours_and_their_layers_copied_and_pickled():
    results = run_on_ranks(normalise_in_ghost_batches, 4)
    assert results == [[pytest.approx(sign)] * 3 for sign in (-1, 1, -1, 1)]


def pickle_layer():
    return pickle.dumps(SyncBatchNorm(1, process_group=dist.new_group([0])))


@pytest.mark.dist
def test_a_layer_pickled_with_a_group_that_is_not_here_says_so_when_it_trains():
    layer = pickle.loads(run_on_ranks(pickle_layer, 1)[0])
    layer.eval()(torch.randn(3, 1))
    with pytest.raises(GroupError, match=r"pickled with a process group of ranks \[0\]"):
        layer.train()(torch.randn(3, 1))
    layer.process_group = None
    layer(torch.randn(3, 1))


def test_without_torch_distributed_there_is_one_rank():
    assert new_sync_groups(1) is None
    with pytest.raises(GroupError):
        new_sync_groups(2)


def backward_alone(kind):
    """Destroy the process group between forward and backward; return what backward raises."""
    layer = SyncBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    if kind == "recomputed":
        y = checkpoint(layer, x, use_reentrant=False)
    elif kind == "compiled":
        y, _ = _NormaliseCompiled.apply(
            x, None, layer.weight, layer.bias, layer.eps, layer._site.handle, False
        )
    else:
        y = layer(x)
    if kind == "second derivative":
        [y] = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    dist.destroy_process_group()
    if kind == "used again":
        with pytest.raises(GroupError, match="this process would compute its statistics alone"):
            layer(torch.randn(4, 3))
        layer.eval()(torch.randn(4, 3))
    total = y.sum()
    with pytest.raises(GroupError, match="destroyed or re-created") as caught:
        total.backward()
    assert x.grad is None
    alone = SyncBatchNorm(3)
    alone(x).sum().backward()  # which is what a rank without a group does
    return str(caught.value)


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["plain", "recomputed", "compiled", "second derivative", "used again"])
def test_a_backward_pass_without_the_group_of_its_forward_pass_is_refused(kind):
    first, second = run_on_ranks(backward_alone, 2, kind)
    assert first == second


def use_destroyed_group():
    group = dist.new_group([0, 1])
    layer = SyncBatchNorm(3, process_group=group)
    y = layer(torch.randn(4, 3, requires_grad=True))
    dist.destroy_process_group(group)
    for use in (lambda: layer(torch.randn(4, 3)), y.sum().backward, lambda: pickle.dumps(layer)):
        with pytest.raises(GroupError, match=r"process group (was|of the forward pass was) destroyed"):
            use()
    layer.eval()(torch.randn(4, 3))
    copied = copy.deepcopy(layer).train()
    copied.process_group = None
    return copied(torch.randn(4, 3)).shape


@pytest.mark.dist
def test_a_destroyed_group_is_named():
    assert run_on_ranks(use_destroyed_group, 2) == [(4, 3)] * 2
