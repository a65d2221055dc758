"""Triton's kernels in its interpreter, bit for bit against the formulas in float64, and compiled for GPUs."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from syncbn.kernels.statistics import HEAD, NEVER, Check, LocalStats, RunningStats
from tests.syncbn.emulated_cuda import interpreted_triton

CPU = torch.device("cpu")
CHANNELS = [7, 300]
EPS = 1e-5


@pytest.fixture(scope="module")
def kernels():
    with interpreted_triton() as module:
        yield module


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def root(values):
    """Return the square root of each value, rounded as IEEE 754 demands, which vectorised ones are not."""
    return torch.from_numpy(np.sqrt(values.numpy()))


def inverse_root(values):
    return torch.from_numpy(1 / np.sqrt(values.numpy()))


def rounded_to(values, dtype):
    """Round to half precision by way of float32, as Triton does."""
    return values.to(torch.promote_types(dtype, torch.float32)).to(dtype)


def assert_same_bits(actual, expected):
    """Compare bits; zeros may differ in their sign."""
    assert actual.dtype == expected.dtype
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert torch.equal((actual + 0.0).view(bits), (expected + 0.0).view(bits))


@pytest.mark.parametrize("count", [0, 1, 12, 3_000_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("gather", "share"), [(False, False), (False, True), (True, False), (True, True)])
def test_pack_forward(kernels, channels, dtype, count, gather, share):
    mean, variance = (
        draw(channels, dtype=dtype) * (count > 0),
        draw(channels, seed=1, dtype=dtype).abs() * (count > 0),
    )
    local = LocalStats(count, mean, variance, are_sums=False)
    vector = kernels.pack_forward(local, channels, CPU, (1 << 39) + 5, gather=gather, share=share)
    m, v = mean.double(), variance.double()
    body = [m, v * count] if gather else [m * count, (v + m * m) * count]
    if share and not gather:
        body.append(v * count)
    head = torch.tensor([(1 << 39) + 5, count], dtype=torch.float64)
    assert_same_bits(vector, torch.cat([head, *body]))


def unpacked(vector, channels):
    """Return count, mean, variance and Σᵢ M2ᵢ by the formulas."""
    if vector.dim() == 1:
        n, total, squares = vector[1], *vector[HEAD:].split(channels)[:2]
        mean = total / n.clamp(min=1)
        variance = squares / n.clamp(min=1) - mean * mean
        return n, mean, torch.where(variance < 0, 0.0, variance), vector[HEAD + 2 * channels :]
    n = mean = within = between = torch.zeros((), dtype=torch.float64)
    for row in vector:
        n = n + row[1]
        mean = mean + row[1] * row[HEAD : HEAD + channels]
    mean = mean / n.clamp(min=1)
    for row in vector:
        distance = row[HEAD : HEAD + channels] - mean
        between = between + row[1] * (distance * distance)
        within = within + row[HEAD + channels :]
    return n, mean, (within + between) / n.clamp(min=1), within


def make_vector(channels, count, ranks, share):
    """Draw a summed vector, or vectors of several ranks of which the last has no values."""
    if ranks == 0:
        body = [draw(channels) * count, (draw(channels) ** 2 + draw(channels, seed=1).abs()) * count]
        body = [*body, draw(channels, seed=2).abs() * count] if share else body
        return torch.cat([torch.tensor([1e11, count], dtype=torch.float64), *body])
    counts = [count] * (ranks - 1) + [0]
    return torch.stack(
        [
            torch.cat(
                [
                    torch.tensor([1e11, n], dtype=torch.float64),
                    draw(channels, seed=rank) * (n > 0),
                    draw(channels, seed=9 + rank).abs() * n,
                ]
            )
            for rank, n in enumerate(counts)
        ]
    )


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None, "untracked"])
@pytest.mark.parametrize("count", [0, 1, 40])
@pytest.mark.parametrize("ranks", [0, 3])
@pytest.mark.parametrize("channels", CHANNELS)
def test_unpack_forward(kernels, channels, ranks, count, momentum, share):
    vector = make_vector(channels, count, ranks, share)
    n, mean, variance, within = unpacked(vector, channels)
    running, before = None, None
    if momentum != "untracked":
        before = [
            draw(channels, seed=3, dtype=torch.float32),
            draw(channels, seed=4, dtype=torch.float32).abs(),
        ]
        running = RunningStats(*(tensor.clone() for tensor in before), torch.tensor(3), momentum)
    progress = torch.tensor([NEVER, 0])
    stamps = vector.view(-1, vector.shape[-1])[:, 0].sum()
    found = kernels.unpack_forward(
        vector, channels, torch.float32, EPS, running, Check(progress, int(stamps), 7), share=share
    )
    expected = [stamps.view(1), n.view(1), mean, variance, *([within] if share else [])]
    assert_same_bits(found.vector, torch.cat(expected))
    assert_same_bits(found.rounded, torch.stack([mean, inverse_root(variance + EPS)]).float())
    assert progress.tolist() == [NEVER, 7]
    if running is not None:
        weight = (1 / 4 if momentum is None else 0.1) * float(n > 1)
        unbiased = variance * (n / (n - 1).clamp(min=1))
        for buffer, old, new in zip((running.mean, running.variance), before, (mean, unbiased), strict=True):
            assert_same_bits(buffer, (old.double() + weight * (new - old.double())).float())
        assert running.batches == 3 + int(n > 1)


@pytest.mark.parametrize("has_values", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("channels", CHANNELS)
def test_backward(kernels, channels, dtype, has_values):
    accumulator = torch.promote_types(dtype, torch.float32)
    mean, variance, n = draw(channels), draw(channels, seed=1).abs(), 40.0
    moments = torch.cat([torch.tensor([1.0, n], dtype=torch.float64), mean, variance])
    rounded = torch.stack([mean, (variance + EPS).rsqrt()]).to(accumulator)
    total, product = draw(channels, seed=2, dtype=accumulator), draw(channels, seed=3, dtype=accumulator)
    gradients = torch.empty(channels, dtype=dtype), torch.empty(channels, dtype=dtype)
    vector = kernels.pack_backward(
        (total, product) if has_values else None, moments, rounded, EPS, (1 << 39) + 1, gradients
    )
    s = total.double() * has_values
    centre = rounded[0].double()
    d = (product.double() - total.double() * (mean - centre)) * inverse_root(variance + EPS) * has_values
    assert_same_bits(
        vector, torch.cat([torch.tensor([(1 << 39) + 1, 0.0], dtype=torch.float64), s + 0.0, d + 0.0])
    )
    assert_same_bits(gradients[0], rounded_to(d, dtype))
    assert_same_bits(gradients[1], rounded_to(s, dtype))
    progress = torch.tensor([NEVER, 0])
    weight = draw(channels, seed=4, dtype=dtype)
    means, converted = kernels.unpack_backward(vector, moments, rounded, EPS, Check(progress, 5, 7), weight)
    assert_same_bits(converted, weight.to(accumulator))
    assert_same_bits(means, torch.stack([s / n, d / n * root(variance + EPS)]).to(accumulator))
    assert progress.tolist() == [7, 7]  # its stamp is another one


def test_gradients_in_bfloat16(kernels):
    """The interpreter truncates where a GPU rounds, so that a unit in the last place is allowed."""
    moments = torch.cat([torch.ones(2), torch.zeros(50), torch.ones(50)]).double()
    sums = draw(50, dtype=torch.float32), draw(50, seed=1, dtype=torch.float32)
    gradients = torch.empty(50, dtype=torch.bfloat16), torch.empty(50, dtype=torch.bfloat16)
    kernels.pack_backward(sums, moments, moments[2:].view(2, 50).float(), EPS, 1 << 39, gradients)
    torch.testing.assert_close(gradients[0].float(), sums[1] / (1 + EPS) ** 0.5, rtol=2**-7, atol=0)
    torch.testing.assert_close(gradients[1].float(), sums[0], rtol=2**-7, atol=0)


def test_the_first_mispaired_call_and_the_newest_one_are_noted(kernels):
    progress = torch.tensor([NEVER, 0])
    moments = torch.cat([torch.ones(2), torch.zeros(1), torch.ones(1)]).double()
    rounded = torch.zeros(2, 1)
    for call, expected in ((1, 8), (2, 9), (3, 8), (4, 9)):
        vector = torch.tensor([8.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        kernels.unpack_backward(vector, moments, rounded, EPS, Check(progress, expected, call), None)
    assert progress.tolist() == [2, 4]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernels_compile_for_a_gpu(capability):
    """Triton has the assembler; no GPU is needed."""
    command = [sys.executable, "-m", "tests.syncbn.kernels.compile_kernels", str(capability)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 16
    for line in lines:
        name, *flags, barriers, size = line.split()
        assert int(size) > 1000, name
        assert int(barriers) > 0 or flags != ["TRACK"]  # between reading and writing the counter


def test_the_package_is_imported_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import syncbn; "
        "assert 'syncbn.kernels.triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], timeout=100, check=True)
