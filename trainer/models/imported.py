"""Models built by a function of an installed module."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from trainer.errors import ConfigurationError
from trainer.jobspec import ImportedModelSpec


def find_function(spec: ImportedModelSpec) -> Callable[..., Any]:
    """Import the function, and check that it takes the arguments; `Allowlist.check` has checked that it may be imported.

    Raises:
        ConfigurationError: there is no such module or function, or it does not take the arguments.
        Exception: what the module itself raises.
    """
    try:
        module = importlib.import_module(spec.module)
    except ModuleNotFoundError as error:
        # A module that is there, but misses one of its own imports, is its author's to mend.
        if error.name is None or not f"{spec.module}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError("model.name", spec.name, f"there is no module {error.name}") from None
    function = getattr(module, spec.function, None)
    if not callable(function):
        raise ConfigurationError("model.name", spec.name, f"{spec.module} has no function {spec.function}")
    home = getattr(function, "__module__", None)
    if home is None or home.partition(".")[0] != spec.module.partition(".")[0]:
        # What an allowed module has merely imported has not been allowed with it.
        raise ConfigurationError("model.name", spec.name, f"must be a function defined in {spec.module}, not in {home}")
    try:
        inspect.signature(function).bind(**spec.arguments)
    except TypeError as error:
        raise ConfigurationError(
            "model.arguments", spec.arguments, f"must be arguments of {spec.name}: {error}"
        ) from None
    found: Callable[..., Any] = function
    return found


def build_imported(spec: ImportedModelSpec) -> nn.Module:
    """Call the function.

    Raises:
        ConfigurationError: as `find_function`, or it returns no module.
        Exception: what the module or the function itself raises.
    """
    model = find_function(spec)(**spec.arguments)
    if not isinstance(model, nn.Module):
        takes = f"must be a function that returns a torch.nn.Module, not {type(model).__name__}"
        raise ConfigurationError("model.name", spec.name, takes)
    return model
