import copy
import inspect
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from syncbn import GroupError, InputError, SyncBatchNorm
from tests.dist import run_on_ranks
from tests.syncbn.collective_recorder import record_collectives
from tests.syncbn.launch_counter import count_operators

LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
OPTIONS = [
    {},
    {"momentum": None},
    {"momentum": 1.0, "eps": 1e-3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]
STEPS = 3


def make_steps(counts, rest):
    """Draw a list of batches, and each is a list of (values, output gradient) by rank."""
    generator = torch.Generator().manual_seed(len(rest))

    def draw(count):
        return torch.randn(2, count, 3, *rest, generator=generator, dtype=torch.float64).unbind()

    return [[draw(count) for count in counts] for _ in range(STEPS)]


def train(layer, batches):
    """Run a layer on batches of (values, output gradient); return outputs, input gradients, parameter
    gradients and state.
    """
    outputs, gradients = [], []
    for values, gradient in batches:
        x = values.clone().requires_grad_()
        y = layer(x)
        y.backward(gradient)
        outputs.append(y.detach())
        gradients.append(x.grad)
    return outputs, gradients, [parameter.grad for parameter in layer.parameters()], layer.state_dict()


def train_synchronised(jobs):
    results = []
    for options, steps in jobs:
        layer = SyncBatchNorm(3, dtype=torch.float64, **options)
        results.append(train(layer, [batch[dist.get_rank()] for batch in steps]))
    return results


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_training_equals_batch_norm_on_the_concatenated_batch(world_size):
    counts = [[2] * world_size, [4 - rank for rank in range(world_size)], [3] * (world_size - 1) + [0]][
        : 1 + world_size
    ]
    counts = [shares for shares in counts if sum(shares)]
    jobs = [
        (options, make_steps(shares, rest))
        for options in OPTIONS
        for shares in counts
        for rest in [(), (2, 3)]
    ]
    results = run_on_ranks(train_synchronised, world_size, jobs)
    for index, (options, steps) in enumerate(jobs):
        layer = LAYERS[steps[0][0][0].dim()](3, dtype=torch.float64, **options)
        batches = [[torch.cat(tensors) for tensors in zip(*batch, strict=True)] for batch in steps]
        outputs, gradients, parameter_gradients, state = train(layer, batches)
        of_ranks = [result[index] for result in results]
        for step in range(STEPS):
            assert_close(torch.cat([result[0][step] for result in of_ranks]), outputs[step])
            assert_close(torch.cat([result[1][step] for result in of_ranks]), gradients[step])
        for number, expected in enumerate(parameter_gradients):
            assert_close(sum(result[2][number] for result in of_ranks), expected)
        for result in of_ranks:
            assert_close(result[3], state)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", LAYERS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_without_a_process_group_it_is_plain_batch_norm(dim, options, dtype):
    plain, layer = LAYERS[dim](3, **options), SyncBatchNorm(3, **options)
    for _ in range(STEPS):
        x = torch.randn(4, 3, *range(2, dim)).to(dtype)
        torch.testing.assert_close(layer(x), plain(x.float()).to(dtype))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=2e-6, atol=1e-6)
    plain.eval()
    layer.eval()
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("parameter_dtype", [torch.float16, torch.float32, torch.float64])
def test_evaluation_takes_any_pair_of_dtypes(dtype, parameter_dtype):
    layer = SyncBatchNorm(3, dtype=parameter_dtype)
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    layer.running_var.copy_(torch.tensor([4.0, 1.0, 0.25]))
    layer.eval()
    x = torch.randn(4, 3).to(dtype)
    y = layer(x)
    expected = (x.double() - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([4.0, 1.0, 0.25]).sqrt()
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype), rtol=2e-2 if dtype.itemsize == 2 else 1e-4, atol=1e-4)


def evaluate_on_one_rank():
    layers = [SyncBatchNorm(3).eval(), SyncBatchNorm(3, track_running_stats=False).eval()]
    if dist.get_rank() == 1:
        return None
    with record_collectives() as issued:
        outputs = [layer(torch.randn(4, 3, requires_grad=True)) for layer in layers]
        sum(output.sum() for output in outputs).backward()
    return issued, outputs[1].mean(0).abs().max().item()


