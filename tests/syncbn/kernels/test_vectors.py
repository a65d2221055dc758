"""Vectors by operators of torch: what ranks pack and sum is unpacked as the statistics of all values."""

import pytest
import torch

from syncbn.kernels import vectors
from syncbn.kernels.statistics import HEAD, NEVER, Check, LocalStats

CPU = torch.device("cpu")
EPS = 1e-5


def local_stats(x, are_sums):
    if are_sums:
        return LocalStats(len(x), x.sum(0), x.square().sum(0), are_sums=True)
    if not len(x):
        return LocalStats(0, torch.zeros(3), torch.zeros(3), are_sums=False)
    return LocalStats(len(x), x.mean(0), x.var(0, correction=0), are_sums=False)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("gather", "are_sums"), [(False, True), (False, False), (True, False)])
def test_the_statistics_of_all_ranks(gather, are_sums, share):
    parts = [torch.randn(count, 3, dtype=torch.float64) + count for count in (5, 0, 8)]
    packed = [
        vectors.pack_forward(local_stats(part, are_sums), 3, CPU, 7, gather=gather, share=share)
        for part in parts
    ]
    vector = torch.stack(packed) if gather else torch.stack(packed).sum(0)
    progress = torch.tensor([NEVER, 0])
    found = vectors.unpack_forward(vector, 3, torch.float32, EPS, None, Check(progress, 21, 4), share=share)
    x = torch.cat(parts)
    mean, variance = x.mean(0), x.var(0, correction=0)
    assert found.vector[:HEAD].tolist() == [21, 13]
    torch.testing.assert_close(found.vector[HEAD : HEAD + 6], torch.cat([mean, variance]))
    torch.testing.assert_close(found.rounded, torch.stack([mean, (variance + EPS).rsqrt()]).float())
    assert progress.tolist() == [NEVER, 4]
    if share:
        within = sum(((part - part.mean(0)) ** 2).sum(0) for part in parts if len(part))
        torch.testing.assert_close(found.vector[HEAD + 6 :], within)


def test_no_values_have_no_moments_and_a_constant_channel_no_negative_variance():
    nothing = vectors.pack_forward(
        local_stats(torch.zeros(0, 3), are_sums=True), 3, CPU, 7, gather=False, share=True
    )
    found = vectors.unpack_forward(nothing, 3, None, EPS, None, None, share=True)
    assert (found.vector.tolist(), found.rounded) == ([7.0] + [0.0] * 10, None)
    x = torch.full((7, 3), 0.1, dtype=torch.float64)
    vector = vectors.pack_forward(local_stats(x, are_sums=True), 3, CPU, 7, gather=False, share=False)
    found = vectors.unpack_forward(vector, 3, None, EPS, None, None, share=False)
    assert (found.vector[HEAD + 3 :] >= 0).all()


@pytest.mark.parametrize("accumulator", [torch.float32, torch.float64])
def test_the_gradients_are_those_around_the_exact_mean(accumulator):
    x, dy = torch.randn(2, 9, 3, dtype=torch.float64)
    x += 1e4
    mean, variance = x.mean(0), x.var(0, correction=0)
    inverse = (variance + EPS).rsqrt()
    moments = torch.cat([torch.tensor([1.0, 9.0], dtype=torch.float64), mean, variance])
    rounded = torch.stack([mean, inverse]).to(accumulator)
    sums = dy.sum(0), (dy * (x - rounded[0].double())).sum(0)
    gradients = torch.empty(3, dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    vector = vectors.pack_backward(sums, moments, rounded, EPS, 7, gradients)
    exact = (dy * (x - mean) * inverse).sum(0)
    torch.testing.assert_close(gradients, (exact, dy.sum(0)))
    assert vector[:HEAD].tolist() == [7, 0]
    progress = torch.tensor([NEVER, 0])
    weight = torch.rand(3).to(torch.bfloat16)
    means, converted = vectors.unpack_backward(vector, moments, rounded, EPS, Check(progress, 8, 3), weight)
    torch.testing.assert_close(converted, weight.to(accumulator), rtol=0, atol=0)
    torch.testing.assert_close(
        means, (torch.stack([dy.sum(0), exact / inverse]) / 9).to(accumulator), rtol=1e-6, atol=1e-9
    )
    assert progress.tolist() == [3, 3]


def test_a_rank_without_values_adds_zeros():
    moments = torch.cat([torch.ones(HEAD), torch.zeros(3), torch.ones(3)]).double()
    gradients = torch.ones(3), torch.ones(3)
    vector = vectors.pack_backward(None, moments, torch.ones(2, 3), EPS, 7, gradients)
    assert vector.tolist() == [7.0] + [0.0] * 7
    assert not torch.cat(gradients).any()


def test_the_first_mispaired_call_is_kept():
    progress = torch.tensor([NEVER, 0])
    for call, expected in ((1, 8), (2, 9), (3, 9)):
        vectors.note(torch.tensor([8.0], dtype=torch.float64), Check(progress, expected, call))
    assert progress.tolist() == [2, 3]
