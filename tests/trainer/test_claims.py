"""The main claim, in one process: a sigmoid network reaches 80 % in at least five times fewer steps with synchronised BN."""

from service.cli.demo import RECIPE
from tests.trainer.factories import train_here
from trainer.jobspec import JobSpec, read_yaml


def best_accuracy(norm, steps):
    content = read_yaml(RECIPE)["presets"]["demo"]["spec"] | {"norm": norm, "steps": steps, "num_workers": 1}
    _, _, curve = train_here(JobSpec.model_validate(content))
    return max(metrics["accuracy"] for metrics in curve.values())


def test_with_sync_150_steps_do_what_750_do_not_without():
    assert best_accuracy("sync", 150) >= 0.8
    assert best_accuracy("none", 750) < 0.8
