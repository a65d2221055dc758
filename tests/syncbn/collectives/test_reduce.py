import pytest
import torch
import torch.distributed as dist

from syncbn import GroupError
from syncbn.collectives.context import LayerCollectives
from syncbn.collectives.reduce import gather_from_ranks, group_size, sum_over_ranks
from tests.dist import run_on_ranks


def test_a_process_without_group_is_alone():
    assert group_size(None) == 1


def use_both():
    vector = torch.arange(3, dtype=torch.float64) + 10 * dist.get_rank()
    site = LayerCollectives("both")
    halves = [vector[:1], vector[1:]]
    numbers, total = sum_over_ranks([7], halves, site, "sum")
    assert numbers == [7 * group_size(None)]
    parts = gather_from_ranks([7], halves, site, "gather")
    assert torch.equal(vector, torch.arange(3, dtype=torch.float64) + 10 * dist.get_rank())
    return group_size(None), total, parts


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sum_and_gather_over_all_ranks(world_size):
    vectors = [torch.arange(3, dtype=torch.float64) + 10 * rank for rank in range(world_size)]
    for size, total, parts in run_on_ranks(use_both, world_size):
        assert size == world_size
        assert torch.equal(total, sum(vectors))
        assert torch.equal(parts[:, 0], torch.full((world_size,), 7.0))
        assert torch.equal(parts[:, 1:], torch.stack(vectors))


def sum_random():
    generator = torch.Generator().manual_seed(dist.get_rank())
    vector = torch.randn(10_001, generator=generator, dtype=torch.float64)
    return sum_over_ranks([], [vector], LayerCollectives("random"), "sum")[1]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [3, 4])
def test_the_sum_is_the_same_bits_on_every_rank(world_size):
    first, *others = run_on_ranks(sum_random, world_size)
    assert all(torch.equal(first, other) for other in others)


def use_groups():
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    own = groups[dist.get_rank() // 2]
    total = sum_over_ranks([], [torch.ones(1)], LayerCollectives("own", own), "sum")[1].item()
    with pytest.raises(GroupError, match=rf"rank {dist.get_rank()} is not in the process group"):
        group_size(groups[1 - dist.get_rank() // 2])
    return group_size(own), total


@pytest.mark.dist
def test_a_rank_sums_over_its_own_group_and_is_refused_by_others():
    assert run_on_ranks(use_groups, 3) == [(2, 2.0), (2, 2.0), (1, 1.0)]


def use_group_after_its_end():
    group = dist.new_group([0])
    dist.destroy_process_group()
    with pytest.raises(GroupError, match="not initialised"):
        group_size(group)


@pytest.mark.dist
def test_a_group_without_initialised_processes_is_refused():
    run_on_ranks(use_group_after_its_end, 1)
