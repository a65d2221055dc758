import pytest
import torch
import torch.distributed as dist

from syncbn import DesyncError, GroupError
from syncbn.collectives.context import LayerCollectives
from syncbn.collectives.reduce import all_gather, all_reduce, check_group, group_of_pass, group_size
from tests.dist import run_on_ranks


def test_a_process_without_group_is_alone():
    assert group_size(None) == 1


def make_call(name, phase, process_group=None):
    site = LayerCollectives(name, process_group)
    return site.next_call(phase, group_of_pass(site))


def stamped(call, vector):
    return torch.cat([torch.tensor([call.stamp], dtype=torch.float64), vector])


def use_both():
    vector = torch.arange(3, dtype=torch.float64) + 10 * dist.get_rank()
    call = make_call("both", "sum")
    total = stamped(call, vector)
    assert all_reduce(total, call) is None
    call = make_call("both", "gather")
    parts, check = all_gather(stamped(call, vector), call)
    assert check is None
    return group_size(None), total[1:], parts[:, 1:]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 3])
def test_sum_and_gather_over_all_ranks(world_size):
    vectors = [torch.arange(3, dtype=torch.float64) + 10 * rank for rank in range(world_size)]
    for size, total, parts in run_on_ranks(use_both, world_size):
        assert size == world_size
        assert torch.equal(total, sum(vectors))
        assert torch.equal(parts, torch.stack(vectors))


def sum_random():
    generator = torch.Generator().manual_seed(dist.get_rank())
    call = make_call("random", "sum")
    vector = stamped(call, torch.randn(10_001, generator=generator, dtype=torch.float64))
    all_reduce(vector, call)
    return vector


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [3, 4])
def test_the_sum_is_the_same_bits_on_every_rank(world_size):
    first, *others = run_on_ranks(sum_random, world_size)
    assert all(torch.equal(first, other) for other in others)


def use_groups():
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    own = groups[dist.get_rank() // 2]
    group = group_of_pass(LayerCollectives("own", own))
    assert group is (own if dist.get_rank() < 2 else None)
    with pytest.raises(GroupError, match=rf"rank {dist.get_rank()} is not in the process group"):
        group_size(groups[1 - dist.get_rank() // 2])
    return group_size(own)


@pytest.mark.dist
def test_a_rank_synchronises_over_its_own_group_and_is_refused_by_others():
    assert run_on_ranks(use_groups, 3) == [2, 2, 1]


def send_different_calls():
    call = make_call(f"norm{dist.get_rank()}", "forward")
    with pytest.raises(DesyncError, match="paired with another call"):
        all_reduce(stamped(call, torch.zeros(3, dtype=torch.float64)), call)
    call = make_call(f"norm{dist.get_rank()}", "forward in float64")
    with pytest.raises(DesyncError, match="paired with another call"):
        all_gather(stamped(call, torch.zeros(3, dtype=torch.float64)), call)


@pytest.mark.dist
def test_different_calls_are_not_paired():
    run_on_ranks(send_different_calls, 2)


def use_group_of_the_past(is_new):
    site = LayerCollectives("norm")
    group = group_of_pass(site)
    assert check_group(site, group) is group
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    if is_new:
        prefix = dist.PrefixStore("again", store)
        rank = group.rank()
        dist.init_process_group("gloo", store=prefix, rank=rank, world_size=2)
        assert group_of_pass(site) is not group  # a new forward pass is over the new group
    else:
        with pytest.raises(GroupError, match="layer 'norm': its process group is gone"):
            group_of_pass(site)
    with pytest.raises(GroupError, match="destroyed or re-created"):
        check_group(site, group)
    with pytest.raises(GroupError, match="destroyed or re-created"):
        check_group(site, None)  # its weak reference


@pytest.mark.dist
@pytest.mark.parametrize("is_new", [False, True])
def test_the_group_of_a_pass_must_still_exist_in_backward(is_new):
    run_on_ranks(use_group_of_the_past, 2, is_new)


def use_group_after_its_end():
    group = dist.new_group([0])
    dist.destroy_process_group()
    with pytest.raises(GroupError, match="not initialised"):
        group_size(group)


@pytest.mark.dist
def test_a_group_without_initialised_processes_is_refused():
    run_on_ranks(use_group_after_its_end, 1)
