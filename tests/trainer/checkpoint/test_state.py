import random

import numpy as np
import torch

from trainer.checkpoint.state import TrainProgress, seed_everything
from trainer.distributed import RankInfo


def numbers(rank, seed, step=0):
    seed_everything(RankInfo(rank, 2, torch.device("cpu")), seed, step)
    return torch.rand(1).item(), np.random.rand(), random.random()


def test_every_generator_is_seeded_by_seed_rank_and_step():
    assert numbers(0, 1) == numbers(0, 1)
    for other in (numbers(1, 1), numbers(0, 2), numbers(0, 1, step=3)):
        assert all(a != b for a, b in zip(numbers(0, 1), other, strict=True))


def test_progress_of_earlier_checkpoints_is_read():
    progress = TrainProgress()
    progress.load_state_dict({"step": 8, "evaluated": 6, "stale": 2, "schedule_end": 10})
    assert progress == TrainProgress(step=8, last_eval_step=6, evals_since_best=2, schedule_end=10)
