"""Metrics of an evaluation compared with scikit-learn on generated logits and shares of workers."""

from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from torch import nn

from tests.dist import run_on_ranks
from tests.trainer.factories import here
from trainer.data.dataset import Batch
from trainer.errors import DataError
from trainer.jobspec import EvaluationSpec, Metric
from trainer.training.evaluate import Evaluator

CLASSES = 7
ALL = list(get_args(Metric))


class Share:
    """This rank's share of given logits, in batches of 8 over all ranks; the first ranks have more."""

    classes = CLASSES

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self._logits, self._labels, self._worker = logits, labels, here()

    def test(self) -> Iterator[Batch]:
        for logits, labels in zip(self._logits.split(8), self._labels.split(8), strict=True):
            rank, world_size = self._worker.rank, self._worker.world_size
            yield Batch(logits.tensor_split(world_size)[rank], labels.tensor_split(world_size)[rank])


def evaluate(logits, labels, metrics=ALL):
    """Evaluate a model that returns its input."""
    return dict(
        Evaluator(EvaluationSpec(metrics=metrics), nn.Identity(), Share(logits, labels), here()).evaluate(0)
    )


def make_case(seed, samples, scale, present, ties, shift):
    """Return logits and labels; `present` lists classes with samples, `ties` rounds logits."""
    random = np.random.default_rng(seed)
    labels = random.choice(present, samples)
    logits = random.normal(size=(samples, CLASSES)) + 0.7 * np.eye(CLASSES)[labels]
    logits = (np.round(logits) if ties else logits) * scale + shift
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels)


def calibration_error(probabilities, labels):
    """Compute the expected calibration error with 15 bins (Guo et al. 2017, equation 3).

    scikit-learn does not have it.
    """
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.digitize(confidence, np.arange(1, 15) / 15)
    return sum(
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins)
    )


def expect(logits, labels):
    log_probabilities, probabilities = (
        logits.double().log_softmax(1).numpy(),
        logits.double().softmax(1).numpy(),
    )
    labels, chosen, present = labels.numpy(), logits.argmax(1).numpy(), np.unique(labels)
    areas = [reference.roc_auc_score(labels == label, log_probabilities[:, label]) for label in present]
    every = list(range(CLASSES))
    return {
        "accuracy": reference.accuracy_score(labels, chosen),
        "top5_accuracy": reference.top_k_accuracy_score(labels, logits.numpy(), k=5, labels=every),
        # balanced_accuracy_score warns about predicted classes without samples, which many cases have.
        "balanced_accuracy": reference.recall_score(labels, chosen, labels=present, average="macro"),
        "f1": reference.f1_score(labels, chosen, average="macro", zero_division=0),
        "precision": reference.precision_score(labels, chosen, average="macro", zero_division=0),
        "recall": reference.recall_score(labels, chosen, average="macro", zero_division=0),
        "auroc": np.mean(areas),
        "calibration_error": calibration_error(probabilities, labels),
        "test_loss": -log_probabilities[
            np.arange(len(labels)), labels
        ].mean(),  # log_loss clips probabilities
    }


CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "samples": st.integers(8, 70),
    "scale": st.sampled_from([0.01, 1.0, 40.0, 400.0]),
    "present": st.lists(st.integers(0, CLASSES - 1), min_size=2, unique=True),
    "ties": st.booleans(),
    "shift": st.sampled_from([0.0, 0.5]),
}
CONFIDENT = {"seed": 1, "samples": 64, "scale": 40.0, "present": [0, 1, 2, 4], "ties": False, "shift": 0.0}
IN_UNIT_INTERVAL = CONFIDENT | {"scale": 0.01, "shift": 0.5}
"""Logits with the range of probabilities."""


@given(**CASES)
@settings(max_examples=60)
@example(**CONFIDENT)
@example(**IN_UNIT_INTERVAL)
@example(**CONFIDENT | {"ties": True, "scale": 1.0})
def test_metrics_equal_those_of_scikit_learn(seed, samples, scale, present, ties, shift):
    logits, labels = make_case(seed, samples, scale, present, ties, shift)
    if len(labels.unique()) > 1:
        assert evaluate(logits, labels) == pytest.approx(expect(logits, labels), abs=2e-6, rel=1e-6)


def evaluate_cases(cases):
    return [evaluate(*make_case(**case)) for case in cases]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 3])
def test_metrics_do_not_depend_on_how_samples_are_shared(world_size):
    """A last batch of one sample leaves the other ranks empty; a single sample, all batches."""
    cases = [
        CONFIDENT | {"samples": 65},
        IN_UNIT_INTERVAL | {"samples": 17},
        CONFIDENT | {"ties": True, "scale": 1.0, "samples": 41},
        CONFIDENT | {"samples": 2, "present": [2, 3], "seed": 1},
    ]
    _, labels = make_case(**cases[-1])
    assert len(labels.unique()) == 2
    alone = evaluate_cases(cases)
    for values in run_on_ranks(evaluate_cases, world_size, cases):
        for case, one, expected in zip(cases, values, alone, strict=True):
            assert one == pytest.approx(expected, abs=2e-6, rel=1e-6), case


def test_one_class_has_no_roc_curve_and_the_other_metrics_are_defined():
    logits, labels = make_case(0, 20, 1.0, [3], ties=False, shift=0.0)
    values = evaluate(logits, labels, [name for name in ALL if name != "auroc"])
    assert values["balanced_accuracy"] == pytest.approx(values["accuracy"], abs=2e-6)
    with pytest.raises(
        DataError, match=r"evaluation\.metrics: must not contain auroc if all test samples are of one class"
    ):
        evaluate(logits, labels)


def test_classes_without_test_samples_are_reported_once(capsys):
    logits, labels = make_case(**CONFIDENT)
    evaluator = Evaluator(EvaluationSpec(metrics=["auroc"]), nn.Identity(), Share(logits, labels), here())
    for step in range(2):
        list(evaluator.evaluate(step))
    assert capsys.readouterr().out == (
        "warning: 3 of 7 classes have no test samples (3, 5, 6); "
        "balanced_accuracy and auroc are means over the other classes\n"
    )
    assert evaluator.absent_classes == [3, 5, 6]
