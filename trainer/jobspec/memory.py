"""Lower bound of a worker's memory, from the specification and a model size."""

import itertools
import math
from dataclasses import dataclass

from trainer.jobspec.data import SyntheticSpec, known_classes, known_shape
from trainer.jobspec.job import JobSpec, Norm
from trainer.jobspec.models import CnnSpec, MlpSpec
from trainer.jobspec.optimizers import AdamWSpec, SgdSpec, TorchOptimizerSpec

KERNEL = 9
"""Weights of a 3x3 kernel."""
STATE_COPIES = {
    "ASGD": 1,
    "Adadelta": 2,
    "Adagrad": 1,
    "Adam": 2,
    "AdamW": 2,
    "Adamax": 2,
    "NAdam": 2,
    "RAdam": 2,
    "RMSprop": 1,
}
"""State values per parameter of torch.optim classes with default arguments; a test compares them with torch.
"""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Size of a model."""

    parameters: int
    sample_activations: int
    """Numbers kept for backward per sample of a batch; 0 if unknown."""


def min_worker_bytes(spec: JobSpec, size: ModelSize | None = None) -> int:
    """Return a lower bound of the bytes that one worker needs on its node.

    The bound is the sum of weights, optimizer state, inputs of one part of a batch, generated data, and the
    larger of gradients and of numbers kept for backward: the former grow while the latter are freed. With a
    GPU, whose memory is unknown, only the weights count, which are built on the host. Unknown sizes count as
    zero: imported models, data and shapes that have to be read from files, and the numbers kept for backward
    under compilation or activation checkpointing.

    Args:
        spec: specification of the job.
        size: size of a library model; None if unknown. The project's own networks need none.
    """
    shape = known_shape(spec.data)
    number = 8 if spec.precision == "fp64" else 4
    size = size or _own_size(spec, shape)
    weights = size.parameters * number
    if spec.use_gpu:
        return weights
    sample = math.prod(shape) * number if shape is not None else 0
    samples = math.ceil(spec.global_batch_size / spec.max_workers / spec.gradient_accumulation_steps)
    data = (
        (spec.data.train_samples + spec.data.test_samples) * sample
        if isinstance(spec.data, SyntheticSpec)
        else 0
    )
    # The maximum number of workers gives a lower bound: with fewer workers each one holds more.
    share = weights // spec.max_workers if spec.parallel == "fsdp" else weights
    activations = samples * _sample_activations(spec, size)
    return share * (1 + _state_copies(spec)) + max(share, activations) + samples * sample + data


def _own_size(spec: JobSpec, shape: tuple[int, ...] | None) -> ModelSize:
    """Return the size of one of the project's own networks, by its formula.

    Imported models, and library models without a measured size, count as zero.
    """
    classes = known_classes(spec.data) or 1
    match spec.model:
        case MlpSpec(hidden=hidden):
            widths = [math.prod(shape) if shape is not None else 1, *hidden, classes]
            weights = sum(before * after for before, after in itertools.pairwise(widths))
            outputs = sum(hidden)
        case CnnSpec(channels=levels):
            channels = [shape[0] if shape is not None else 1, *levels]
            kernels = sum(before * after for before, after in itertools.pairwise(channels))
            weights = kernels * KERNEL + channels[-1] * classes
            height, width = shape[1:] if shape is not None else (0, 0)
            outputs = sum(count * (height >> level) * (width >> level) for level, count in enumerate(levels))
        case _:
            return ModelSize(parameters=0, sample_activations=0)
    # Kept per layer: the input of the norm, the output of the activation, and the input of activations whose
    # derivative needs it.
    kept = (spec.norm != Norm.NONE) + 1 + (spec.model.activation in ("gelu", "silu"))
    return ModelSize(parameters=weights, sample_activations=outputs * kept)


def _sample_activations(spec: JobSpec, size: ModelSize) -> int:
    """Return the bytes kept for backward per sample."""
    # The compiler chooses what to keep, and checkpointing keeps only the inputs of blocks.
    if spec.compile or spec.activation_checkpointing:
        return 0
    return size.sample_activations * {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}[spec.precision]


def _state_copies(spec: JobSpec) -> int:
    match spec.optimizer:
        case AdamWSpec():
            return 2
        case SgdSpec(momentum=momentum):
            return 1 if momentum else 0
        case TorchOptimizerSpec(name=name, arguments=arguments):
            options = sum(bool(arguments.get(option)) for option in ("amsgrad", "centered", "momentum"))
            return STATE_COPIES.get(name.removeprefix("torch:"), 0) + options
