"""SyncBatchNorm: parameters, running statistics, training and evaluation."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.errors import InputError
from syncbn.functional import check_input, sync_batch_norm
from syncbn.moments import Moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ModuleType = TypeVar("ModuleType", bound=nn.Module)


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation which in training takes its statistics over the data of all ranks.

    In training, with n, μ and σ² the count, mean and biased variance of a channel over all ranks:

        y = weight · (x - μ) / √(σ² + eps) + bias
        running_mean ← (1 - momentum)·running_mean + momentum·μ
        running_var  ← (1 - momentum)·running_var  + momentum·σ²·n/(n - 1)

    In evaluation μ and σ² are the running statistics, or, where none are kept, those of this rank's own batch.

    The signature is that of torch.nn.SyncBatchNorm; parameters, buffers and state_dict are those of
    torch.nn.BatchNorm1d, 2d and 3d. Accumulation is in float64, counts included, and every rank gets the same bits.
    So the buffers need no broadcast, which would overwrite those of process groups with each other's: give
    DistributedDataParallel `broadcast_buffers=False`, from torch 2.13 on `forward_sync_buffers=False`.

    The gradient of the input is that of the *sum* of the ranks' losses; `sync_batch_norm` says how to weight the losses
    of uneven ranks. The second derivative is not available.

    Collectives: in training one forward and one backward, see `sync_batch_norm`; in evaluation none. So all ranks of
    the group are in training at the same time. Without a process group, or in a group of one, it issues none and is
    plain batch normalisation.

    A rank without values (N = 0) takes part in both collectives and ends with the same buffers as the others. If no
    rank has a value, buffers and num_batches_tracked stay as they are.

    Shape: input (N, C, *) with any number of trailing dimensions; the output alike.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None gives all batches the same weight.
        affine: whether to have weight and bias.
        track_running_stats: whether to keep running statistics.
        process_group: ranks to synchronise over; None means all of them.
        device: of parameters and buffers.
        dtype: of parameters and buffers. The input may have another floating dtype, which is then the output's too.
        bias: whether to have a bias beside the weight.

    Raises:
        InputError: forward was given a shape, dtype or device not taken (on this rank, before any collective); or in
            training all ranks together hold a single value per channel (on every rank).
        GroupError: forward in training on a rank outside the process group (before any collective).

    Source: Ioffe & Szegedy 2015, "Batch Normalization", Algorithm 1 and section 3.2. Running averages in place of
    Algorithm 2's population statistics are torch's custom.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: ProcessGroup | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            # Not by the base class's keyword, which the older versions of torch that we run on do not have.
            self.register_parameter("bias", None)
        self.process_group = process_group

    @classmethod
    def convert_sync_batchnorm(cls, module: ModuleType, process_group: ProcessGroup | None = None) -> ModuleType:
        """Make every batch normalisation in a module synchronised; see `syncbn.convert_sync_batchnorm`."""
        from syncbn.convert import convert_sync_batchnorm  # here, because conversion is built on this class

        return convert_sync_batchnorm(module, process_group)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - named as in the base class
        """Normalise a (N, C, *) tensor: by all ranks' statistics in training, by the running ones in evaluation."""
        self._check(input)
        if not self.training:
            return self._evaluate(input)
        output, moments = sync_batch_norm(input, self.weight, self.bias, eps=self.eps, process_group=self.process_group)
        if self.track_running_stats:
            self._update_running_statistics(moments)
        return output

    def _check(self, x: Tensor) -> None:
        buffers = {"running_mean": self.running_mean, "running_var": self.running_var}
        check_input(x, weight=self.weight, bias=self.bias, **buffers)
        # A layer without parameters and buffers has nothing else to say how many channels it takes.
        if x.shape[1] != self.num_features:
            raise InputError(
                f"the input has {x.shape[1]} channels, shape {tuple(x.shape)}; taken are {self.num_features}"
            )

    def _evaluate(self, x: Tensor) -> Tensor:
        # torch takes parameters and statistics in the input's dtype, or in float32 beside half precision.
        dtype = torch.promote_types(x.dtype, torch.float32)
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, variance, weight, bias = (None if vector is None else vector.to(dtype) for vector in vectors)
        use_own_batch = mean is None and variance is None
        return F.batch_norm(x, mean, variance, weight, bias, training=use_own_batch, eps=self.eps)

    @torch.no_grad()
    def _update_running_statistics(self, moments: Moments) -> None:
        # Where no rank had a value the factor 0 keeps the buffers; a branch would make the host wait for the device.
        factor = (moments.count > 0).to(torch.float64)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(factor.to(self.num_batches_tracked.dtype))
        if self.momentum is not None:
            factor = factor * self.momentum
        elif self.num_batches_tracked is not None:
            factor = factor / self.num_batches_tracked.clamp(min=1)
        newest = (moments.mean, moments.unbiased_variance)
        for running, statistic in zip((self.running_mean, self.running_var), newest, strict=True):
            if running is not None:
                running.copy_(running.to(torch.float64).lerp(statistic, factor))

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        # A process group is a handle on this process's connections: it cannot be copied, and the copy shares it.
        memo[id(self.process_group)] = self.process_group
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied
