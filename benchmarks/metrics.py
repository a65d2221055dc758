"""Cost of an evaluation's metrics: all eight compared with accuracy alone, on the same logits, in turn.

The model returns its input, so that only metrics are measured. One process with one thread; prints median
and quartiles in milliseconds of processor time, which other processes disturb less than wall time.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from typing import get_args

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import nn

from trainer.data.dataset import Batch
from trainer.distributed import RankInfo
from trainer.jobspec import EvaluationSpec, Metric
from trainer.training.evaluate import Evaluator

ALL = list(get_args(Metric))


class Logits:
    """Test data of given logits, in batches of the default size of an evaluation."""

    def __init__(self, samples: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.classes = classes
        self._labels = torch.randint(classes, (samples,), generator=generator)
        self._logits = torch.randn(samples, classes, generator=generator)
        self._logits[torch.arange(samples), self._labels] += 2

    def test(self) -> Iterator[Batch]:
        """See trainer.data.Dataset."""
        size = EvaluationSpec().batch_size
        for logits, labels in zip(self._logits.split(size), self._labels.split(size), strict=True):
            yield Batch(logits, labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}; {vars(arguments)}; metrics {', '.join(ALL)}")
    worker, data = RankInfo(0, 1, torch.device("cpu")), Logits(arguments.samples, arguments.classes)
    evaluators = {
        title: Evaluator(spec, nn.Identity(), data, worker)  # type: ignore[arg-type]
        for title, spec in (
            ("accuracy alone", EvaluationSpec(metrics=["accuracy"])),
            ("all metrics", EvaluationSpec(metrics=ALL)),
        )
    }
    milliseconds: dict[str, list[float]] = {title: [] for title in evaluators}
    for turn in range(arguments.rounds + 3):
        for title, evaluator in evaluators.items():
            start = time.process_time()
            dict(evaluator.evaluate(0))
            if turn >= 3:  # warm by now
                milliseconds[title].append(1e3 * (time.process_time() - start))
    for title, values in milliseconds.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f"{title}: {median:.3g} ms ({low:.3g} to {high:.3g})")


if __name__ == "__main__":
    main()