@pytest.mark.dist
def test_one_rank_alone_may_evaluate():
    (issued, largest_mean), nothing = run_on_ranks(evaluate_on_one_rank, 2, timeout_seconds=10)
    assert issued == []
    assert largest_mean < 1e-6
    assert nothing is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_an_empty_input_gives_an_empty_output_and_leaves_the_state(training, options):
    layer = SyncBatchNorm(3, **options)
    layer(torch.randn(4, 3, 5))
    before = copy.deepcopy(layer.state_dict())
    layer.train(training)
    x = torch.empty(0, 3, 5, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3, 5)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert not any(parameter.grad.any() for parameter in layer.parameters())


def train_without_values(dtype):
    layer = SyncBatchNorm(3, dtype=dtype)
    batch = torch.randn(4, 3, dtype=dtype)
    layer(batch)
    before = copy.deepcopy(layer.state_dict())
    layer(batch[:0]).sum().backward()
    return before, layer.state_dict()


@pytest.mark.dist
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_batch_without_values_on_any_rank_leaves_the_buffers(dtype):
    for before, after in run_on_ranks(train_without_values, 2, dtype):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def train_and_share_state(counts):
    layer = SyncBatchNorm(3)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(5):
        layer(torch.randn(counts[dist.get_rank()], 3, 7, generator=generator) + dist.get_rank())
    return layer.state_dict()


@pytest.mark.dist
def test_buffers_are_the_same_bits_on_every_rank():
    first, *others = run_on_ranks(train_and_share_state, 4, [5, 1, 0, 3])
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def train_from_different_buffers():
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(2, 8, 3, generator=generator, dtype=torch.float64)
    layer = SyncBatchNorm(3, dtype=torch.float64)
    layer.running_mean.fill_(1e6 * dist.get_rank())
    return layer(batches[dist.get_rank()]).detach(), batches


@pytest.mark.dist
def test_buffers_that_differ_between_ranks_do_not_reach_the_statistics():
    results = run_on_ranks(train_from_different_buffers, 2)
    assert_close(
        torch.cat([y for y, _ in results]),
        F.batch_norm(results[0][1].flatten(0, 1), None, None, training=True),
    )


def raise_on_a_single_value():
    layer = SyncBatchNorm(3)
    with pytest.raises(ValueError, match="2 or more values per channel"):
        layer(torch.randn(1 - dist.get_rank(), 3))
    return layer.state_dict()


@pytest.mark.dist
def test_a_single_value_raises_on_every_rank_and_leaves_the_state():
    for state in run_on_ranks(raise_on_a_single_value, 2):
        torch.testing.assert_close(state, SyncBatchNorm(3).state_dict(), rtol=0, atol=0)


def test_half_precision_layers_count_past_their_dtype():
    layer = SyncBatchNorm(2).half()
    x = torch.randn(70_000, 2).half()
    y = layer(x)
    assert y.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in layer.buffers())
    assert layer.running_var.tolist() == pytest.approx([1.0, 1.0], abs=5e-3)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_state_dict_is_that_of_batch_norm(options):
    plain, layer = nn.BatchNorm2d(3, **options), SyncBatchNorm(3, **options)
    plain(torch.randn(4, 3, 2, 2))
    layer.load_state_dict(plain.state_dict())
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
    layer(torch.randn(4, 3, 2, 2))
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_the_signature_is_that_of_torch():
    ours, torchs = (
        [
            (parameter.name, parameter.kind, parameter.default)
            for parameter in inspect.signature(layer).parameters.values()
        ]
        for layer in (SyncBatchNorm, nn.SyncBatchNorm)
    )
    if "bias" not in dict(inspect.signature(nn.SyncBatchNorm).parameters):
        ours.pop()  # a keyword of newer versions
    assert ours == torchs


def test_a_layer_may_have_a_weight_and_no_bias():
    layer = SyncBatchNorm(3, bias=False)
    assert list(layer.state_dict()) == ["weight", "running_mean", "running_var", "num_batches_tracked"]
    for training in (True, False):
        layer.train(training)(torch.randn(4, 3)).sum().backward()
    assert layer.weight.grad is not None


def test_deepcopy_and_pickle_give_an_independent_layer():
    layer = SyncBatchNorm(3, momentum=None)
    layer.weight.requires_grad_(False)
    layer(torch.randn(4, 3))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for copied in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        torch.testing.assert_close(copied.state_dict(), layer.state_dict(), rtol=0, atol=0)
        assert (type(copied), copied.momentum, copied.training) == (SyncBatchNorm, None, True)
        assert [parameter.requires_grad for parameter in copied.parameters()] == [False, True]
        copied(torch.randn(4, 3))
        assert (layer.num_batches_tracked, copied.num_batches_tracked) == (1, 2)


