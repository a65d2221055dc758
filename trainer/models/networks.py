"""Built-in networks, made of torch modules only.

Saved models therefore load without the code of this project.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from trainer.errors import ConfigurationError
from trainer.jobspec import CnnSpec, MlpSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
LOCAL_RESPONSE_SIZE = 5
"""Channels in Krizhevsky et al. 2012, section 3.3; its other constants are torch's defaults up to a factor.
"""


def build_mlp(spec: MlpSpec, shape: Sequence[int], classes: int, seed: int) -> nn.Sequential:
    """Build a fully connected network with batch normalisation.

    It maps (N, *shape) to (N, classes) logits. Weights are Gaussian with `spec.init_std`, biases zero. Each
    hidden layer is linear, norm, activation, as in Ioffe & Szegedy 2015, sections 3.2 and 4.1.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, outputs) in enumerate(pairwise([math.prod(shape), *spec.hidden]), start=1):
        # With a bias; replace_norms removes it where the norm cancels it.
        layers[f"linear{number}"] = nn.Linear(inputs, outputs)
        layers[f"norm{number}"] = nn.BatchNorm1d(outputs)
        layers[f"activation{number}"] = ACTIVATIONS[spec.activation]()
        if spec.dropout > 0:
            layers[f"dropout{number}"] = nn.Dropout(spec.dropout)
    layers["output"] = nn.Linear(spec.hidden[-1], classes)
    return _initialise(nn.Sequential(layers), spec.init_std, seed)


def build_cnn(spec: CnnSpec, shape: Sequence[int], classes: int, seed: int) -> nn.Sequential:
    """Build a convolutional network with batch normalisation.

    It maps (N, *shape) images to (N, classes) logits. Weights are Gaussian with `spec.init_std`, or with
    √(2/fan in), biases zero.

    Raises ConfigurationError if samples are not images, or too small for the number of levels.
    """
    if len(shape) != 3:
        raise ConfigurationError(
            "model",
            spec.name,
            f"must be used with images (channels, height, width), not with samples of shape {tuple(shape)}",
        )
    last = len(spec.channels)
    most = min(shape[1:]).bit_length()
    if last > most:
        raise ConfigurationError(
            "model.channels",
            spec.channels,
            f"must be at most {most} levels for images of {shape[1]}x{shape[2]}",
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for level, (inputs, outputs) in enumerate(pairwise([shape[0], *spec.channels]), start=1):
        layers[f"conv{level}"] = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1)
        layers[f"norm{level}"] = nn.BatchNorm2d(outputs)
        layers[f"activation{level}"] = ACTIVATIONS[spec.activation]()
        if level < last:
            if spec.local_response_norm:
                layers[f"local_response_norm{level}"] = nn.LocalResponseNorm(LOCAL_RESPONSE_SIZE)
            layers[f"pool{level}"] = nn.MaxPool2d(2)
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    if spec.dropout > 0:
        layers["dropout"] = nn.Dropout(spec.dropout)
    layers["output"] = nn.Linear(spec.channels[-1], classes)
    return _initialise(nn.Sequential(layers), spec.init_std, seed)


def _initialise(model: nn.Sequential, std: float | None, seed: int) -> nn.Sequential:
    """Initialise the weights by a separate generator, independent of earlier draws.

    `std` None means √(2/fan in).
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            if std is None:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            else:
                nn.init.normal_(layer.weight, std=std, generator=generator)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return model
