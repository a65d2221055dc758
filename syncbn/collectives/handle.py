"""Handles by which custom operators receive the state of a layer.

Graphs of the compiler serve any layer, so a handle is an input of the graph: an object from torch 2.14 on.
Older versions accept only numbers, for each of which the compiler would make another graph, and tensors:
there it is a tensor on the CPU, which makes the compiler skip CUDA graphs.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch

try:
    from torch._custom_class_base import CustomClassBase
    from torch._library.opaque_object import get_opaque_type_name, register_custom_class
except ImportError:
    HANDLE_TYPE = "Tensor"
    _sites: WeakValueDictionary[int, Any] = WeakValueDictionary()
    _numbers = itertools.count()

    def make_handle(site: Any) -> Any:
        """Return the handle of the state of a layer."""
        number = next(_numbers)
        _sites[number] = site
        return torch.tensor(number, device="cpu")

    def site_of(handle: Any) -> Any:
        """Return the state of a layer by its handle, while the layer exists."""
        return _sites[int(handle)]

else:

    class SiteHandle(CustomClassBase):
        """Reference to the state of a layer."""

        def __init__(self, site: Any) -> None:
            self.site = site

    register_custom_class(SiteHandle, typ="symbolic")
    HANDLE_TYPE = get_opaque_type_name(SiteHandle)
    make_handle = SiteHandle

    def site_of(handle: Any) -> Any:
        """Return the state of a layer by its handle."""
        return handle.site
