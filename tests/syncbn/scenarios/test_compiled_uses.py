"""The compiled layer where models use it: in a checkpoint, on batches whose size changes, and with a mask."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm
from tests.dist import run_on_ranks
from tests.syncbn.collective_recorder import record_collectives

pytestmark = pytest.mark.dist
CHANNELS = 4


def make_block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), SyncBatchNorm(CHANNELS), nn.ReLU())


def draw(samples, seed=0):
    generator = torch.Generator().manual_seed(10 * seed + dist.get_rank())
    return torch.randn(samples, CHANNELS, 7, 9, generator=generator) + dist.get_rank()


def run(call, module, x, *others):
    """Run forward and backward; return output, gradients and copies of the buffers, and the collectives
    issued.
    """
    x = x.clone().requires_grad_()
    module.zero_grad()
    with record_collectives() as issued:
        y = call(x, *others)
        (y * y.detach().cos()).sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    return [y.detach(), x.grad, *gradients, *(buffer.clone() for buffer in module.buffers())], issued


def compare(call, compiled_module, plain, batches):
    """Run the plain module and the call on the same batches, one after the other, and compare all there is to
    see.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own parts
        for batch in batches:
            expected, expected_issued = run(plain, plain, *batch)
            actual, issued = run(call, compiled_module, *batch)
            assert issued == expected_issued
            assert len(issued) == 2
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


def run_compiled_block_in_checkpoint(use_reentrant):
    plain = make_block()
    block = copy.deepcopy(plain)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    uneven = 3 + dist.get_rank()
    for number in (1, 2):
        compare(
            lambda x: checkpoint(compiled, x, use_reentrant=use_reentrant),
            block,
            plain,
            [(draw(uneven, seed=number),)],
        )
        assert block[1].num_batches_tracked == number


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_compiled_block_in_a_checkpoint_is_synchronised_and_counted_once(use_reentrant):
    run_on_ranks(run_compiled_block_in_checkpoint, 2, use_reentrant)


def run_on_changing_sizes():
    plain = make_block()
    block = copy.deepcopy(plain)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=graphs, fullgraph=True, dynamic=True)
    # No size of 0 or 1, and none that is also a height or width: torch would compile those anew, whatever it
    # is given.
    sizes = [size + 2 * dist.get_rank() for size in (3, 6, 2)]
    counts = []

    def call(x):
        y = compiled(x)
        counts.append(graphs.frame_count)
        return y

    compare(call, block, plain, [(draw(size, seed=number),) for number, size in enumerate(sizes)])
    return counts


def test_one_graph_serves_all_batch_sizes_uneven_ones_too():
    for first, *others in run_on_ranks(run_on_changing_sizes, 2):
        assert others == [first] * 2


def run_without_samples_on_one_rank():
    plain = make_block()
    block = copy.deepcopy(plain)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    compare(compiled, block, plain, [(draw(3),), (draw(3 * (1 - dist.get_rank()), seed=1),)])


def test_a_compiled_rank_may_run_out_of_samples():
    run_on_ranks(run_without_samples_on_one_rank, 2)


def make_masks():
    """Draw masks, of which the second leaves one rank nothing and the third a single value."""
    masks = torch.rand(3, 3, 7, 9, generator=torch.Generator().manual_seed(dist.get_rank())) < 0.6
    if dist.get_rank() == 1:
        masks[1:] = False
        masks[2, 0, 0, 0] = True
    return masks


def run_with_mask(fullgraph):
    plain = SyncBatchNorm(CHANNELS)
    layer = copy.deepcopy(plain)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=fullgraph)
    compare(
        compiled, layer, plain, [(draw(3, seed=number), mask) for number, mask in enumerate(make_masks())]
    )


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_layer_takes_masks_that_leave_any_number_of_values(fullgraph):
    run_on_ranks(run_with_mask, 2, fullgraph)
