import torch

from tests.dist import run_on_ranks
from trainer.distributed import RankInfo


def results(worker):
    values = torch.tensor([1.0 + worker.rank, 2.0])
    started = torch.tensor([10.0 * worker.rank])
    pending = worker.start_all_reduce(started)
    if pending is not None:
        pending.wait()
    shared = torch.tensor([float(worker.rank)])
    worker.broadcast(shared)
    group = worker.new_gloo_group(30)
    return (
        worker.all_reduce(values.clone()).tolist(),
        started.tolist(),
        shared.tolist(),
        [tensor.tolist() for tensor in worker.all_gather(values)],
        worker.all_gather_object({"rank": worker.rank}, group),
    )


def on_this_rank():
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return results(RankInfo(rank, size, torch.device("cpu")))


def test_collectives_of_one_worker_return_their_input():
    assert results(RankInfo(0, 1, torch.device("cpu"))) == (
        [1.0, 2.0],
        [0.0],
        [0.0],
        [[1.0, 2.0]],
        [{"rank": 0}],
    )


def test_collectives_of_two_workers_have_equal_results():
    expected = ([3.0, 4.0], [10.0], [0.0], [[1.0, 2.0], [2.0, 2.0]], [{"rank": 0}, {"rank": 1}])
    assert run_on_ranks(on_this_rank, 2) == [expected, expected]
