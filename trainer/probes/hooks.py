"""Hook points of probes in a network, and their observations."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from syncbn import Moments
from trainer.errors import ConfigurationError
from trainer.models.surgery import ACTIVATION_NAMES
from trainer.norms.layers import channels_last, is_norm

NONLINEARITIES = ACTIVATION_NAMES | {"Sigmoid", "Tanh"}
"""Classes of modules whose inputs are pre-activations, including the gates of library models."""


@dataclass(frozen=True)
class HookPoint:
    """Input or output of a module."""

    path: str
    module: nn.Module
    is_input: bool


@dataclass(frozen=True, eq=False)
class Observation:
    """Observation of one worker's share of a batch at one hook point."""

    moments: Moments
    """Moments of each channel."""
    unit: int
    """Index of the middle channel, C // 2."""
    values: Tensor
    """Values of that channel, shape (samples · positions,), on the worker's device, float32 or float64."""


def activation_inputs(model: nn.Module) -> list[HookPoint]:
    """Return the hook points at the inputs of all activation modules."""
    return [
        HookPoint(path, module, is_input=True)
        for path, module in model.named_modules()
        if type(module).__name__ in NONLINEARITIES and not module._modules
    ]


def norm_inputs(model: nn.Module) -> list[HookPoint]:
    """Return the hook points at the inputs of all normalisation layers."""
    return [
        HookPoint(path, module, is_input=True) for path, module in model.named_modules() if is_norm(module)
    ]


def named_modules(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules at `paths`.

    Raises ConfigurationError for paths that the model does not have.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    missing = [path for path in paths if path not in modules]
    if missing:
        close = difflib.get_close_matches(missing[0], modules, n=5) or list(modules)[:5]
        rule = f"must be paths of the model's modules, such as {', '.join(close)}"
        raise ConfigurationError("probes.layers", missing, rule)
    return {path: modules[path] for path in paths}


class Observer:
    """Observer of hook points during forward passes.

    A module that is called more than once in a pass has one name per call: `path`, `path:2`, `path:3` …
    """

    def __init__(self, places: Iterable[HookPoint]) -> None:
        self._places = list(places)
        self.seen: list[dict[str, Observation]] = []
        """Observations by pass and name, in the order of the pass."""
        self._channels_last: Any = WeakTensorKeyDictionary()
        """Outputs of linear layers and norms whose channels are the last dimension."""

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Observe the passes within the context.

        Raises ConfigurationError: in the pass, for a hook point without channels; afterwards, for an output
        that was not reached, or if nothing was reached.
        """
        with ExitStack() as hooks:
            hooks.enter_context(model.register_forward_pre_hook(lambda *_: self.seen.append({})))
            for module in model.modules():
                if isinstance(module, nn.Linear) or (is_norm(module) and channels_last(module)):
                    hooks.enter_context(module.register_forward_hook(self._note_channels_last))
            for place in self._places:
                hooks.enter_context(self._hook(place))
            yield
        unseen = [place.path for place in self._places if place.path not in self.seen[0]]
        # Unused activations are allowed, unless the user has named them.
        if any(place.path in unseen and not place.is_input for place in self._places) or not self.seen[0]:
            raise ConfigurationError(
                "probes.layers", unseen, "must be modules that the model calls in its forward pass"
            )

    def _hook(self, place: HookPoint) -> torch.utils.hooks.RemovableHandle:
        if place.is_input:
            return place.module.register_forward_pre_hook(
                lambda _, args, kwargs: self._observe(
                    place.path, next(iter((*args, *kwargs.values())), None)
                ),
                with_kwargs=True,
            )
        return place.module.register_forward_hook(lambda _, __, output: self._observe(place.path, output))

    def _note_channels_last(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._channels_last[output] = True

    def _observe(self, path: str, tensor: Any) -> None:
        """Measure immediately, since an activation may work in place."""
        if not isinstance(tensor, Tensor) or tensor.ndim < 2 or not tensor.is_floating_point():
            found = (
                f"a tensor of shape {tuple(tensor.shape)}"
                if isinstance(tensor, Tensor)
                else type(tensor).__name__
            )
            rule = f"must be modules with a floating-point tensor (samples, channels, ...), not {found}"
            raise ConfigurationError("probes.layers", path, rule)
        if tensor in self._channels_last:
            tensor = tensor.movedim(-1, 1)  # (N, C, *)
        unit = tensor.shape[1] // 2
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        values = tensor.select(1, unit).flatten().to(dtype, copy=True)  # (N · positions,)
        seen = self.seen[-1]
        calls = sum(name.partition(":")[0] == path for name in seen)
        seen[path if calls == 0 else f"{path}:{calls + 1}"] = Observation(
            Moments.measure(tensor), unit, values
        )
