"""Full state dictionaries of model and optimizer in host memory.

`torch.distributed.checkpoint.state_dict` does the same for optimizers with tensors for every parameter. It
cannot restore an optimizer without tensors (SGD without momentum), and casts scalar state to the dtype of the
parameter (ASGD, NAdam).
"""

from typing import Any

import torch
from torch import Tensor, nn


def gather_model_state(model: nn.Module, *, keep: bool) -> dict[str, Any]:
    """Copy a model's state to host memory; empty without `keep`.

    Collective if the model is sharded.
    """
    return _gather(model.state_dict(), keep=keep)


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load the result of `gather_model_state`, also under another sharding."""
    targets = model.state_dict()
    model.load_state_dict({name: _place_like(value, targets.get(name)) for name, value in state.items()})


def gather_optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """Copy an optimizer's state and options to host memory.

    Without `keep`, the result is empty, and the call only takes part in the collectives of sharded state.
    """
    state = [_gather(optimizer.state.get(parameter, {}), keep=keep) for parameter in _parameters(optimizer)]
    on_host = [  # state on the CPU of parameters on a GPU, such as step counts
        [name for name, value in optimizer.state.get(parameter, {}).items() if _is_on_host(value)]
        for parameter in _parameters(optimizer)
    ]
    groups = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    return {"state": state, "on_host": on_host, "groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Load the result of `gather_optimizer_state`.

    The optimizer must have the same parameters in the same order.
    """
    optimizer.state.clear()
    parameters = _parameters(optimizer)
    for parameter, state, on_host in zip(parameters, content["state"], content["on_host"], strict=True):
        if state:
            optimizer.state[parameter] = {
                name: value if name in on_host else _place_like(value, parameter)
                for name, value in state.items()
            }
    for group, options in zip(optimizer.param_groups, content["groups"], strict=True):
        group.update(options)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _is_on_host(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu" and not _is_sharded(value)


def _is_sharded(value: Any) -> bool:
    # isinstance(value, DTensor) would import torch.distributed.tensor, which takes a second.
    return hasattr(value, "full_tensor")


def _gather(state: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    content = {}
    for name, value in state.items():
        whole = value.full_tensor() if _is_sharded(value) else value
        if keep:
            content[name] = whole.detach().to("cpu", copy=True) if isinstance(whole, Tensor) else whole
    return content


def _place_like(value: Any, target: Any) -> Any:
    """Move a full tensor to the device, and the sharding if shapes agree, of `target`.

    Collectives: none.
    """
    if not isinstance(value, Tensor) or not isinstance(target, Tensor):
        return value
    value = value.to(target.device)
    if not _is_sharded(target) or value.shape != target.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    # Every rank has the full tensor, so nothing is sent.
    return distribute_tensor(value, mesh, placements, src_data_rank=None)
