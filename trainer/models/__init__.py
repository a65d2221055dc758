"""Construction of models, with all normalisation layers of one kind."""

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
    """Build a network from inputs (N, *shape) to logits (N, classes).

    It is in training mode. Weights depend only on `seed`: they are equal on every rank and, if shapes are
    equal, under every norm. The global random state does not change. Collectives: none.

    Args:
        spec: specification of the network.
        norm: mode of every normalisation layer; see `trainer.norms.replace_norms`.
        shape: shape of a sample, channels first, or (features,).
        classes: number of classes.
        seed: seed of the initial weights.
        process_group: ranks that share statistics under `sync`; None means all.

    Raises:
        ConfigurationError: a name, argument or path does not exist, the network does not accept the input, or
            a normalisation layer cannot be replaced.
        Exception: an imported function, or the forward pass of its model, raises it.
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
            # Imported here: the libraries take seconds.
            from trainer.models.torchvision_timm import build_library_model

            return build_library_model(spec, shape, classes)
        case ImportedModelSpec():
            return build_imported(spec)


def _sample(model: nn.Module, shape: Sequence[int]) -> Tensor:
    like = next((parameter for parameter in model.parameters() if not nn.parameter.is_lazy(parameter)), None)
    return torch.zeros(
        2, *shape, device=None if like is None else like.device, dtype=None if like is None else like.dtype
    )


def _trace(model: nn.Module, sample: Tensor, spec: ModelSpec, classes: int) -> Trace:
    """Run the model once, to report errors of the first step early and by name."""
    shape = tuple(sample.shape[1:])
    try:
        trace = trace_forward(model, sample)
    except Exception as error:
        if isinstance(spec, ImportedModelSpec):
            raise
        raise ConfigurationError(
            "model", spec.name, f"must accept samples of shape {shape}: {error}"
        ) from error
    logits = trace.result
    if not isinstance(logits, Tensor) or logits.shape != (len(sample), classes):
        found = (
            f"a tensor of shape {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else type(logits).__name__
        )
        wanted = (len(sample), classes)
        rule = f"must be a network from {tuple(sample.shape)} to logits of shape {wanted}, not to {found}"
        raise ConfigurationError("model", spec.name, rule)
    if isinstance(spec, LibraryModelSpec) and spec.activation is not None:
        refuse_functional_activations(spec, trace)
    return trace
