"""Lower bound of a worker's memory, from the spec and a measured model size."""

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
"""Numbers that classes of torch.optim keep for each parameter, without arguments; a test compares this with torch."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """How much a model holds."""

    parameters: int
    sample_activations: int
    """Numbers kept for backward for each sample of a batch; 0 where that is not known."""


def min_worker_bytes(spec: JobSpec, size: ModelSize | None = None) -> int:
    """Bytes that one worker needs in the memory of its node: it needs at least as much.

    These are weights, optimiser state, one part of a batch, generated data, and gradients or what is kept for backward, whichever
    is more: the one grows as the other is given up. With a GPU, of whose memory nothing is known, it is the weights alone, which
    are made on the host. What is not known counts as nothing: an imported model, data and shapes that have to be looked at for,
    and what compilation or checkpointed activations leave of the numbers kept for backward.

    Args:
        spec: of the job.
        size: of a library's model; None if it is not known. The networks of the project need none.
    """
    shape = known_shape(spec.data)
    number = 8 if spec.precision == "fp64" else 4
    size = size or _own_size(spec, shape)
    weights = size.parameters * number
    if spec.use_gpu:
        return weights
    sample = math.prod(shape) * number if shape is not None else 0
    samples = math.ceil(spec.global_batch_size / spec.max_workers / spec.accumulate)
    data = (spec.data.train_samples + spec.data.test_samples) * sample if isinstance(spec.data, SyntheticSpec) else 0
    share = weights // spec.max_workers if spec.parallel == "fsdp" else weights
    activations = samples * _sample_activations(spec, size)
    return share * (1 + _state_copies(spec)) + max(share, activations) + samples * sample + data


def _own_size(spec: JobSpec, shape: tuple[int, ...] | None) -> ModelSize:
    """Count for the project's own networks; a library's model without a size, and an imported one, count as nothing."""
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
    # Of each layer: the input of its norm, the output of its activation, and the input of one that backward cannot do without.
    kept = (spec.norm != Norm.NONE) + 1 + (spec.model.activation in ("gelu", "silu"))
    return ModelSize(parameters=weights, sample_activations=outputs * kept)


def _sample_activations(spec: JobSpec, size: ModelSize) -> int:
    """Bytes kept for backward for each sample."""
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
