"""What autograd, activation checkpointing and the compiler make of the layer."""

import copy
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm, sync_batch_norm
from tests.dist import run_on_ranks
from tests.syncbn.collective_recorder import record_collectives

pytestmark = pytest.mark.dist


def make_network():
    torch.manual_seed(0)
    norm = SyncBatchNorm(4)
    return nn.Sequential(
        nn.Conv2d(4, 4, 1), norm, nn.ReLU(), nn.Conv2d(4, 4, 1), norm, SyncBatchNorm(4, momentum=None)
    )


def run(network, x, times=1):
    """Run forward and backward; return output, gradients and buffers, and the collectives issued."""
    x = x.clone().requires_grad_()
    network.zero_grad()
    with record_collectives() as issued:
        y = x
        for _ in range(times):
            y = network(y)
        (y * y.detach().cos()).sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    return [y.detach(), x.grad, *gradients, *(buffer.clone() for buffer in network.buffers())], issued


def draw():
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(dist.get_rank())) + dist.get_rank()


def run_checkpointed(use_reentrant):
    plain = make_network()
    network = copy.deepcopy(plain)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return checkpoint(self.network, x, use_reentrant=use_reentrant)

    checkpointed = Checkpointed()
    for times in (1, 2, 1):
        with torch.no_grad():  # nobody will ever call backward on this one
            network(draw()), plain(draw())
        expected, issued = run(plain, draw(), times)
        actual, again = run(checkpointed, draw(), times)
        assert again == issued
        assert len(issued) == 6 * times
        # A reentrant checkpoint adds up the gradients of parameters in another order.
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        for one, other in zip(network.buffers(), plain.buffers(), strict=True):
            assert torch.equal(one, other)
    return [len(layer._site._live) for layer in network if isinstance(layer, SyncBatchNorm)]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_costs_no_collective_and_updates_no_buffer_twice(use_reentrant):
    for records in run_on_ranks(run_checkpointed, 2, use_reentrant):
        assert max(records) <= 16


