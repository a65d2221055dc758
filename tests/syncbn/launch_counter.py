"""Count of the launches on a GPU and of dispatched operators, over the emulated kernels."""

import contextlib
import threading
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from syncbn import SyncBatchNorm

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
HOST_WAITS = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "allclose"}
READS = ("tolist", "cpu", "numpy", "item")
"""Methods that read values of a device, of which some dispatch no operator for a tensor on the CPU."""
_active = []
_inside_a_launch = []


class LaunchCounter(TorchDispatchMode):
    """Counts what is dispatched while it is entered.

    `launches` are names of operators that are neither views nor allocations, of kernels and of collectives;
    `dispatched` is the number of all operators; `host_waits` are those that read a value of the device.
    """

    def __init__(self):
        super().__init__()
        self.launches, self.host_waits, self.dispatched = [], [], 0

    def __enter__(self):
        _active.append(self)
        self._patches, self._thread = contextlib.ExitStack(), threading.get_ident()
        for name in READS:
            self._patches.enter_context(mock.patch.object(torch.Tensor, name, self._noted(name)))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        _active.remove(self)
        return super().__exit__(*error)

    def _noted(self, name):
        method = getattr(torch.Tensor, name)

        def read(tensor, *arguments, **options):
            # The watchdog reads from its own thread, for which no launch waits.
            if not _inside_a_launch and threading.get_ident() == self._thread:
                self.host_waits.append(name)
            return method(tensor, *arguments, **options)

        return read

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.partition("::")[2]
        self.dispatched += 1
        if name in HOST_WAITS:
            self.host_waits.append(name)
        elif not function.is_view and name not in ALLOCATIONS and name != "detach":
            self.launches.append(name)
        return function(*arguments, **(options or {}))


@contextlib.contextmanager
def one_launch(name):
    """Count a kernel or a collective as one launch, whatever its stand-in does."""
    for counter in _active:
        counter.launches.append(name)
        counter.dispatched += 1
    _inside_a_launch.append(name)
    try:
        with _disable_current_modes():
            yield
    finally:
        _inside_a_launch.pop()


def as_one_launch(function, name=None):
    """Return a function that counts as one launch."""

    def call(*arguments, **options):
        with one_launch(name or function.__name__):
            return function(*arguments, **options)

    return call


def count_operators(shape, memory_format):
    """Return the number of operators that a second step of the layer dispatches, forward and backward.

    Those of the caller, which adds up gradients, are not counted.
    """
    layer = SyncBatchNorm(shape[1])
    x, dy = (torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(2))
    x.requires_grad_()
    layer(x)
    with LaunchCounter() as counter:
        torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], dy)
    return counter.dispatched
