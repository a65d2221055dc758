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
    """Prepare `model`, in place, and return what to call in training: it, or its wrapping by DistributedDataParallel.

    `shape` is a sample's, channels first. Raises ConfigurationError if activations are to be checkpointed and the model has no
    blocks.
    """
    find_unused = worker.world_size > 1 and spec.parallel == "ddp" and may_leave_unused(model, spec, shape)
    if spec.channels_last:
        model.to(memory_format=torch.channels_last)
    blocks = find_blocks(model)
    if spec.activation_checkpointing:
        if not blocks:
            takes = (
                "must be used with a model that has blocks: modules with children, in an nn.Sequential or nn.ModuleList"
            )
            raise ConfigurationError("activation_checkpointing", spec.model.name, takes)
        for block in blocks:
            # Not a module around the block, which would change the names of its parameters.
            # A compiled graph changes buffers once in any case, and takes no contexts.
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
    # Synchronised statistics agree already, and a broadcast each step would cost a collective; evaluation shares the buffers.
    return DistributedDataParallel(model, forward_sync_buffers=False, find_unused_parameters=find_unused)


def may_leave_unused(model: nn.Module, spec: JobSpec, shape: tuple[int, ...]) -> bool:
    """Whether some step may leave parameters without a gradient, for which DistributedDataParallel would wait.

    The code of an imported model may use other parameters in each step; of other models, one pass over noise shows it.
    """
    if isinstance(spec.model, ImportedModelSpec):
        # torch advises against looking for them where the first step uses all.
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified", UserWarning)
        return True
    parameter = next(model.parameters())
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        noise = torch.randn(2, *shape, device=parameter.device, dtype=parameter.dtype)
        model.eval()  # without collectives, and without a trace in buffers
        model(noise).sum().backward()
    for module, mode in modes:
        module.training = mode
    is_unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)
    return is_unused


def _recompute_once(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first pass and of its recomputation, in which torch's own BN must not count the batch again."""
    plain = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return nullcontext(), _buffers_kept([norm for norm in plain if not isinstance(norm, SyncBatchNorm)])


@contextmanager
def _buffers_kept(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:  # torch leaves by an exception, once all that backward needs is there
        for buffer, value in buffers:
            buffer.copy_(value)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Find the model's blocks: the outermost members of an nn.Sequential or nn.ModuleList that have parts and parameters."""
    blocks: list[nn.Module] = []

    def search(module: nn.Module) -> None:
        for child in module.children():
            is_block = isinstance(module, (nn.Sequential, nn.ModuleList)) and any(True for _ in child.children())
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
    """Undo the checkpointing of activations, so that the model can be copied and pickled."""
    for module in model.modules():
        vars(module).pop("forward", None)


def no_sync(model: nn.Module, *, unless: bool) -> AbstractContextManager[None]:
    """Return a context in which backward adds to a worker's own gradients, without reducing them over all workers."""
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


def clip(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scale all gradients so that their norm together is at most `most`; return what it was."""
    norm = nn.utils.clip_grad_norm_(parameters, most)
    whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole


def warm_up_ddp_buckets(parallel: nn.Module, spec: JobSpec, shape: tuple[int, ...], worker: RankInfo) -> None:
    """Have DistributedDataParallel arrange its buckets before the first step, by one pass over noise that leaves no trace.

    After its first backward pass it orders gradients as they came. A sum over three workers or more depends in its last bit on a
    gradient's place in the bucket, so a run that is resumed must not have its first pass in other buckets than one that goes on.
    """
    if not isinstance(parallel, DistributedDataParallel) or worker.world_size < 3:
        return
    if parallel.find_unused_parameters:  # its buckets stay as they are
        return
    buffers = [(buffer, buffer.clone()) for buffer in parallel.module.buffers()]
    samples = max(2, spec.global_batch_size // spec.accumulate // worker.world_size)
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
