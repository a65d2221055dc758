from typing import get_args

from tests.trainer.factories import make_spec, run_here
from trainer.jobspec import DIRECTIONS, Metric, metric_direction
from trainer.training.metrics import build_metric


def test_directions_of_metrics_are_those_of_torchmetrics():
    for name in set(get_args(Metric)) - {"accuracy"}:
        assert (metric_direction(name) == "max") == build_metric(name, 10).higher_is_better, name


def test_every_logged_metric_but_the_learning_rate_has_a_direction():
    _, notes = run_here(make_spec(evaluation={"metrics": list(get_args(Metric))}))
    assert notes.metrics[20].keys() == DIRECTIONS.keys() | {"learning_rate"}
