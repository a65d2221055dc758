"""Base class of layers that torch.fx records as one call."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


class FxLeaf(nn.Module):
    """Module that every torch.fx tracer records as one `call_module` node.

    torch.fx treats only the modules of torch itself so, and traces into others. A tracer replaces
    `nn.Module.__call__`, and sees this module first. Hooks run when the traced module runs, and not on
    proxies, as with torch's own layers.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module or, on proxies, record a call of it."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Proxy):
                return _record(self, value, args, kwargs)
        return super().__call__(*args, **kwargs)


def _record(module: nn.Module, proxy: Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tracer: Any = proxy.tracer

    def record(*args: Any, **kwargs: Any) -> Proxy:
        node: Proxy = tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
        return node

    # Through the tracer's own method, in which tracers note the module of a node.
    return tracer.call_module(module, record, args, kwargs)
