import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn import Moments


def measure_whole(parts):
    return Moments.measure(torch.cat([part.to(torch.float64) for part in parts]))


def assert_same(actual, expected, tolerance):
    assert actual.count == expected.count
    torch.testing.assert_close(actual.mean, expected.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(actual.m2, expected.m2, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4), (6, 3, 4, 5), (6, 3, 4, 5, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_measure_takes_any_shape_and_dtype(shape, dtype):
    x = torch.randn(shape).to(dtype)
    moments = Moments.measure(x)
    variance, mean = torch.var_mean(x.to(torch.float64).transpose(0, 1).flatten(1), 1, correction=0)
    assert moments.count == x.numel() // 3
    assert {moments.count.dtype, moments.mean.dtype, moments.m2.dtype} == {torch.float64}
    torch.testing.assert_close(moments.mean, mean, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(moments.variance, variance, rtol=1e-14, atol=1e-15)


def test_measure_is_stable_far_from_zero():
    # Spread 2^-20 around 2^20: the squares of the values need 80 bits, those of the deviations hardly any.
    x = 2.0**20 + torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64).view(-1, 1) * 2.0**-20
    moments = Moments.measure(x)
    assert moments.mean.item() == 2.0**20
    assert moments.variance.item() == 2.0**-40


def test_measure_carries_no_gradient():
    moments = Moments.measure(torch.randn(4, 3, requires_grad=True))
    assert not any(tensor.requires_grad for tensor in (moments.count, moments.mean, moments.m2))


def test_variances_divide_by_n_and_by_n_minus_one():
    moments = Moments.measure(torch.tensor([[1.0], [2.0], [6.0]]))
    assert moments.variance.item() == pytest.approx(14 / 3)
    assert moments.unbiased_variance.item() == pytest.approx(7)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0)])
def test_an_empty_set_is_zero_and_adds_nothing(shape):
    empty, some = Moments.measure(torch.empty(shape)), Moments.measure(torch.randn(5, 3))
    assert not empty.pack().any()
    assert not torch.cat([empty.variance, empty.unbiased_variance]).any()
    assert_same(Moments.merge([empty, some, empty]), some, 1e-15)
    assert_same(Moments.merge([empty, empty]), empty, 0)


def test_pack_and_unpack_are_inverse():
    moments = Moments.measure(torch.randn(5, 3))
    assert moments.pack().shape == (7,)
    assert_same(Moments.unpack(moments.pack()), moments, 0)


counts = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@settings(max_examples=50)
@given(counts=counts, seed=st.integers(0, 2**32 - 1), shift=st.sampled_from([0.0, 1.0, 100.0]))
def test_merging_parts_gives_the_moments_of_the_whole(counts, seed, shift):
    generator = torch.Generator().manual_seed(seed)
    parts = [shift + torch.randn(count, 3, 2, generator=generator, dtype=torch.float64) for count in counts]
    moments = [Moments.measure(part) for part in parts]
    assert_same(Moments.merge(moments), measure_whole(parts), 1e-13)


def test_merging_loses_nothing_where_sums_of_squares_lose_digits():
    parts = [torch.full((4, 1), 1e8 + rank, dtype=torch.float64) for rank in range(2)]
    assert Moments.merge([Moments.measure(part) for part in parts]).variance.item() == 0.25
