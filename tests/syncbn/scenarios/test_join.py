"""Ranks with different numbers of batches: under torch's Join, which wants early ends to raise if layers
synchronise.
"""

import inspect
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms import Join
from torch.nn.parallel import DistributedDataParallel

from syncbn import DesyncError, convert_sync_batchnorm
from tests.dist import run_on_ranks

pytestmark = pytest.mark.dist
TIMEOUT_SECONDS = 2.0
BUFFERS_OPTION = "forward_sync_buffers"
if BUFFERS_OPTION not in inspect.signature(DistributedDataParallel).parameters:
    BUFFERS_OPTION = "broadcast_buffers"


def make_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2))
    network = convert_sync_batchnorm(network)
    network[1].timeout_seconds = TIMEOUT_SECONDS
    return DistributedDataParallel(network, **{BUFFERS_OPTION: False})


def join_by_method(network):
    return network.join(throw_on_early_termination=True)


def join_by_class(network):
    return Join([network], throw_on_early_termination=True)


def train(network, batches):
    for _ in range(batches[dist.get_rank()]):
        network(torch.randn(5, 3)).square().sum().backward()


def train_joined(join, batches):
    """Return what ends the training, how many steps the layer saw, and its state after one more of its
    own.
    """
    network = make_network()
    with pytest.raises(RuntimeError) as caught, join(network):
        train(network, batches)
    layer = network.module[1]
    steps = layer.num_batches_tracked.item()
    # The ranks ended together, so they can go on together.
    own = torch.randn(5, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    layer(own.requires_grad_()).square().sum().backward()
    return str(caught.value), steps, layer.state_dict()


@pytest.mark.parametrize("join", [join_by_method, join_by_class])
@pytest.mark.parametrize("batches", [[2, 4], [4, 2], [0, 3], [3, 2, 4]], ids=str)
def test_an_early_end_raises_on_every_rank_and_leaves_the_layer_in_step(batches, join):
    results = run_on_ranks(train_joined, len(batches), join, batches, timeout_seconds=20)
    for rank, (message, steps, state) in enumerate(results):
        ended = (
            f"Rank {rank} exhausted all inputs"
            if batches[rank] == min(batches)
            else "Throwing across all ranks"
        )
        assert ended in message
        assert steps == min(batches)
        torch.testing.assert_close(state, results[0][2], rtol=0, atol=0)


def train_unjoined(batches):
    """Return the error met, and how long the training took."""
    network = make_network()
    started = time.monotonic()
    try:
        train(network, batches)
    except DesyncError as error:
        return error, time.monotonic() - started
    return None, time.monotonic() - started


def test_without_join_the_ranks_that_go_on_say_who_has_ended():
    batches, ended = [3, 2, 4], 1
    for rank, (error, seconds) in enumerate(run_on_ranks(train_unjoined, len(batches), batches)):
        if rank == ended:
            assert error is None
            continue
        assert isinstance(error, DesyncError)
        assert (error.layer, error.phase, error.call_number) == ("1", "forward", batches[ended] + 1)
        assert error.missing_ranks == (ended,)
        assert seconds < TIMEOUT_SECONDS + 2
