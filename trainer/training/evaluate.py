"""Evaluation over all workers; each test sample counts once."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from syncbn import SyncBatchNorm, update_population_statistics
from trainer.data import Dataset
from trainer.distributed import RankInfo
from trainer.errors import ConfigurationError, DataError
from trainer.jobspec import EvaluationSpec


class Evaluator:
    """Evaluator of a model on the test samples of a dataset."""

    def __init__(self, spec: EvaluationSpec, model: nn.Module, dataset: Dataset, worker: RankInfo) -> None:
        if "top5_accuracy" in spec.metrics and dataset.classes <= 5:
            rule = f"must not contain top5_accuracy with 5 classes or fewer; there are {dataset.classes}"
            raise ConfigurationError("evaluation.metrics", spec.metrics, rule)
        self._spec, self._model, self._dataset, self._worker = spec, model, dataset, worker
        others = [name for name in spec.metrics if name != "accuracy"]
        self._metrics: dict[str, Any] = {}
        if others:
            # Imported here: it takes seconds, and is not needed for accuracy.
            from trainer.training.metrics import build_metric

            self._metrics = {name: build_metric(name, dataset.classes).to(worker.device) for name in others}
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.statistics: dict[str, Tensor] = {}
        """Running statistics of the newest evaluation by buffer name, if they are not the model's own
        (`precise`).
        """
        self.absent_classes: list[int] | None = None
        """Classes without test samples; None before the first evaluation."""

    @torch.no_grad()
    def evaluate(self, step: int) -> Iterator[tuple[str, float]]:
        """Yield (name, value) of each metric, and of `test_loss`, equal on every worker.

        `test_loss` is the mean cross-entropy in nats. Weights, buffers, module modes and random states are
        restored afterwards. `step` is the number of completed steps: `precise` uses the training batches that
        come next.

        Collectives: those of the metric states and of the loss; a broadcast of rank 0's buffers if workers
        have different statistics (as DistributedDataParallel does); and the model's own if it normalises by
        batch statistics.
        """
        sums = torch.zeros(2 + self._dataset.classes, dtype=torch.float64, device=self._worker.device)
        for metric in self._metrics.values():
            metric.reset()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), self._statistics(step):
            for batch in self._dataset.test():
                count = len(batch.labels)
                logits = self._forward(batch.inputs)  # (n, classes), float32 or float64
                if logits is not None and count:
                    loss = F.cross_entropy(logits, batch.labels, reduction="sum")
                    correct = (logits.argmax(1) == batch.labels).sum()
                    sums[:2] += torch.stack([loss, correct])
                    sums[2:] += batch.labels.bincount(minlength=self._dataset.classes)
                    for metric in self._metrics.values():
                        metric.update(logits, batch.labels)
        loss_sum, right, *by_class = self._worker.all_reduce(sums).tolist()
        samples = sum(by_class)
        if not samples:
            raise DataError("data.corrupt_images", "skip", "must leave at least one readable test image")
        self._check_classes(by_class)
        for name, metric in self._metrics.items():
            with warnings.catch_warnings():
                # A worker may have no test samples.
                warnings.filterwarnings("ignore", "The ``compute`` method of metric")
                value = float(metric.compute())
            # torchmetrics computes in float32, where 0.7 is slightly below the 0.7 of a target.
            yield name, round(value, 6)
        if "accuracy" in self._spec.metrics:
            yield "accuracy", right / samples
        yield "test_loss", loss_sum / samples

    def _check_classes(self, by_class: list[float]) -> None:
        """Report classes without test samples once.

        Raises DataError if a metric is undefined without them.
        """
        absent = [number for number, count in enumerate(by_class) if not count]
        if "auroc" in self._spec.metrics and len(by_class) - len(absent) < 2:
            rule = "must not contain auroc if all test samples are of one class"
            raise DataError("evaluation.metrics", list(self._spec.metrics), rule)
        if absent and self.absent_classes is None and self._worker.rank == 0:
            shown = ", ".join(map(str, absent[:20])) + (", ..." if len(absent) > 20 else "")
            print(
                f"warning: {len(absent)} of {len(by_class)} classes have no test samples ({shown}); "
                "balanced_accuracy and auroc are means over the other classes",
                flush=True,
            )
        self.absent_classes = absent

    def _forward(self, inputs: Tensor) -> Tensor | None:
        """Return the logits of this worker's share of a batch.

        Returns None if the share is empty and no other worker needs this one in a collective.
        """
        is_needed = len(inputs) > 0
        if self._spec.statistics == "batch":
            counts = self._samples_by_group(len(inputs))
            is_needed |= any(count > 1 for count in counts.values())
            for norm in self._norms:
                # A single sample has no variance, so it is normalised by moving averages.
                shared = counts[norm.process_group] if isinstance(norm, SyncBatchNorm) else len(inputs)
                norm.train(shared > 1)
        if not is_needed:
            return None
        logits: Tensor = self._model(inputs)
        return logits.double() if logits.dtype == torch.float64 else logits.float()

    def _samples_by_group(self, count: int) -> dict[Any, int]:
        """Count the samples of a batch per group of workers that share statistics.

        Collectives: one per group.
        """
        groups = dict.fromkeys(norm.process_group for norm in self._norms if isinstance(norm, SyncBatchNorm))
        counts = {}
        for group in groups:
            total = torch.tensor(count, device=self._worker.device)
            counts[group] = int(self._worker.all_reduce(total, group))
        return counts

    def _shares_statistics(self) -> bool:
        return any(isinstance(norm, SyncBatchNorm) for norm in self._norms)

    @contextmanager
    def _statistics(self, step: int) -> Iterator[None]:
        """Set the statistics for evaluation and the evaluation mode, and restore both."""
        buffers = [(buffer, buffer.clone()) for norm in self._norms for buffer in norm.buffers()]
        modes = [(module, module.training) for module in self._model.modules()]
        try:
            if self._spec.statistics == "precise" and self._norms:
                self._take_population_statistics(step)
                self.statistics = self._running_statistics()
            elif self._spec.statistics == "moving":
                share_buffers(self._norms, self._worker)
            self._model.eval()
            yield
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)
            for module, mode in modes:
                module.training = mode

    def _running_statistics(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}": buffer.to("cpu", copy=True)
            for path, module in self._model.named_modules()
            if isinstance(module, _BatchNorm)
            for name, buffer in module.named_buffers()
            if name in ("running_mean", "running_var")
        }

    def _take_population_statistics(self, step: int) -> None:
        """Replace running statistics by means over training batches.

        See Ioffe & Szegedy 2015, Algorithm 2. Workers with statistics of their own average them.
        """
        with closing(self._dataset.train(step)) as steps:
            chosen = itertools.islice(steps, self._spec.precise_batches)
            batches = (part.inputs for parts in chosen for part in parts)
            if self._shares_statistics():
                update_population_statistics(self._model, batches)
            else:
                update_bn(batches, self._model)
        if self._shares_statistics():
            share_buffers(self._norms, self._worker)
        else:
            for norm in self._norms:
                for buffer in (norm.running_mean, norm.running_var):
                    if buffer is not None:
                        self._worker.all_reduce(buffer).div_(self._worker.world_size)


def share_buffers(norms: list[_BatchNorm], worker: RankInfo) -> None:
    """Broadcast rank 0's statistics where workers or groups of workers differ."""
    for norm in norms:
        agrees = isinstance(norm, SyncBatchNorm) and norm.process_group is None
        for buffer in () if agrees else norm.buffers():
            worker.broadcast(buffer)
