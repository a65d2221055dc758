"""Models by name."""

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import nn

from trainer.norms import build_norm, makes_bias_redundant
from trainer.spec import MlpSpec, Norm

ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


def build_model(spec: MlpSpec, norm: Norm, features: int, classes: int, seed: int) -> nn.Module:
    """Build a network from (N, *) with `features` values per sample to (N, classes) logits.

    Weights are Gaussian with `spec.init_std`, biases zero; they depend on `seed` alone. Each hidden layer is linear, norm,
    activation, as in Ioffe & Szegedy 2015, sections 3.2 and 4.1.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, outputs) in enumerate(pairwise([features, *spec.hidden]), start=1):
        layers[f"linear{number}"] = nn.Linear(inputs, outputs, bias=not makes_bias_redundant(norm))
        layers[f"norm{number}"] = build_norm(norm, outputs)
        layers[f"activation{number}"] = ACTIVATIONS[spec.activation]()
    layers["output"] = nn.Linear(spec.hidden[-1], classes)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=spec.init_std, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(layers)
