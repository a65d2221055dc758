"""Gradients per layer: norms, and shift when lower layers are updated."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from trainer.probes.objective import Objective

Layers = Mapping[str, list[nn.Parameter]]


def layers_with_weights(model: nn.Module, named: Mapping[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """Return the trained parameters by layer.

    Layers are the `named` modules with all parameters inside; by default, each module with its own
    parameters.
    """
    if named:
        layers = {path: list(module.parameters()) for path, module in named.items()}
    else:
        # Parameters of the model itself, such as a position embedding, have the name of its class.
        layers = {
            path or type(model).__name__: list(module.parameters(recurse=False))
            for path, module in model.named_modules()
        }
    trained = {
        path: [parameter for parameter in layer if parameter.requires_grad] for path, layer in layers.items()
    }
    return {path: layer for path, layer in trained.items() if layer}


def gradient_norms(objective: Objective, gradient: Tensor, layers: Layers) -> dict[str, float]:
    """Return the Euclidean norm of the global gradient, in total and by layer.

    Cost: negligible in addition to the gradient.
    """
    vectors = [gradient, *(objective.slice_of(gradient, layer) for layer in layers.values())]
    squares = objective.dot_products([(vector, vector) for vector in vectors])
    names = ["gradient_norm", *(f"{path}/gradient_norm" for path in layers)]
    return {name: math.sqrt(square) for name, square in zip(names, squares, strict=True)}


class CovariateShift:
    """Internal covariate shift as a change of gradients under updates of lower layers.

    For layer i with weights wᵢ, let G = ∇_wᵢ L at the current weights, and G' = ∇_wᵢ L after only the layers
    below i have taken the step w - rate·∇L, on the same batch:

        shift         ‖G - G'‖₂
        shift_cosine  G·G' / (‖G‖·‖G'‖)

    The layers below are the modules that the forward pass calls before it. The step is that of the plain
    gradient, for every optimizer.

    Cost: one forward and one backward pass per layer except the first.

    Source: Santurkar, Tsipras, Ilyas & Madry 2018, "How Does Batch Normalization Help Optimization?",
    Definition 2.1.
    """

    def __init__(self, model: nn.Module, named: Mapping[str, nn.Module]) -> None:
        """Choose the layers: `named` modules, or those with weight matrices or kernels."""
        layers = layers_with_weights(model, named)
        self._paths = {module: path for path, module in model.named_modules()}
        self.layers = {
            path: layer for path, layer in layers.items() if named or any(weight.ndim > 1 for weight in layer)
        }
        self._turns: dict[str, int] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the order of module calls in a forward pass."""
        self._turns = {}
        with ExitStack() as hooks:
            for module in self._paths:
                hooks.enter_context(module.register_forward_pre_hook(self._note))
            yield

    def measure(self, objective: Objective, gradient: Tensor, rate: float) -> dict[str, float]:
        """Measure all layers, after `watch`."""
        values: dict[str, float] = {}
        for path, layer in self.layers.items():
            below = self._below(path, layer)
            if not below:
                continue
            with objective.moved(objective.masked(gradient, below), rate):
                _, there = objective.loss_and_gradient()
            before, after = objective.slice_of(gradient, layer), objective.slice_of(there, layer)
            change = after - before
            pairs = [(change, change), (before, after), (before, before), (after, after)]
            shift, product, *squares = objective.dot_products(pairs)
            length = math.sqrt(squares[0] * squares[1])
            values[f"{path}/shift"] = math.sqrt(shift)
            values[f"{path}/shift_cosine"] = product / length if length > 0 else math.nan
        return values

    def _note(self, module: nn.Module, _: object) -> None:
        self._turns.setdefault(self._paths[module], len(self._turns))

    def _below(self, path: str, layer: list[nn.Parameter]) -> list[nn.Parameter]:
        turn, own = self._turn(path), set(layer)
        return [
            parameter
            for module, other in self._paths.items()
            if self._turn(other) < turn
            for parameter in module.parameters(recurse=False)
            if parameter.requires_grad and parameter not in own
        ]

    def _turn(self, path: str) -> int:
        """Return the position of a module in the order of calls.

        A module whose weights are used without a call has the position of its parent.
        """
        while path not in self._turns:
            path = path.rpartition(".")[0]
        return self._turns[path]
