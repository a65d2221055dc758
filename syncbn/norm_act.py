"""SyncBatchNormAct: normalisation followed by dropout and activation, as in timm."""

from __future__ import annotations

from torch import Tensor, nn

from syncbn.module import SyncBatchNorm


class SyncBatchNormAct(SyncBatchNorm):
    """Synchronised batch normalisation, then the submodules `drop` and `act`.

    `convert_sync_batchnorm` gives this class to timm's BatchNormAct2d and SyncBatchNormAct, which have the
    two submodules. The layer is not meant to be constructed.

    Shape: input and output (N, C, *).
    """

    drop: nn.Module
    act: nn.Module

    def forward(
        self,
        input: Tensor,  # noqa: A002 - named as in the base class
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalise as the base class does, then apply `drop` and `act`."""
        y: Tensor = self.act(self.drop(super().forward(input, mask)))
        # Padding is 0 in the output, and an activation may map 0 to another value.
        return y if mask is None else y.where(mask.unsqueeze(1), 0)
