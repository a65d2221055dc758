"""Gradients per layer: norms, and shift when lower layers are updated."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from trainer.probes.objective import Objective

Layers = Mapping[str, list[nn.Parameter]]


def layers_with_weights(model: nn.Module, named: Mapping[str, nn.Module]) -> dict[str, list[nn.Parameter]]:
    """List trained parameters by layer: of each of the `named` modules, all within it; of none named, each module's own."""
    if named:
        layers = {path: list(module.parameters()) for path, module in named.items()}
    else:
        # Parameters of the model itself, such as a transformer's position embedding, go by its class.
        layers = {
            path or type(model).__name__: list(module.parameters(recurse=False))
            for path, module in model.named_modules()
        }
    trained = {path: [parameter for parameter in layer if parameter.requires_grad] for path, layer in layers.items()}
    return {path: layer for path, layer in trained.items() if layer}


def gradient_norms(objective: Objective, gradient: Tensor, layers: Layers) -> dict[str, float]:
    """Return the Euclidean norm of the global batch's gradient, in all and by layer. Cost: nothing beside the gradient."""
    vectors = [gradient, *(objective.piece(gradient, layer) for layer in layers.values())]
    squares = objective.products([(vector, vector) for vector in vectors])
    names = ["gradient_norm", *(f"{path}/gradient_norm" for path in layers)]
    return {name: math.sqrt(square) for name, square in zip(names, squares, strict=True)}


class Shift:
    """Internal covariate shift as a change of gradients: how much a layer's update is made for lower layers that then move.

    For layer i with weights wᵢ, G = ∇_wᵢ L at the present weights, and G' = ∇_wᵢ L where the layers below it have taken their
    step w - rate·∇L and all others have not, on the same batch:

        shift         ‖G - G'‖₂
        shift_cosine  G·G' / (‖G‖·‖G'‖)

    Below are the modules that the forward pass calls before it. The step is the plain gradient's, whatever the optimiser is.

    Cost: one forward and one backward pass for each layer but the first.

    Source: Santurkar, Tsipras, Ilyas & Madry 2018, "How Does Batch Normalization Help Optimization?", Definition 2.1.
    """

    def __init__(self, model: nn.Module, named: Mapping[str, nn.Module]) -> None:
        """Without `named` modules, the layers are those that have a matrix or kernel of weights."""
        layers = layers_with_weights(model, named)
        self._paths = {module: path for path, module in model.named_modules()}
        self.layers = {
            path: layer for path, layer in layers.items() if named or any(weight.ndim > 1 for weight in layer)
        }
        self._turns: dict[str, int] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Learn, in a forward pass within, in which order the modules are called."""
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
            with objective.moved(objective.only(gradient, below), rate):
                _, there = objective.loss_and_gradient()
            before, after = objective.piece(gradient, layer), objective.piece(there, layer)
            change = after - before
            pairs = [(change, change), (before, after), (before, before), (after, after)]
            shift, product, *squares = objective.products(pairs)
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
        """When a module was called; one whose weights are used without a call, when what it is a part of was."""
        while path not in self._turns:
            path = path.rpartition(".")[0]
        return self._turns[path]
