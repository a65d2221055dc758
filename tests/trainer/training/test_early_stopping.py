import pytest

from trainer.checkpoint.state import TrainProgress
from trainer.jobspec import CheckpointSpec, EarlyStopSpec
from trainer.training.early_stopping import should_stop, update, update_best


def stops(spec, metric, values):
    """Return the evaluation at which a run stops, or None."""
    progress = TrainProgress()
    for number, value in enumerate(values):
        progress.metrics = {metric: value}
        update(spec, progress)
        if should_stop(spec, progress):
            return number
    return None


@pytest.mark.parametrize(
    ("metric", "changes", "values", "stop"),
    [
        ("accuracy", {"patience": 2}, [0.1, 0.2, 0.2, 0.2], 3),
        ("accuracy", {"patience": 2}, [0.1, 0.2, 0.2, 0.3, 0.3, 0.2], 5),
        ("accuracy", {"patience": 2, "min_delta": 0.05}, [0.5, 0.54, 0.545], 2),
        ("accuracy", {"patience": 9, "target": 0.5}, [0.1, 0.5], 1),
        ("test_loss", {"patience": 1}, [2.0, 1.0, 1.5], 2),
        ("test_loss", {"patience": 9, "target": 0.5}, [2.0, 0.4], 1),
        ("accuracy", {"patience": 5}, [0.1, 0.1], None),
    ],
)
def test_a_run_stops_at_its_target_or_without_improvement(metric, changes, values, stop):
    assert stops(EarlyStopSpec(metric=metric, **changes), metric, values) == stop


def test_without_a_criterion_nothing_stops():
    assert stops(None, "accuracy", [0.1] * 10) is None


def test_only_an_improvement_of_a_trained_model_is_the_best():
    spec, progress = CheckpointSpec(keep_best="accuracy"), TrainProgress()
    found = []
    for step, value in enumerate([0.9, 0.1, 0.1, 0.2]):
        progress.step, progress.metrics = step, {"accuracy": value}
        found.append(update_best(spec, progress))
    assert found == [False, True, False, True]
    assert not update_best(CheckpointSpec(), progress)
