import copy
import pickle

import pytest
import torch
import torch.distributed as dist

from syncbn import GroupError, SyncBatchNorm, new_sync_groups
from tests.dist import run_on_ranks


def normalise_in_ghost_batches():
    group = new_sync_groups(2)
    assert new_sync_groups(4) is None
    with pytest.raises(GroupError, match="groups of 3 ranks were asked for, but there are 4"):
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
