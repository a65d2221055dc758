import copy
import pickle

import pytest
import torch

from syncbn import GroupError, SyncBatchNorm
from syncbn.collectives.context import next_layer_number
from syncbn.collectives.handle import site_of


def site(layer):
    return layer._site


class Group:
    """A process group."""


def test_calls_of_a_phase_are_numbered_from_1():
    collectives, group = site(SyncBatchNorm(2)), Group()
    collectives.enter(group, is_initialised=True)
    forward = [collectives.next_call("forward", group).number for _ in range(3)]
    assert (forward, collectives.next_call("backward", group).number) == ([1, 2, 3], 1)
    other = Group()
    collectives.enter(other, is_initialised=True)
    assert collectives.next_call("forward", other).number == 1


def test_stamps_of_calls_differ_and_their_sum_is_exact():
    collectives, group = site(SyncBatchNorm(2)), Group()
    stamps = {
        collectives.next_call(phase, group).stamp for phase in ("forward", "backward") for _ in range(50)
    }
    assert len(stamps) == 100
    assert all(1 << 39 <= stamp < 1 << 40 for stamp in stamps)


def test_a_layer_whose_group_is_gone_does_not_compute_alone():
    collectives = site(SyncBatchNorm(2))
    collectives.enter(None, is_initialised=False)
    collectives.enter(Group(), is_initialised=True)  # and it is gone
    for each in (collectives, copy.deepcopy(collectives)):
        with pytest.raises(GroupError, match="compute its statistics alone"):
            each.enter(None, is_initialised=False)
    collectives.enter(None, is_initialised=True)  # a group of one rank
    collectives.enter(None, is_initialised=False)


def test_a_copy_is_counted_into_its_name_when_it_is_synchronised():
    first, group = site(SyncBatchNorm(2)), Group()
    copies = [copy.deepcopy(first) for _ in range(3)]
    assert {each.name for each in copies} == {f"{first.name}, copy"}
    for each in copies[2:0:-1]:  # the first one is only evaluated
        each.enter(group, is_initialised=True)
    assert [each.name for each in copies[1:]] == [f"{first.name}, copy 2", f"{first.name}, copy 1"]
    copies[0].name = "mine"
    copies[0].enter(group, is_initialised=True)
    assert copies[0].name == "mine"


def test_an_object_is_found_by_its_key_and_a_copy_has_its_own():
    first = site(SyncBatchNorm(2))
    second = copy.deepcopy(first)
    assert (site_of(first.handle), site_of(second.handle)) == (first, second)
    first.next_call("forward", Group())
    assert second.next_call("forward", Group()).number == 1
    assert pickle.loads(pickle.dumps(first)).name == first.name


def test_outside_of_a_backward_pass_nothing_is_recomputed():
    layer = SyncBatchNorm(2)
    x = torch.randn(4, 2, requires_grad=True)
    layer(x)
    assert site(layer).lookup(x, ()) is None


def test_a_pickled_group_that_this_process_does_not_have_is_an_error():
    collectives = site(SyncBatchNorm(2))
    state = collectives.__getstate__()
    from syncbn.collectives.context import PickledGroup

    other = copy.deepcopy(collectives)
    other.__setstate__(state | {"group": PickledGroup((3, 4))})
    with pytest.raises(GroupError, match=r"ranks \[3, 4\]"):
        _ = other.process_group


def test_layers_are_numbered_in_the_order_of_their_construction():
    assert next_layer_number() < next_layer_number()
