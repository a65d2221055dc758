"""SyncBatchNorm: parameters, running statistics, training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.autograd import moments_of, normalise, put_back, select
from syncbn.collectives.context import LayerCollectives, next_layer_number
from syncbn.errors import InputError
from syncbn.functional import check_input
from syncbn.kernels.statistics import BatchStats, at_least_one
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
    torch.nn.BatchNorm1d, 2d and 3d. What the ranks exchange is float64, counts included, and every rank gets the same bits.
    So the buffers need no broadcast, which would overwrite those of process groups with each other's: give
    DistributedDataParallel `broadcast_buffers=False`, from torch 2.13 on `forward_sync_buffers=False`.

    The gradient of the input is that of the *sum* of the ranks' losses; `sync_batch_norm` says how to weight the losses
    of uneven ranks. It can be differentiated in its turn, which takes further collectives: all ranks do so alike.

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
        self._init_collectives("", process_group)

    def _init_collectives(self, name: str, process_group: ProcessGroup | None) -> None:
        """Begin to count this layer's calls, under a name that is the same on every rank; "" means a number."""
        self._site = LayerCollectives(name or f"SyncBatchNorm {next_layer_number()}", process_group)
        self._between_worker_variance_share: Tensor | None = None
        self._watchers: tuple[Callable[[Moments], None], ...] = ()

    def register_stats_hook(self, watcher: Callable[[Moments], None]) -> Callable[[], None]:
        """Have a function see the moments of all ranks in each training pass; return what ends it."""
        self._watchers = (*self._watchers, watcher)

        def end() -> None:
            self._watchers = tuple(other for other in self._watchers if other is not watcher)

        return end

    def _drop_collectives(self) -> None:
        """Drop what the layer has beside a torch.nn.BatchNorm."""
        del self._site, self._between_worker_variance_share, self._watchers

    @property
    def process_group(self) -> ProcessGroup | None:
        """Ranks to synchronise over; None means all of them."""
        return self._site.process_group

    @process_group.setter
    def process_group(self, process_group: ProcessGroup | None) -> None:
        self._site.group = process_group

    @property
    def layer_name(self) -> str:
        """What the ranks tell layers apart by: the path in the model that was converted, or a number by order of making.

        It is the same on every rank. Set it where ranks make different numbers of layers.
        """
        return self._site.name

    @layer_name.setter
    def layer_name(self, name: str) -> None:
        self._site.name = name

    @property
    def timeout_seconds(self) -> float:
        """How long a rank waits in a collective for the others; at first SYNCBN_TIMEOUT_SECONDS, or else 300."""
        return self._site.timeout_seconds

    @timeout_seconds.setter
    def timeout_seconds(self, seconds: float) -> None:
        self._site.timeout_seconds = float(seconds)

    @property
    def track_between_rank_variance(self) -> bool:
        """Whether to measure `between_worker_variance_share`, which sends C more float64 numbers forward; at first no.

        It is the same on every rank.
        """
        return self._site.share_wanted

    @track_between_rank_variance.setter
    def track_between_rank_variance(self, wanted: bool) -> None:
        self._site.share_wanted = bool(wanted)

    @property
    def between_worker_variance_share(self) -> Tensor | None:
        """Share of each channel's variance that lies between ranks and not within them, in the newest training batch.

            1 - Σᵢ M2ᵢ / M2,  with M2ᵢ = Σ(x - mean)² over rank i's values around its own mean, M2 over all

        Shape (C,), float64, between 0 and 1, and 0 where there is no variance. Near 0, synchronising changes nothing in
        this layer. None unless `track_between_rank_variance` is set and a batch was seen since.
        """
        return self._between_worker_variance_share

    @classmethod
    def convert_sync_batchnorm(cls, module: ModuleType, process_group: ProcessGroup | None = None) -> ModuleType:
        """Make every batch normalisation in a module synchronised; see `syncbn.convert_sync_batchnorm`."""
        from syncbn.convert import convert_sync_batchnorm  # here, because conversion is built on this class

        return convert_sync_batchnorm(module, process_group)

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:  # noqa: A002 - named as in the base class
        """Normalise a (N, C, *) tensor: by all ranks' statistics in training, by the running ones in evaluation.

        Args:
            input: shape (N, C, *).
            mask: which samples or positions hold values, boolean, shape (N, *), the input's without channels; the rest,
                such as padding, counts nowhere, and is 0 in the output and in the gradient. None means all.
        """
        self._check(input)
        if mask is not None:
            _check_mask(mask, input)
        if not self.training:
            return self._evaluate(input, mask)
        output, statistics = normalise(input, self.weight, self.bias, self.eps, self._site, mask)
        for watcher in self._watchers:
            watcher(moments_of(statistics))
        if self.track_running_stats:
            self._update_running_statistics(statistics)
        if statistics.within_rank_m2 is not None:
            m2 = statistics.variance * statistics.count
            self._between_worker_variance_share = torch.where(m2 > 0, 1 - statistics.within_rank_m2 / m2, 0).clamp(0, 1)
        return output

    def _check(self, x: Tensor) -> None:
        buffers = {"running_mean": self.running_mean, "running_var": self.running_var}
        check_input(x, weight=self.weight, bias=self.bias, **buffers)
        # A layer without parameters and buffers has nothing else to say how many channels it takes.
        if x.shape[1] != self.num_features:
            raise InputError(
                f"the input has {x.shape[1]} channels, shape {tuple(x.shape)}; taken are {self.num_features}"
            )

    def _evaluate(self, x: Tensor, mask: Tensor | None) -> Tensor:
        # torch takes parameters and statistics in the input's dtype, or in float32 beside half precision.
        dtype = torch.promote_types(x.dtype, torch.float32)
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, variance, weight, bias = (None if vector is None else vector.to(dtype) for vector in vectors)
        use_own_batch = mean is None and variance is None
        if use_own_batch and mask is not None:
            return put_back(self._evaluate(select(x, mask), None), mask, x)
        if mask is not None:
            # Padding may be NaN, and NaN times the gradient's 0 would be in the gradients of weight and bias.
            x = x.where(mask.unsqueeze(1), 0)
        y = F.batch_norm(x, mean, variance, weight, bias, training=use_own_batch, eps=self.eps)
        return y if mask is None else y.where(mask.unsqueeze(1), 0)

    @torch.no_grad()
    def _update_running_statistics(self, statistics: BatchStats) -> None:
        # Where no rank had a value, or none that was not seen before, the weight 0 keeps the buffers; a branch would make
        # the host wait for a device, and the compiler give up.
        count, update_count = statistics.count, statistics.update_count
        weight: Tensor | float = update_count / at_least_one(count)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(update_count > 0)
        if self.momentum is not None:
            weight = weight * self.momentum
        elif self.num_batches_tracked is not None:
            weight = weight / self.num_batches_tracked.clamp(min=1).to(torch.float64)
        unbiased_variance = statistics.variance * (count / at_least_one(count - 1))
        for running, statistic in ((self.running_mean, statistics.mean), (self.running_var, unbiased_variance)):
            if running is not None:
                running.copy_(running.to(torch.float64).lerp_(statistic, weight))


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != x.shape[:1] + x.shape[2:]:
        raise InputError(
            f"the mask has dtype {mask.dtype} and shape {tuple(mask.shape)}, the input shape {tuple(x.shape)}; "
            f"taken is torch.bool of shape {tuple(x.shape[:1] + x.shape[2:])}"
        )
    if mask.device != x.device:
        raise InputError(f"the input is on {x.device}, but the mask is on {mask.device}; taken is one device")
