"""Trace of a forward pass: normalisation layers reached, and their inputs.

It uses neither names nor classes of the surrounding networks, so it works for any library.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from trainer.norms.layers import channels_last, forward_of, is_norm

LIBRARIES = ("torch", "torchvision", "timm")
"""Packages whose convolutions and linear layers, subclasses included, add their bias last."""


@dataclass(eq=False)
class Output:
    """Output of a convolution or linear layer."""

    is_normalised: bool = False
    is_used_elsewhere: bool = False


class Trace(TorchFunctionMode):
    """Record of a forward pass, as a mode that intercepts all torch functions."""

    def __init__(self) -> None:
        super().__init__()
        self.result: Any = None
        self.dimensions: dict[nn.Module, set[int]] = {}
        """Numbers of input dimensions of each normalisation layer reached."""
        self.calls: list[tuple[str, nn.Module, Callable[..., Any], bool]] = []
        """Functions called outside normalisation layers: path and module of the caller, function, and whether
        its first tensor is a parameter.
        """
        self.outputs: dict[nn.Module, list[Output]] = {}
        """Outputs of each convolution and linear layer of the libraries."""
        self._storages: set[int] = set()
        self._stack: list[tuple[str, nn.Module]] = []
        self._live: Any = WeakTensorKeyDictionary()

    def feeds_norms_alone(self) -> Iterator[nn.Module]:
        """Yield the layers whose outputs go only into normalisation layers."""
        for module, outputs in self.outputs.items():
            if all(output.is_normalised and not output.is_used_elsewhere for output in outputs):
                yield module

    def watch(self, model: nn.Module, sample: Tensor) -> None:
        """Run the model and record the pass."""
        self._storages = {
            parameter.untyped_storage().data_ptr()
            for parameter in model.parameters()
            if not nn.parameter.is_lazy(parameter)
        }
        with ExitStack() as hooks:
            for path, module in model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):  # does not support hooks
                    continue
                hooks.enter_context(module.register_forward_pre_hook(self._entering(path), with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(self._leave))
            with self:
                self.result = model(sample)
        self._use(self.result)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function and record its inputs."""
        result = func(*args, **(kwargs or {}))
        if self._stack and not self._inside_norm():
            inputs = tensors((args, kwargs))
            path, module = self._stack[-1]
            # Normalising a weight (weight standardisation) is part of the architecture, not a layer to
            # replace.
            on_parameter = bool(inputs) and inputs[0].untyped_storage().data_ptr() in self._storages
            self.calls.append((path, module, func, on_parameter))
            # Queries of shape or dtype do not use the values; assignments, which return None, do.
            if tensors(result) or result is None:
                self._follow(inputs, result)
        return result

    def _follow(self, inputs: list[Tensor], result: Any) -> None:
        """Follow the output of a convolution through views; record other uses of it."""
        for tensor in inputs:
            if tensor not in self._live:
                continue
            output, dimension = self._live[tensor]
            moved = None
            if isinstance(result, Tensor) and result is not tensor:
                moved = dimension_in_view(tensor, dimension, result)
            if moved is None:
                output.is_used_elsewhere = True
            else:
                self._live[result] = (output, moved)

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if is_norm(module) and not self._inside_norm():
                self._normalise(module, tensors((args, kwargs))[0])
            self._stack.append((path, module))

        return enter

    def _normalise(self, layer: nn.Module, tensor: Tensor) -> None:
        self.dimensions.setdefault(layer, set()).add(tensor.dim())
        if tensor in self._live:
            output, dimension = self._live[tensor]
            if dimension == (tensor.dim() - 1 if channels_last(layer) else 1):
                output.is_normalised = True
            else:
                output.is_used_elsewhere = True

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._stack.pop()
        # Dropout returns its argument in evaluation, but not in training, so it counts as a use.
        if type(module) is not nn.Identity and any(result is argument for argument in args):
            self._use(result)
        if isinstance(module, nn.Linear | _ConvNd) and forward_of(module).split(".")[0] in LIBRARIES:
            output = Output()
            self.outputs.setdefault(module, []).append(output)
            if isinstance(result, Tensor):
                self._live[result] = (output, result.dim() - 1 if isinstance(module, nn.Linear) else 1)

    def _use(self, values: Any) -> None:
        for tensor in tensors(values):
            if tensor in self._live:
                self._live[tensor][0].is_used_elsewhere = True

    def _inside_norm(self) -> bool:
        return any(is_norm(module) for _, module in self._stack)


def trace_forward(model: nn.Module, sample: Tensor) -> Trace:
    """Trace a forward pass in evaluation mode without gradients.

    The model is restored afterwards. Raises the errors of the model.
    """
    modes = {module: module.training for module in model.modules()}
    trace = Trace()
    try:
        with torch.no_grad():
            trace.watch(model.eval(), sample)
    finally:
        for module, training in modes.items():
            module.training = training
    return trace


def tensors(values: Any) -> list[Tensor]:
    """Return the tensors in nested containers, without uninitialised parameters."""
    return [
        leaf
        for leaf in pytree.tree_leaves(values)
        if isinstance(leaf, Tensor) and not nn.parameter.is_lazy(leaf)
    ]


def dimension_in_view(tensor: Tensor, dimension: int, view: Tensor) -> int | None:
    """Return the index of a tensor's dimension in a view of all of its values.

    Returns None if the dimension is not in it, or if it is not such a view.
    """
    if view.layout != torch.strided or view.numel() != tensor.numel() or view.data_ptr() != tensor.data_ptr():
        return None
    # A dimension of a view is identified by its size and stride; the answer is unknown if two agree.
    wanted = (tensor.shape[dimension], tensor.stride(dimension))
    found = [
        place for place, pair in enumerate(zip(view.shape, view.stride(), strict=True)) if pair == wanted
    ]
    return found[0] if len(found) == 1 else None
