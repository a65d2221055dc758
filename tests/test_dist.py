"""Runner of gloo ranks that the distributed tests rely on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist import Pool, run_on_ranks

pytestmark = pytest.mark.dist


def sum_of_ranks(offset: float) -> tuple[int, float, int]:
    value = torch.tensor(offset + dist.get_rank())
    dist.all_reduce(value)
    return dist.get_rank(), value.item(), os.getpid()


def fail_on_rank(number: int) -> None:
    if dist.get_rank() == number:
        raise LookupError("nothing there")
    dist.all_reduce(torch.ones(1))


def sleep_on_rank(number: int) -> None:
    if dist.get_rank() == number:
        time.sleep(1000)


def exit_on_rank(number: int) -> None:
    if dist.get_rank() == number:
        os._exit(3)
    dist.all_reduce(torch.ones(1))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_in_the_order_of_the_ranks(world_size):
    results = run_on_ranks(sum_of_ranks, world_size, 0.5)
    total = sum(range(world_size)) + 0.5 * world_size
    assert [(rank, value) for rank, value, _ in results] == [(rank, total) for rank in range(world_size)]


def test_ranks_are_reused():
    first, second = run_on_ranks(sum_of_ranks, 2, 0.0), run_on_ranks(sum_of_ranks, 2, 1.0)
    assert [pid for *_, pid in first] == [pid for *_, pid in second]


def test_the_first_error_is_raised_with_the_traceback_of_its_rank():
    with pytest.raises(LookupError, match="nothing there") as caught:
        run_on_ranks(fail_on_rank, 3, 1)
    assert "on rank 1" in caught.value.__notes__[0]
    assert "in fail_on_rank" in caught.value.__notes__[0]
    assert run_on_ranks(sum_of_ranks, 3, 0.0)[0][1] == 3.0


def test_a_failing_rank_releases_the_others():
    run_on_ranks(sum_of_ranks, 3, 0.0)
    started = time.monotonic()
    with pytest.raises(LookupError):
        run_on_ranks(fail_on_rank, 3, 0)
    assert time.monotonic() - started < 4


def test_ranks_that_hang_or_die_are_reported_and_leave_no_process():
    pool = Pool(outcome_grace_seconds=0.5)
    pids = [pid for *_, pid in pool.run(sum_of_ranks, 2, (0.0,), 30)]
    with pytest.raises(EOFError, match="rank 1 died, exit code 3"):
        pool.run(exit_on_rank, 2, (1,), 30)
    assert not any(map(is_alive, pids))

    pids = [pid for *_, pid in pool.run(sum_of_ranks, 2, (0.0,), 30)]
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2 did not answer within 0.5 seconds"):
        pool.run(sleep_on_rank, 2, (0,), 0.5)
    assert not any(map(is_alive, pids))
