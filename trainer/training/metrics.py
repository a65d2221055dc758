"""Evaluation metrics with the definitions of scikit-learn.

Importing this module imports torchmetrics, which takes seconds.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, classification
from torchmetrics.utilities import dim_zero_cat


def build_metric(name: str, classes: int) -> Any:
    """Build a metric that is updated with logits (n, classes) and labels (n,)."""
    match name:
        case "top5_accuracy":
            return Top5Accuracy()
        case "balanced_accuracy":
            return BalancedAccuracy(classes, average=None, validate_args=False)
        case "f1":
            return classification.MulticlassF1Score(classes, average="macro", validate_args=False)
        case "precision":
            return classification.MulticlassPrecision(classes, average="macro", validate_args=False)
        case "recall":
            return classification.MulticlassRecall(classes, average="macro", validate_args=False)
        case "auroc":
            return Auroc(classes)
        case "calibration_error":
            return CalibrationError()
    raise AssertionError(f"no metric {name!r}")


class Top5Accuracy(Metric):
    """Share of samples whose label is among the five largest logits.

    Among equal logits, higher class numbers rank first.
    """

    higher_is_better = True
    hits: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        own = logits.gather(1, labels[:, None])  # (n, 1)
        is_higher_class = torch.arange(logits.shape[1], device=logits.device) > labels[:, None]
        ahead = (logits > own) | ((logits == own) & is_higher_class)  # (n, classes)
        self.hits += (ahead.sum(1) < 5).sum()
        self.samples += len(labels)

    def compute(self) -> Tensor:
        """Return the share over all batches and workers."""
        return self.hits.double() / self.samples


class BalancedAccuracy(classification.MulticlassRecall):
    """Mean recall over the classes that have test samples.

    torchmetrics would count a class that is only predicted as recall 0.
    """

    def compute(self) -> Tensor:
        """Return the mean over all batches and workers."""
        recalls: Tensor = super().compute()  # (classes,)
        hits, _, _, misses = self._final_state()
        return recalls[hits + misses > 0].mean()


class CalibrationError(Metric):
    """Expected calibration error.

    The mean of |accuracy - confidence| over bins, weighted by their numbers of samples (Guo et al. 2017).
    torchmetrics puts a confidence of 1 into a separate bin, and takes logits that are all in [0, 1] for
    probabilities.
    """

    higher_is_better = False
    BINS = 15
    gaps: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("gaps", torch.zeros(self.BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        confidences, chosen = logits.double().softmax(1).max(1)  # (n,) float64, (n,) int64
        bins = (confidences * self.BINS).long().clamp(max=self.BINS - 1)
        self.gaps.index_add_(0, bins, (chosen == labels).double() - confidences)
        self.samples += len(labels)

    def compute(self) -> Tensor:
        """Return the error over all batches and workers."""
        return self.gaps.abs().sum() / self.samples


class Auroc(Metric):
    """Mean over classes of the area under the one-against-rest ROC curve.

    Exact: the share of pairs of a sample of the class and a sample of another class that the float64
    log-probability of the class orders correctly; ties count half. Classes without samples are left out. Each
    worker stores the log-probabilities of all test samples: 8 bytes per sample and class.
    """

    higher_is_better = True
    rows: list[Tensor]

    def __init__(self, classes: int) -> None:
        super().__init__()
        self._classes = classes
        self.add_state("rows", [], dist_reduce_fx="cat")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the flat, empty state that is gathered from a rank without samples."""
        return torch.float64

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        # Log-probabilities keep their order where small probabilities underflow.
        scores = logits.double().log_softmax(1)  # (n, classes) float64
        self.rows.append(torch.cat([scores, labels[:, None]], 1).flatten())

    def compute(self) -> Tensor:
        """Return the mean over the classes that are defined; NaN if there are none.

        A class is defined if some, but not all samples have it.
        """
        rows = dim_zero_cat(self.rows).view(-1, self._classes + 1)
        scores, labels = rows[:, :-1], rows[:, -1].long()
        areas = []
        for label in sorted(set(labels.tolist())):
            is_label = labels == label
            # Pairs that are ordered correctly, counted by binary search; left and right halve the ties.
            inside, outside = scores[is_label, label], scores[~is_label, label].sort().values
            below = torch.searchsorted(outside, inside) + torch.searchsorted(outside, inside, right=True)
            areas.append(below.double().mean() / (2 * len(outside)))
        return torch.stack(areas).nanmean()
