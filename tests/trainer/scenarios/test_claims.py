"""Main claim in one process: synchronised BN needs at most a fifth of the steps.

A sigmoid network reaches 80 % in at least five times fewer steps.
"""

from service.cli.demo import RECIPE
from tests.trainer.factories import train_here
from trainer.jobspec import JobSpec, read_yaml


def best_accuracy(norm, steps):
    content = read_yaml(RECIPE)["presets"]["demo"]["spec"] | {"norm": norm, "steps": steps, "num_workers": 1}
    _, _, curve = train_here(JobSpec.model_validate(content))
    return max(metrics["accuracy"] for metrics in curve.values())


def test_sync_reaches_80_percent_in_a_fifth_of_the_steps():
    assert best_accuracy("sync", 150) >= 0.8
    assert best_accuracy("none", 750) < 0.8
