"""Model preparation: memory format, checkpointing, compilation, DDP, FSDP."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from syncbn import SyncBatchNorm
from trainer.distributed import RankInfo
from trainer.errors import ConfigurationError
from trainer.jobspec import ImportedModelSpec, JobSpec


def parallelise(model: nn.Module, spec: JobSpec, worker: RankInfo, shape: tuple[int, ...]) -> nn.Module:
    """Prepare `model` in place and return the module to call in training.

    That module is the model itself, or DistributedDataParallel around it. `shape` is the shape of a sample,
    channels first. Raises ConfigurationError if activation checkpointing is on and the model has no blocks.
    """
    find_unused = worker.world_size > 1 and spec.parallel == "ddp" and may_leave_unused(model, spec, shape)
    if spec.channels_last:
        model.to(memory_format=torch.channels_last)
    blocks = find_blocks(model)
    if spec.activation_checkpointing:
        if not blocks:
            rule = (
                "must be used with a model that has blocks: modules with children, "
                "in an nn.Sequential or nn.ModuleList"
            )
            raise ConfigurationError("activation_checkpointing", spec.model.name, rule)
        for block in blocks:
            # A wrapper module would change the names of parameters. A compiled graph updates buffers once
            # in any case, and does not support contexts.
            contexts = {} if spec.compile else {"context_fn": partial(_recompute_once, block)}
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)
    if spec.compile:
        model.compile()
    if worker.world_size == 1:
        return model
    if spec.parallel == "fsdp":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh(worker.device.type, (worker.world_size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    # Synchronised statistics are equal on all ranks without a broadcast in each step, and evaluation
    # broadcasts all others.
    return DistributedDataParallel(model, forward_sync_buffers=False, find_unused_parameters=find_unused)


def may_leave_unused(model: nn.Module, spec: JobSpec, shape: tuple[int, ...]) -> bool:
    """Return whether parameters may get no gradient in some step.

    DistributedDataParallel would wait for them. The code of an imported model may use other parameters in
    each step; other models are checked by one pass over noise.
    """
    if isinstance(spec.model, ImportedModelSpec):
        # torch warns if the first step uses all parameters.
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified", UserWarning)
        return True
    parameter = next(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        noise = torch.randn(2, *shape, device=parameter.device, dtype=parameter.dtype)
        model.eval()  # no collectives, no changed buffers
        model(noise).sum().backward()
    for module, mode in modes:
        module.training = mode
    is_unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)
    return is_unused


def _recompute_once(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the first pass and of its recomputation.

    torch's own batch normalisation must not count the batch again in the recomputation.
    """
    plain = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return nullcontext(), _buffers_kept([norm for norm in plain if not isinstance(norm, SyncBatchNorm)])


@contextmanager
def _buffers_kept(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:  # torch ends the recomputation by an exception once it has all tensors for backward
        for buffer, value in buffers:
            buffer.copy_(value)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model.

    These are the outermost members of an nn.Sequential or nn.ModuleList that have children and parameters.
    """
    blocks: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            is_block = isinstance(module, (nn.Sequential, nn.ModuleList)) and any(
                True for _ in child.children()
            )
            if (
                is_block
                and not isinstance(child, (nn.Sequential, nn.ModuleList))
                and any(True for _ in child.parameters())
            ):
                blocks.append(child)
            else:
                search(child)

    search(model)
    return blocks


def remove_activation_checkpointing(model: nn.Module) -> None:
    """Remove activation checkpointing, so that the model can be copied and pickled."""
    for module in model.modules():
        vars(module).pop("forward", None)


def no_sync(model: nn.Module, *, unless: bool) -> AbstractContextManager[None]:
    """Return a context in which backward accumulates local gradients only.

    With `unless`, the context does nothing, and gradients are reduced over all workers.
    """
    if unless:
        return nullcontext()
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return _unsharded(model) if hasattr(model, "set_requires_gradient_sync") else nullcontext()


@contextmanager
def _unsharded(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def clip_grad_norm(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scale all gradients to a total norm of at most `most`; return the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, most)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def warm_up_ddp_buckets(parallel: nn.Module, spec: JobSpec, shape: tuple[int, ...], worker: RankInfo) -> None:
    """Let DistributedDataParallel arrange its buckets before the first step.

    One pass over noise does this, without side effects. After its first backward pass,
    DistributedDataParallel orders gradients by arrival. With three workers or more, the last bit of a sum
    depends on the position of a gradient in its bucket, so a resumed run must not start with other buckets
    than an uninterrupted one.
    """
    if not isinstance(parallel, DistributedDataParallel) or worker.world_size < 3:
        return
    if parallel.find_unused_parameters:  # then buckets are not rearranged
        return
    buffers = [(buffer, buffer.clone()) for buffer in parallel.module.buffers()]
    samples = max(2, spec.global_batch_size // spec.gradient_accumulation_steps // worker.world_size)
    dtype = next(parallel.module.parameters()).dtype
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        noise = torch.randn(samples, *shape, device=worker.device, dtype=dtype)
        if spec.channels_last and noise.ndim == 4:
            noise = noise.to(memory_format=torch.channels_last)
        parallel(noise).sum().backward()
    parallel.zero_grad(set_to_none=True)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
