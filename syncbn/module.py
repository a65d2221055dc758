"""SyncBatchNorm: parameters, running statistics, training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.autograd import normalise
from syncbn.collectives.context import LayerCollectives, next_layer_number
from syncbn.errors import InputError
from syncbn.functional import check_input
from syncbn.fx import FxLeaf
from syncbn.kernels.statistics import BatchStats, RunningStats
from syncbn.moments import Moments
from syncbn.passes import moments_of, put_back, select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ModuleType = TypeVar("ModuleType", bound=nn.Module)


class SyncBatchNorm(FxLeaf, _BatchNorm):
    """Batch normalisation with statistics over the data of all ranks in training.

    In training, with n, μ and σ² the count, mean and biased variance of a channel over all ranks:

        y = weight · (x - μ) / √(σ² + eps) + bias
        running_mean ← (1 - momentum)·running_mean + momentum·μ
        running_var  ← (1 - momentum)·running_var  + momentum·σ²·n/(n - 1)

    In evaluation μ and σ² are the running statistics or, without these, the statistics of this rank's batch.

    The signature is that of torch.nn.SyncBatchNorm; parameters, buffers and state_dict are those of
    torch.nn.BatchNorm1d, 2d and 3d. Ranks exchange float64 values, including counts, and every rank gets the
    same bits. The buffers therefore need no broadcast, which would mix those of different process groups:
    pass `broadcast_buffers=False` to DistributedDataParallel, from torch 2.13 on
    `forward_sync_buffers=False`.

    The gradient of the input is that of the *sum* of the ranks' losses; `sync_batch_norm` says how to weight
    the losses of uneven ranks. Double backward is supported and issues further collectives, which all ranks
    must reach.

    Collectives: in training one forward and one backward, see `sync_batch_norm`; in evaluation none. All
    ranks of the group must be in training mode at the same time. Without torch.distributed, or in a group of
    one rank, the layer issues none and is plain batch normalisation.

    A rank without values (N = 0) takes part in both collectives and has the same buffers as the others
    afterwards. If no rank has a value, buffers and num_batches_tracked are unchanged.

    Shape: input and output (N, C, *) with any number of trailing dimensions.

    Args:
        num_features: channels C.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None gives all batches the same
            weight.
        affine: whether the layer has weight and bias.
        track_running_stats: whether to keep running statistics.
        process_group: ranks to synchronise over; None means all ranks.
        device: device of parameters and buffers.
        dtype: dtype of parameters and buffers. The input may have another floating dtype, which the output
            then has too.
        bias: whether the layer has a bias in addition to the weight.

    Raises:
        InputError: forward got an unsupported shape, dtype or device (on this rank, before any collective),
            or all ranks together have a single value per channel in training (on every rank).
        GroupError: forward in training on a rank outside the process group (before any collective).

    Source: Ioffe & Szegedy 2015, "Batch Normalization", Algorithm 1 and section 3.2. Running averages instead
    of the population statistics of Algorithm 2 follow torch.
    """

    convert_sync_batchnorm: ClassVar[Callable[..., nn.Module]]
    """`syncbn.convert_sync_batchnorm`, as torch.nn.SyncBatchNorm has it; `syncbn.convert` assigns it."""

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
            # The base class has this keyword only in newer versions of torch.
            self.register_parameter("bias", None)
        self._init_collectives("", process_group)

    def _init_collectives(self, name: str, process_group: ProcessGroup | None) -> None:
        """Initialise sequence numbers under a layer name that is equal on every rank.

        The name "" means a number.
        """
        self._site = LayerCollectives(name or f"SyncBatchNorm {next_layer_number()}", process_group)
        self._between_worker_variance_share: Tensor | None = None
        self._watchers: tuple[Callable[[Moments], None], ...] = ()

    def register_stats_hook(self, watcher: Callable[[Moments], None]) -> Callable[[], None]:
        """Register a function that gets the moments of all ranks in training passes.

        Returns a function that removes the hook.
        """
        self._watchers = (*self._watchers, watcher)

        def end() -> None:
            self._watchers = tuple(other for other in self._watchers if other is not watcher)

        return end

    def _drop_collectives(self) -> None:
        """Delete the attributes that torch.nn.BatchNorm does not have."""
        del self._site, self._between_worker_variance_share, self._watchers

    @property
    def process_group(self) -> ProcessGroup | None:
        """Ranks to synchronise over; None means all ranks."""
        return self._site.process_group

    @process_group.setter
    def process_group(self, process_group: ProcessGroup | None) -> None:
        self._site.group = process_group

    @property
    def layer_name(self) -> str:
        """Name by which ranks identify the layer.

        By default its path in the converted model, or a number in construction order. It must be equal on
        every rank. Set it where ranks construct different numbers of layers.
        """
        return self._site.name

    @layer_name.setter
    def layer_name(self, name: str) -> None:
        self._site.name = name

    @property
    def timeout_seconds(self) -> float:
        """Timeout of a collective in seconds; default: SYNCBN_TIMEOUT_SECONDS, or 300."""
        return self._site.timeout_seconds

    @timeout_seconds.setter
    def timeout_seconds(self, seconds: float) -> None:
        self._site.timeout_seconds = float(seconds)

    @property
    def track_between_rank_variance(self) -> bool:
        """Whether to measure `between_worker_variance_share`.

        This adds C float64 numbers to the forward collective. Default: False. It must be equal on every rank.
        """
        return self._site.share_wanted

    @track_between_rank_variance.setter
    def track_between_rank_variance(self, wanted: bool) -> None:
        self._site.share_wanted = bool(wanted)

    @property
    def between_worker_variance_share(self) -> Tensor | None:
        """Share of the variance between ranks in the total variance per channel.

        It is that of the newest training batch:

            1 - Σᵢ M2ᵢ / M2,  with M2ᵢ = Σ(x - mean)² over rank i's values around its own mean, M2 over all

        Shape (C,), float64, between 0 and 1; 0 where there is no variance. Near 0, synchronising has no
        effect in this layer. None unless `track_between_rank_variance` is set and a batch has been seen
        since.
        """
        return self._between_worker_variance_share

    def forward(
        self,
        input: Tensor,  # noqa: A002 - named as in the base class
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalise by statistics over all ranks, or in evaluation by running ones.

        Args:
            input: shape (N, C, *).
            mask: boolean, shape (N, *), True where the input has values. Other positions, such as padding,
                are ignored and are 0 in the output and in the gradient. None means that all positions have
                values.
        """
        self._check(input)
        if mask is not None:
            _check_mask(mask, input)
        if not self.training:
            return self._evaluate(input, mask)
        output, statistics = normalise(
            input, self.weight, self.bias, self.eps, self._site, mask, self._running_statistics()
        )
        self._report(statistics)
        return output

    def _report(self, statistics: BatchStats) -> None:
        """Call the hooks, and set the share of the variance between ranks."""
        for watcher in self._watchers:
            watcher(moments_of(statistics))
        if statistics.within_rank_m2 is not None:
            m2 = statistics.variance * statistics.count
            self._between_worker_variance_share = torch.where(
                m2 > 0, 1 - statistics.within_rank_m2 / m2, 0
            ).clamp(0, 1)

    def _check(self, x: Tensor) -> None:
        buffers = {"running_mean": self.running_mean, "running_var": self.running_var}
        check_input(x, weight=self.weight, bias=self.bias, **buffers)
        # A layer without parameters and buffers has no other check of the number of channels.
        if x.shape[1] != self.num_features:
            raise InputError(
                f"input: must have {self.num_features} channels (got {x.shape[1]}, shape {tuple(x.shape)})"
            )

    def _evaluate(self, x: Tensor, mask: Tensor | None) -> Tensor:
        # torch requires parameters and statistics in the dtype of the input, or in float32 for half
        # precision.
        dtype = torch.promote_types(x.dtype, torch.float32)
        vectors = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, variance, weight, bias = (None if vector is None else vector.to(dtype) for vector in vectors)
        use_own_batch = mean is None and variance is None
        if use_own_batch and mask is not None:
            return put_back(self._evaluate(select(x, mask), None), mask, x)
        if mask is not None:
            # Padding may be NaN, and NaN times a zero gradient would be NaN in the gradients of weight and
            # bias.
            x = x.where(mask.unsqueeze(1), 0)
        y = F.batch_norm(x, mean, variance, weight, bias, training=use_own_batch, eps=self.eps)
        return y if mask is None else y.where(mask.unsqueeze(1), 0)

    def _running_statistics(self) -> RunningStats | None:
        mean, variance, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if not self.track_running_stats or mean is None or variance is None or batches is None:
            return None
        return RunningStats(mean, variance, batches, self.momentum)


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != x.shape[:1] + x.shape[2:]:
        raise InputError(
            f"mask: must be torch.bool of shape {tuple(x.shape[:1] + x.shape[2:])} for an input of shape "
            f"{tuple(x.shape)} (got {mask.dtype} of shape {tuple(mask.shape)})"
        )
    if mask.device != x.device:
        raise InputError(f"mask: must be on the device of the input, {x.device} (got {mask.device})")