def run_repeated(use_reentrant, calls):
    """Give rank 0 the same values again and again, while rank 1's vary; return what checkpoints made of it
    and what not.
    """
    layers = [SyncBatchNorm(4, momentum=None) for _ in range(2)]
    generator = torch.Generator().manual_seed(7)
    first = torch.randn(3, 4, 5, generator=generator)
    gradients = ([], [])
    for _ in range(4):
        xs = [first + dist.get_rank() * torch.randn(3, 4, 5, generator=generator) for _ in range(calls)]
        weights = torch.randn(calls, 3, 4, 5, generator=generator)
        for layer, found in zip(layers, gradients, strict=True):
            inputs = [x.clone().requires_grad_() for x in xs]
            call = (
                layer
                if layer is layers[0]
                else lambda x: checkpoint(layers[1], x, use_reentrant=use_reentrant)
            )
            sum(
                (call(x).square() * weight).sum() for x, weight in zip(inputs, weights, strict=True)
            ).backward()
            found.append(torch.stack([x.grad for x in inputs]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layers[1].state_dict(), layers[0].state_dict())


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_of_repeated_values_recalls_the_right_pass(use_reentrant, calls):
    run_on_ranks(run_repeated, 2, use_reentrant, calls)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_finds_large_passes_far_from_and_near_zero(use_reentrant):
    """Their sums are of float64 and of float32."""
    layer, plain = SyncBatchNorm(4), nn.BatchNorm2d(4)
    draws = [torch.randn(8, 4, 32, 32) + shift for shift in (0.0, 2.0, 50.0)]
    inputs = [[x.clone().requires_grad_() for x in draws] for _ in range(2)]
    sum(checkpoint(layer, x, use_reentrant=use_reentrant).square().sum() for x in inputs[0]).backward()
    sum(plain(x).square().sum() for x in inputs[1]).backward()
    for one, other in zip(*inputs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-5)


def run_without_graph(options):
    layer = SyncBatchNorm(4, **options).requires_grad_(False)
    block = nn.Sequential(layer, nn.Conv1d(4, 4, 1))
    with record_collectives() as issued:
        outputs = [checkpoint(block, torch.randn(3, 4, 5), use_reentrant=False) for _ in range(3)]
        sum(output.sum() for output in outputs).backward()
    assert len(issued) == 3
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=str)
def test_a_checkpoint_finds_passes_that_have_no_graph(options):
    run_on_ranks(run_without_graph, 2, options)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_on_one_process_updates_no_buffer_twice(use_reentrant):
    plain = make_network()
    network = copy.deepcopy(plain)
    x = torch.randn(3, 4, 5, 5)
    plain(x.clone().requires_grad_()).sum().backward()
    checkpoint(network, x.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    for one, other in zip(network.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def forget_graphs():
    layer = SyncBatchNorm(4)
    for _ in range(50):
        layer(draw().requires_grad_())
    assert len(layer._site._live) == 1
    for _ in range(50):
        with torch.no_grad():
            layer(draw())
    assert len(layer._site._live) <= 17


def test_records_of_passes_that_are_never_differentiated_go_away():
    run_on_ranks(forget_graphs, 2)


class Gather(torch.autograd.Function):
    """All ranks' values as one batch, twice differentiable: what one process would be given."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        return Scatter.apply(gradient)


class Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx, x):
        return Gather.apply(x)


def check_second_derivative():
    """Check by finite differences of the whole batch, which every rank holds and of which it normalises its
    share.
    """
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 2, generator=generator, dtype=torch.float64).requires_grad_().unbind()
    weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()

    def normalise(x, weight, bias):
        # The share's gradient counts on this rank, and the sum over ranks is that of the whole.
        share = Share.apply(x)
        weight, bias = Same.apply(weight), Same.apply(bias)
        return Gather_output.apply(sync_batch_norm(share, weight, bias)[0])

    class Share(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.chunk(2)[rank].clone()

        @staticmethod
        def backward(ctx, gradient):
            return Gather_output.apply(gradient)

    class Gather_output(torch.autograd.Function):  # noqa: N801
        @staticmethod
        def forward(ctx, y):
            return Gather.forward(None, y)

        @staticmethod
        def backward(ctx, gradient):
            return Share.apply(gradient)

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, vector):
            return vector.clone()

        @staticmethod
        def backward(ctx, gradient):
            return Total.apply(gradient)

    class Total(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gradient):
            gradient = gradient.clone()
            dist.all_reduce(gradient)
            return gradient

        @staticmethod
        def backward(ctx, gradient):
            return Same.apply(gradient)

    arguments = (x, weight, bias)
    assert torch.autograd.gradcheck(normalise, arguments)
    return torch.autograd.gradgradcheck(
        normalise, arguments, torch.ones(4, 2, 2, dtype=torch.float64).requires_grad_()
    )


def test_the_second_derivative_is_that_of_the_function():
    assert run_on_ranks(check_second_derivative, 2) == [True, True]


def make_critic(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), norm(4), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 9, 1)
    ).double()


def step_critic(critic, real, fake, share=1.0):
    """One step of WGAN-GP's critic: Wasserstein distance and the penalty on the norm of the gradient by the
    input.

    Source: Gulrajani et al. 2017, "Improved Training of Wasserstein GANs", Algorithm 1.
    """
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.1)
    mixed = (0.3 * real + 0.7 * fake).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
    (share * loss).backward()
    for parameter in critic.parameters():
        if dist.is_initialized():
            dist.all_reduce(parameter.grad)
    optimizer.step()
    return critic.state_dict()


def step_critic_in_parallel(real, fake):
    rank = dist.get_rank()
    return step_critic(make_critic(SyncBatchNorm), real.chunk(2)[rank], fake.chunk(2)[rank], share=0.5)


def test_a_step_of_wgan_gp_equals_that_of_one_process():
    real, fake = torch.randn(2, 6, 2, 5, 5, dtype=torch.float64)
    expected = step_critic(make_critic(nn.BatchNorm2d), real, fake)
    for state in run_on_ranks(step_critic_in_parallel, 2, real, fake):
        torch.testing.assert_close(state, expected, rtol=1e-10, atol=1e-10)


def run_compiled(backend, options):
    torch.manual_seed(0)
    plain = nn.Sequential(SyncBatchNorm(4, **options), nn.ReLU(), SyncBatchNorm(4, **options))
    network = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own parts
        compiled = torch.compile(network, fullgraph=True, backend=backend)
        for _ in range(2):
            expected, issued = run(plain, draw())
            actual, again = run(compiled, draw())
            assert again == issued
            assert len(issued) == 4
            for one, other in zip(actual, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
            for one, other in zip(network.buffers(), plain.buffers(), strict=True):
                torch.testing.assert_close(one, other)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_the_compiler_sees_one_graph_and_the_same_collectives(options):
    run_on_ranks(run_compiled, 2, "aot_eager", options)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler's CPU backend needs g++")
def test_inductor_compiles_the_layer():
    run_on_ranks(run_compiled, 2, "inductor", {}, timeout_seconds=200)


def run_compiled_function():
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(lambda x: sync_batch_norm(x)[0], fullgraph=True, backend="aot_eager")
        for function in (compiled, lambda x: sync_batch_norm(x)[0]):
            x = draw().requires_grad_()
            with record_collectives() as issued:
                y = function(x)
                y.square().sum().backward()
            results.append(((y.detach(), x.grad), issued))
    torch._dynamo.reset()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    assert results[0][1] == results[1][1]
    assert len(results[0][1]) == 2


def test_the_function_can_be_compiled_too():
    run_on_ranks(run_compiled_function, 2)


def test_blocks_that_are_compiled_one_by_one_share_a_graph():
    """As torch advises for deep networks; it gives up where each block would need a graph of its own."""
    blocks = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3, 3, 1), SyncBatchNorm(3), nn.ReLU()) for _ in range(12))
    )
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own parts
        torch._dynamo.utils.counters.clear()
        blocks(torch.randn(4, 3, 5, 5)).sum().backward()
    # The first block's input needs no gradient; nn.BatchNorm2d takes two as well.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_the_share_may_be_asked_for_after_compiling():
    layer = SyncBatchNorm(3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for wanted in (False, True, False, True):
        layer.track_between_rank_variance = wanted
        compiled(torch.randn(4, 3, 5)).sum().backward()
        assert (layer.between_worker_variance_share is not None) or not wanted
    torch.testing.assert_close(
        layer.between_worker_variance_share, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [2, 64])
def test_the_output_can_be_changed_in_place(samples, memory_format):
    """As in a ResNet, whose ReLU works in place; small and large inputs take different passes."""
    x = torch.randn(samples, 8, 6, 6).to(memory_format=memory_format).requires_grad_()
    y = nn.Sequential(SyncBatchNorm(8), nn.ReLU(inplace=True))(x)
    y.square().sum().backward()
    reference = x.detach().clone().requires_grad_()
    nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())(reference).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)


def test_a_layer_may_be_gone_before_its_gradient_is_taken():
    x = torch.randn(4, 3, requires_grad=True)
    SyncBatchNorm(3)(x).square().sum().backward()
    assert x.grad is not None
