"""Models built by a function of an installed module."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from trainer.errors import ConfigurationError
from trainer.jobspec import ImportedModelSpec


def find_function(spec: ImportedModelSpec) -> Callable[..., Any]:
    """Import the function and check that it accepts the arguments.

    `Allowlist.check` must have allowed the import. Raises ConfigurationError if the module or function does
    not exist, or does not accept the arguments; and the errors of the module itself.
    """
    try:
        module = importlib.import_module(spec.module)
    except ModuleNotFoundError as error:
        # A missing import inside an existing module is an error of that module.
        if error.name is None or not f"{spec.module}.".startswith(f"{error.name}."):
            raise
        rule = f"must be in an existing module; there is no {error.name}"
        raise ConfigurationError("model.name", spec.name, rule) from None
    function = getattr(module, spec.function, None)
    if not callable(function):
        raise ConfigurationError("model.name", spec.name, f"must be a function in {spec.module}")
    home = getattr(function, "__module__", None)
    if home is None or home.partition(".")[0] != spec.module.partition(".")[0]:
        # Allowing a module does not allow what it imports.
        raise ConfigurationError(
            "model.name", spec.name, f"must be a function defined in {spec.module}, not in {home}"
        )
    try:
        inspect.signature(function).bind(**spec.arguments)
    except TypeError as error:
        raise ConfigurationError(
            "model.arguments", spec.arguments, f"must be arguments of {spec.name}: {error}"
        ) from None
    found: Callable[..., Any] = function
    return found


def build_imported(spec: ImportedModelSpec) -> nn.Module:
    """Call the function and return its model.

    Raises ConfigurationError as `find_function` does, and if the result is not a module; and the errors of
    the module or the function itself.
    """
    model = find_function(spec)(**spec.arguments)
    if not isinstance(model, nn.Module):
        rule = f"must be a function that returns a torch.nn.Module, not {type(model).__name__}"
        raise ConfigurationError("model.name", spec.name, rule)
    return model
