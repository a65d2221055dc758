"""Lower bound of the memory that a worker needs, computed from the spec alone."""

import itertools
import math

from trainer.spec.data import SyntheticSpec, known_classes, known_shape
from trainer.spec.job import JobSpec
from trainer.spec.models import CnnSpec, MlpSpec
from trainer.spec.optimizers import AdamWSpec, SgdSpec

KERNEL = 9
"""Weights of a 3x3 kernel."""


def min_worker_bytes(spec: JobSpec) -> int:
    """Bytes of weights, gradients, optimiser state, one part of a batch, and generated data on one worker.

    What is not known without looking at files or building a library's model counts as nothing, and so do activations: a worker
    needs at least as much.
    """
    shape = known_shape(spec.data)
    number = 8 if spec.precision == "fp64" else 4
    sample = math.prod(shape) * number if shape is not None else 0
    part = math.ceil(spec.global_batch_size / spec.max_workers / spec.accumulate) * sample
    data = (spec.data.train_samples + spec.data.test_samples) * sample if isinstance(spec.data, SyntheticSpec) else 0
    copies = 2 + _state_copies(spec)  # weights and gradients
    weights = _weights(spec, shape) * number * copies
    return (weights // spec.max_workers if spec.parallel == "fsdp" else weights) + part + data


def _weights(spec: JobSpec, shape: tuple[int, ...] | None) -> int:
    classes = known_classes(spec.data) or 1
    match spec.model:
        case MlpSpec():
            widths = [math.prod(shape) if shape is not None else 1, *spec.model.hidden, classes]
            return sum(before * after for before, after in itertools.pairwise(widths))
        case CnnSpec():
            channels = [shape[0] if shape is not None else 1, *spec.model.channels]
            kernels = sum(before * after for before, after in itertools.pairwise(channels))
            return kernels * KERNEL + channels[-1] * classes
        case _:
            return 0


def _state_copies(spec: JobSpec) -> int:
    match spec.optimizer:
        case AdamWSpec():
            return 2
        case SgdSpec(momentum=momentum):
            return 1 if momentum else 0
        case _:
            return 0
