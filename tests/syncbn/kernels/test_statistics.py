import torch

from syncbn.kernels.statistics import (
    FAR,
    BatchStats,
    LocalStats,
    RunningStats,
    at_least_one,
    far_channels,
    new_vector,
)


def stats(within=(), first=1.0):
    numbers = [first, 12.0, 0.0, 100.0, 3.0, 1.0, 1.0, 1.0, *within]
    return BatchStats.of(torch.tensor(numbers, dtype=torch.float64), 3, 1e-5, count=12.0)


def test_statistics_are_views_of_their_vector():
    found = stats()
    assert (found.count, found.within_rank_m2, bool(found.is_new)) == (12.0, None, True)
    assert (found.mean.tolist(), found.variance.tolist()) == ([0.0, 100.0, 3.0], [1.0, 1.0, 1.0])
    assert stats([1.0, 2.0, 3.0]).within_rank_m2.tolist() == [1.0, 2.0, 3.0]
    assert not stats(first=0.0).is_new
    unread = BatchStats.of(found.vector, 3, 1e-5)
    assert isinstance(unread.count, torch.Tensor)


def test_local_statistics_are_compared_per_value():
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    sums = LocalStats(2, x.sum(0), x.square().sum(0), are_sums=True)
    assert sums.per_value().tolist() == [[2.0, 4.0], [5.0, 20.0]]
    moments = LocalStats(2, x.mean(0), x.var(0, correction=0), are_sums=False)
    assert moments.per_value().tolist() == [[2.0, 4.0], [1.0, 4.0]]


def make_running(momentum):
    batches = torch.tensor(3)
    return RunningStats(torch.zeros(3), torch.ones(3), batches, momentum)


def test_running_statistics_have_the_unbiased_variance_and_a_weight():
    for read in (True, False):
        for momentum, weight in ((0.25, 0.25), (None, 1 / 4)):
            running, found = make_running(momentum), stats()
            statistics = BatchStats.of(found.vector, 3, 1e-5, count=12.0 if read else None)
            running.update(statistics, True if read else torch.tensor(True))
            torch.testing.assert_close(running.mean, weight * found.mean.float())
            torch.testing.assert_close(running.variance, torch.full((3,), 1 - weight + weight * 12 / 11))
            assert running.batches == 4


def test_a_batch_without_values_changes_no_running_statistics():
    for momentum in (0.1, None):
        for has_values in (False, torch.tensor(False)):
            running = make_running(momentum)
            running.update(BatchStats.of(stats().vector * 0, 3, 1e-5), has_values)
            assert [tensor.tolist() for tensor in running.buffers] == [[0.0] * 3, [1.0] * 3, 3]


def test_a_new_vector_has_two_numbers_and_two_or_three_per_channel():
    sizes = [new_vector(5, torch.device("cpu"), share).numel() for share in (False, True)]
    assert sizes == [12, 17]


def test_channels_far_from_zero_are_ill_conditioned():
    assert stats().ill_conditioned_channels.tolist() == [1]
    assert stats().select(torch.tensor([0, 2])).ill_conditioned_channels is None
    one = torch.ones(1, dtype=torch.float64)
    assert far_channels(one * (FAR - 0.01), one, 0.0) is None
    assert far_channels(one * (FAR + 0.01), one, 0.0).tolist() == [0]


def test_a_nan_is_not_selected():
    mean = torch.tensor([float("nan"), 100.0], dtype=torch.float64)
    assert far_channels(mean, torch.ones(2, dtype=torch.float64), 0.0).tolist() == [1]
    assert far_channels(mean[:1], torch.ones(1, dtype=torch.float64), 0.0) is None


def test_a_count_to_divide_by_is_not_0():
    assert at_least_one(0.0) == 1.0
    assert at_least_one(torch.tensor([0.0, 5.0])).tolist() == [1.0, 5.0]