def copy_layer_with_group():
    group = dist.new_group([0, 1])
    network = nn.ModuleDict({"one": SyncBatchNorm(3, process_group=group), "same": None})
    network["same"] = network["one"]
    copied = copy.deepcopy(network)
    assert copied["one"] is copied["same"]
    assert copied["one"] is not network["one"]
    assert copied["one"].process_group is group
    return copied["one"](torch.full((2, 3), float(dist.get_rank())))


@pytest.mark.dist
def test_a_copy_shares_the_process_group():
    below, above = run_on_ranks(copy_layer_with_group, 2)
    torch.testing.assert_close(below, torch.full((2, 3), -1.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(above, torch.full((2, 3), 1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "options", "message"),
    [
        (
            (4, 2),
            torch.float32,
            {},
            r"weight: must have one element per channel, 2 for an input of shape \(4, 2\)",
        ),
        ((4, 2), torch.float32, OPTIONS[-1], r"must have 3 channels \(got 2, shape \(4, 2\)\)"),
        ((3,), torch.float32, {}, "two or more dimensions"),
        ((4, 3), torch.int32, {}, r"\(got torch.int32\)"),
    ],
)
def test_bad_input_is_refused_and_the_state_left(training, shape, dtype, options, message):
    layer = SyncBatchNorm(3, **options).train(training)
    with pytest.raises(InputError, match=message):
        layer(torch.ones(shape, dtype=dtype))
    torch.testing.assert_close(layer.state_dict(), SyncBatchNorm(3, **options).state_dict(), rtol=0, atol=0)


def use_foreign_group():
    group = dist.new_group([0])
    layer = SyncBatchNorm(3, process_group=group)
    if dist.get_rank() == 1:
        with pytest.raises(GroupError):
            layer(torch.randn(4, 3))
    layer.eval()(torch.randn(4, 3))


@pytest.mark.dist
def test_a_rank_outside_the_group_may_evaluate_but_not_train():
    run_on_ranks(use_foreign_group, 2)


def make_network(norm):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 4, 3, bias=False),
        norm(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, bias=False),
        norm(3, affine=False),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 4 * 4, 2)).double()


def train_network(network, batches, loss_weight=1.0):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    for x, target in batches:
        optimizer.zero_grad()
        (loss_weight * F.mse_loss(network(x), target)).backward()
        optimizer.step()


# torch 2.13 renamed the option, and warns of the old name.
BUFFERS_OPTION = "forward_sync_buffers"
if BUFFERS_OPTION not in inspect.signature(DistributedDataParallel).parameters:
    BUFFERS_OPTION = "broadcast_buffers"


def train_network_in_parallel(counts, batches):
    rank = dist.get_rank()
    network = make_network(SyncBatchNorm)
    parallel = DistributedDataParallel(network, **{BUFFERS_OPTION: False})
    own = [(x.split(counts)[rank], target.split(counts)[rank]) for x, target in batches]
    # The mean over ranks of these losses is the mean over all samples, also where ranks hold different
    # numbers of them.
    train_network(parallel, own, loss_weight=dist.get_world_size() * counts[rank] / sum(counts))
    return network.state_dict()


@pytest.mark.dist
@pytest.mark.parametrize("counts", [[3, 3], [1, 5], [2, 1, 4], [1, 1, 1, 1]])
def test_data_parallel_training_equals_training_on_one_device(counts):
    batches = [
        (
            torch.randn(sum(counts), 2, 8, 8, dtype=torch.float64),
            torch.randn(sum(counts), 2, dtype=torch.float64),
        )
        for _ in range(5)
    ]
    network = make_network(nn.BatchNorm2d)
    train_network(network, batches)
    for state in run_on_ranks(train_network_in_parallel, len(counts), counts, batches):
        torch.testing.assert_close(state, network.state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((30, 100), torch.contiguous_format),
        ((8, 64, 56, 56), torch.channels_last),
        ((8, 256, 28, 28), torch.channels_last),
        ((8, 512, 14, 14), torch.contiguous_format),
        ((8, 2048, 7, 7), torch.channels_last),
    ],
)
def test_a_step_dispatches_fewer_than_60_operators(shape, memory_format):
    for operators in run_on_ranks(count_operators, 2, shape, memory_format):
        assert 20 < operators < 60
