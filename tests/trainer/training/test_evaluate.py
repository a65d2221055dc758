from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from tests.dist import run_on_ranks
from tests.trainer.factories import here, make_spec, run_here
from trainer.data import open_dataset
from trainer.errors import ConfigurationError
from trainer.jobspec import EvaluationSpec, Metric, MlpSpec, Norm
from trainer.models import build_model
from trainer.training.evaluate import Evaluator


def measure(spec, train_steps=0):
    """Evaluate a model by the spec on this rank's test data; return the metrics and the buffers."""
    worker = here()
    dataset = open_dataset(spec, worker.rank, worker.world_size, worker.device, torch.float64)
    model = build_model(spec.model, spec.norm, dataset.shape, dataset.classes, spec.seed).double()
    with torch.no_grad():
        for _, [batch] in zip(range(train_steps), dataset.train(0), strict=False):
            model(batch.inputs)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    random = torch.get_rng_state()
    values = dict(Evaluator(spec.evaluation, model, dataset, worker).evaluate(0))
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    return values


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_metrics_are_those_of_all_test_samples(world_size):
    """360 samples by 50 over three workers: no batch divides evenly, and the last one is smaller."""
    spec = make_spec(
        evaluation=EvaluationSpec(metrics=list(get_args(Metric)), batch_size=50), num_workers=world_size
    )
    results = run_on_ranks(measure, world_size, spec) if world_size > 1 else [measure(spec)]
    dataset = open_dataset(make_spec(), 0, 1, torch.device("cpu"), torch.float64)
    model = build_model(MlpSpec(hidden=[16, 16], init_std=0.3), Norm.SYNC, (1, 8, 8), 10, 0).double().eval()
    [batch] = dataset.test()
    logits, labels = model(batch.inputs).detach(), batch.labels.numpy()
    shares, chosen = logits.softmax(1).numpy(), logits.argmax(1).numpy()
    expected = {
        "accuracy": reference.accuracy_score(labels, chosen),
        "top5_accuracy": reference.top_k_accuracy_score(labels, shares, k=5),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, chosen),
        "f1": reference.f1_score(labels, chosen, average="macro", zero_division=0),
        "precision": reference.precision_score(labels, chosen, average="macro", zero_division=0),
        "recall": reference.recall_score(labels, chosen, average="macro"),
        "test_loss": reference.log_loss(labels, shares, labels=np.arange(10)),
    }
    for values in results:
        assert values == results[0]
        for name, value in expected.items():
            assert values[name] == pytest.approx(value, abs=2e-6), name
        assert values["auroc"] == pytest.approx(
            reference.roc_auc_score(labels, shares, multi_class="ovr"), abs=2e-6
        )
        assert 0 <= values["calibration_error"] <= 1


@pytest.mark.dist
@pytest.mark.parametrize("statistics", ["moving", "precise", "batch"])
def test_under_sync_all_statistics_equal_those_of_one_process(statistics):
    evaluation = EvaluationSpec(statistics=statistics, precise_batches=5, batch_size=50)
    alone = measure(make_spec(evaluation=evaluation), 4)
    for values in run_on_ranks(measure, 3, make_spec(evaluation=evaluation, num_workers=3), 4):
        assert values == pytest.approx(alone, abs=1e-9)


@pytest.mark.dist
@pytest.mark.parametrize("statistics", ["moving", "precise", "batch"])
def test_per_worker_statistics_are_made_equal_for_evaluation(statistics):
    evaluation = EvaluationSpec(statistics=statistics, precise_batches=5, batch_size=50)
    first, second = run_on_ranks(measure, 2, make_spec(norm="batch", evaluation=evaluation, num_workers=2), 4)
    assert first == second


def test_precise_statistics_are_algorithm_2():
    """Means of batch means and unbiased batch variances over the next batches, computed separately."""
    spec = make_spec(norm="batch", model=MlpSpec(hidden=[8], init_std=0.3))
    dataset = open_dataset(spec, 0, 1, torch.device("cpu"), torch.float64)
    model = build_model(spec.model, spec.norm, dataset.shape, dataset.classes, 0).double()
    evaluator = Evaluator(EvaluationSpec(statistics="precise", precise_batches=6), model, dataset, here())
    seen = {}

    def look(module, *_):
        if not module.training:
            seen["mean"], seen["var"] = module.running_mean.clone(), module.running_var.clone()

    model.norm1.register_forward_hook(look)
    dict(evaluator.evaluate(3))
    batches = [
        model.linear1(batch.inputs.flatten(1)).detach()
        for _, [batch] in zip(range(6), dataset.train(3), strict=False)
    ]
    mean = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    variance = torch.stack([batch.var(0, correction=1) for batch in batches]).mean(0)
    assert (seen["mean"] - mean).abs().max() < 1e-12
    assert (seen["var"] - variance).abs().max() < 1e-12


def test_kinds_of_statistics_differ_where_batches_are_small():
    losses = {
        statistics: run_here(make_spec(global_batch_size=4, evaluation={"statistics": statistics}))[
            0
        ].metrics["test_loss"]
        for statistics in ("moving", "precise", "batch")
    }
    assert len(set(losses.values())) == 3


def test_weights_do_not_depend_on_the_evaluation():
    def weights(**evaluation):
        result, _ = run_here(
            make_spec(norm="batch", model=MlpSpec(hidden=[8], dropout=0.5), evaluation=evaluation)
        )
        return result.model.state_dict()

    plain = weights()
    for statistics in ("precise", "batch"):
        other = weights(statistics=statistics)
        assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.parametrize("norm", ["sync", "batch"])
def test_a_last_test_batch_of_one_sample_uses_moving_statistics(norm):
    metrics = measure(make_spec(norm=norm, evaluation=EvaluationSpec(statistics="batch", batch_size=359)))
    assert 0 <= metrics["accuracy"] <= 1


@pytest.mark.dist
@pytest.mark.parametrize("batch_size", [7, 17, 51, 119])
def test_groups_of_workers_use_statistics_of_their_part_of_a_test_batch(batch_size):
    """If the last batch leaves a group one sample or none, it uses moving statistics or is skipped."""
    evaluation = EvaluationSpec(metrics=["accuracy", "f1"], statistics="batch", batch_size=batch_size)
    spec = make_spec(num_workers=4, sync_group_size=2, evaluation=evaluation)
    results = run_on_ranks(train_and_measure, 4, spec)
    assert all(result == results[0] for result in results)
    assert 0 <= results[0]["accuracy"] <= 1


def train_and_measure(spec):
    return run_here(spec)[0].metrics


def test_top_5_with_few_classes_is_rejected():
    evaluation = EvaluationSpec(metrics=["top5_accuracy"])
    with pytest.raises(
        ConfigurationError, match="must not contain top5_accuracy with 5 classes or fewer; there are 5"
    ):
        Evaluator(evaluation, torch.nn.Linear(1, 5), SimpleNamespace(classes=5), here())


def test_a_model_without_batch_normalisation_has_no_statistics():
    values = [
        measure(make_spec(norm="group", evaluation=EvaluationSpec(statistics=statistics)))
        for statistics in ("moving", "precise", "batch")
    ]
    assert values[0] == values[1] == values[2]
