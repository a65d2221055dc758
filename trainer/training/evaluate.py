"""Evaluation over all workers; each test sample counts once."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
import torch.distributed as dist
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
    """Measures a model on a dataset's test samples."""

    def __init__(self, spec: EvaluationSpec, model: nn.Module, dataset: Dataset, worker: RankInfo) -> None:
        if "top5_accuracy" in spec.metrics and dataset.classes <= 5:
            takes = f"top5_accuracy must have more than 5 classes; there are {dataset.classes}"
            raise ConfigurationError("evaluation.metrics", spec.metrics, takes)
        self._spec, self._model, self._dataset, self._worker = spec, model, dataset, worker
        others = [name for name in spec.metrics if name != "accuracy"]
        self._metrics: dict[str, Any] = {}
        if others:
            # Here, as it takes seconds, which a run that measures accuracy alone need not wait for.
            from trainer.training.metrics import build_metric

            self._metrics = {name: build_metric(name, dataset.classes).to(worker.device) for name in others}
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.statistics: dict[str, Tensor] = {}
        """Running statistics of the newest evaluation, by buffer name, where they are not the model's own (`precise`)."""
        self.absent_classes: list[int] | None = None
        """Classes without test samples; None before the first evaluation."""

    @torch.no_grad()
    def evaluate(self, step: int) -> Iterator[tuple[str, float]]:
        """Yield each metric's name and value, and (`test_loss`, mean cross-entropy in nats), equal on every worker.

        Weights, buffers, modes and random numbers are afterwards what they were. `step` is how many steps are done: `precise` takes
        the training batches that come next.

        Collectives: those of the metrics' states and of the loss; a broadcast of rank 0's buffers where workers have statistics of
        their own (as DistributedDataParallel does); and the model's where it takes statistics of the batches it is given.
        """
        sums = torch.zeros(2 + self._dataset.classes, dtype=torch.float64, device=self._worker.device)
        for metric in self._metrics.values():
            metric.reset()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), self._statistics(step):
            for batch in self._dataset.test():
                count = len(batch.labels)
                logits = self._forward(batch.inputs)
                if logits is not None and count:
                    loss = F.cross_entropy(logits, batch.labels, reduction="sum")
                    correct = (logits.argmax(1) == batch.labels).sum()
                    sums[:2] += torch.stack([loss, correct])
                    sums[2:] += batch.labels.bincount(minlength=self._dataset.classes)
                    for metric in self._metrics.values():
                        metric.update(logits, batch.labels)
        loss_sum, right, *by_class = sum_over_workers(sums, self._worker.world_size).tolist()
        samples = sum(by_class)
        if not samples:
            raise DataError("data.corrupt_images", "skip", "must leave at least one readable test image")
        self._check_classes(by_class)
        for name, metric in self._metrics.items():
            with warnings.catch_warnings():
                # A worker may have no test sample.
                warnings.filterwarnings("ignore", "The ``compute`` method of metric")
                value = float(metric.compute())
            # It is float32, in which 0.7 is a little less than 0.7: what a target is reached by is the number as written.
            yield name, round(value, 6)
        if "accuracy" in self._spec.metrics:
            yield "accuracy", right / samples
        yield "test_loss", loss_sum / samples

    def _check_classes(self, by_class: list[float]) -> None:
        """Report classes without test samples, once. Raises DataError if a metric is not defined without them."""
        absent = [number for number, count in enumerate(by_class) if not count]
        if "auroc" in self._spec.metrics and len(by_class) - len(absent) < 2:
            rule = "must not contain auroc if all test samples are of one class"
            raise DataError("evaluation.metrics", list(self._spec.metrics), rule)
        if absent and self.absent_classes is None and self._worker.rank == 0:
            shown = ", ".join(map(str, absent[:20])) + (", ..." if len(absent) > 20 else "")
            print(
                f"evaluation: {len(absent)} of {len(by_class)} classes have no test samples ({shown}); "
                "balanced_accuracy and auroc are means over the other classes",
                flush=True,
            )
        self.absent_classes = absent

    def _forward(self, inputs: Tensor) -> Tensor | None:
        """Return the logits of this worker's part of a batch; None where it has none and no other worker needs it."""
        is_needed = len(inputs) > 0
        if self._spec.statistics == "batch":
            counts = self._samples_by_group(len(inputs))
            is_needed |= any(count > 1 for count in counts.values())
            for norm in self._norms:
                # One sample has no variance: where there is but one to take statistics of, the moving ones are taken.
                shared = counts[norm.process_group] if isinstance(norm, SyncBatchNorm) else len(inputs)
                norm.train(shared > 1)
        if not is_needed:
            return None
        logits: Tensor = self._model(inputs)
        return logits.double() if logits.dtype == torch.float64 else logits.float()

    def _samples_by_group(self, count: int) -> dict[Any, int]:
        """Count the samples of a batch in each group of workers that share statistics. Collective in each of them."""
        groups = dict.fromkeys(norm.process_group for norm in self._norms if isinstance(norm, SyncBatchNorm))
        counts = {}
        for group in groups:
            total = torch.tensor(count, device=self._worker.device)
            if self._worker.world_size > 1:
                dist.all_reduce(total, group=group)
            counts[group] = int(total)
        return counts

    def _shares_statistics(self) -> bool:
        return any(isinstance(norm, SyncBatchNorm) for norm in self._norms)

    @contextmanager
    def _statistics(self, step: int) -> Iterator[None]:
        """Give batch normalisation the statistics that are asked for, in evaluation mode, and afterwards what it had."""
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
        """Take means over training batches (Ioffe & Szegedy 2015, Algorithm 2), and over workers where each has its own."""
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
                        sum_over_workers(buffer, self._worker.world_size).div_(self._worker.world_size)


def share_buffers(norms: list[_BatchNorm], worker: RankInfo) -> None:
    """Give every worker rank 0's statistics, where they are a worker's own or those of a group of workers."""
    for norm in norms:
        agrees = isinstance(norm, SyncBatchNorm) and norm.process_group is None
        for buffer in () if agrees or worker.world_size == 1 else norm.buffers():
            dist.broadcast(buffer, src=0)


def sum_over_workers(values: Tensor, world_size: int) -> Tensor:
    """Sum `values` over all workers, in place."""
    if world_size > 1:
        dist.all_reduce(values)
    return values
