"""The main claim, in one process: a sigmoid network reaches 80 % in at least five times fewer steps with synchronised BN."""

import torch

from service.cli.demo import RECIPE
from tests.trainer.test_loop import Notes
from trainer.loop import Worker, train
from trainer.spec import JobSpec, read_yaml


def best_accuracy(norm, steps):
    content = read_yaml(RECIPE)["spec"] | {"norm": norm, "steps": steps, "num_workers": 1}
    notes = Notes()
    train(JobSpec.model_validate(content), Worker(0, 1, torch.device("cpu")), notes)
    return max(metrics["accuracy"] for metrics in notes.metrics.values())


def test_with_sync_200_steps_do_what_1000_do_not_without():
    assert best_accuracy("sync", 200) >= 0.8
    assert best_accuracy("none", 1_000) < 0.8
