"""Models by spec, with all normalisation layers in one mode."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from trainer.errors import ConfigurationError
from trainer.jobspec import CnnSpec, ImportedModelSpec, LibraryModelSpec, MlpSpec, ModelSpec, Norm
from trainer.models.imported import build_imported
from trainer.models.networks import build_cnn, build_mlp
from trainer.models.surgery import refuse_functional_activations
from trainer.norms import Trace, replace_norms, trace_forward

__all__ = ["build_model"]


def build_model(
    spec: ModelSpec,
    norm: Norm,
    shape: Sequence[int],
    classes: int,
    seed: int,
    process_group: ProcessGroup | None = None,
) -> nn.Module:
    """Build a network from (N, *shape) inputs to (N, classes) logits, in training mode.

    Weights depend on `seed` alone: they are the same on every rank and, where shapes are the same, under every norm. The global
    random state is left alone. Collectives: none.

    Args:
        spec: which network.
        norm: of every normalisation layer in it; see `trainer.norms.replace_norms`.
        shape: of a sample, channels first, or (features,).
        classes: number of classes.
        seed: of the initial weights.
        process_group: ranks that share statistics under `sync`; None means all.

    Raises:
        ConfigurationError: a name, argument or path that does not exist; an input that the network does not take; a
            normalisation layer that cannot be switched.
        Exception: what an imported function, or the forward pass of its model, raises.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _build(spec, shape, classes, seed)
        sample = _sample(model, shape)
        trace = _trace(model, sample, spec, classes)
        return replace_norms(model, norm, trace, sample, process_group)


def _build(spec: ModelSpec, shape: Sequence[int], classes: int, seed: int) -> nn.Module:
    match spec:
        case MlpSpec():
            return build_mlp(spec, shape, classes, seed)
        case CnnSpec():
            return build_cnn(spec, shape, classes, seed)
        case LibraryModelSpec():
            from trainer.models.torchvision_timm import (
                build_library_model,  # here, as the libraries take seconds to import
            )

            return build_library_model(spec, shape, classes)
        case ImportedModelSpec():
            return build_imported(spec)


def _sample(model: nn.Module, shape: Sequence[int]) -> Tensor:
    like = next((parameter for parameter in model.parameters() if not nn.parameter.is_lazy(parameter)), None)
    return torch.zeros(
        2, *shape, device=None if like is None else like.device, dtype=None if like is None else like.dtype
    )


def _trace(model: nn.Module, sample: Tensor, spec: ModelSpec, classes: int) -> Trace:
    """Run the model once, to refuse here and by name what would fail in the first step."""
    shape = tuple(sample.shape[1:])
    try:
        trace = trace_forward(model, sample)
    except Exception as error:
        if isinstance(spec, ImportedModelSpec):
            raise
        raise ConfigurationError("model", spec.name, f"does not take samples of shape {shape}: {error}") from error
    logits = trace.result
    if not isinstance(logits, Tensor) or logits.shape != (len(sample), classes):
        found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        takes = (
            f"must be a network from {tuple(sample.shape)} to logits of shape {(len(sample), classes)}, not to {found}"
        )
        raise ConfigurationError("model", spec.name, takes)
    if isinstance(spec, LibraryModelSpec) and spec.activation is not None:
        refuse_functional_activations(spec, trace)
    return trace
