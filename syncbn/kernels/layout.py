"""Layout of tensors: which dimensions statistics reduce, rows and columns."""

from __future__ import annotations

from torch import Tensor


def reduced_dimensions(x: Tensor) -> tuple[int, ...]:
    """Return the dimensions that statistics reduce: all but the channels."""
    return (0, *range(2, x.dim()))


def along_channels(vector: Tensor, x: Tensor) -> Tensor:
    """View a (C,) vector so that it broadcasts against a (N, C, *) tensor."""
    return vector if x.dim() == 2 else vector.view(-1, *(1,) * (x.dim() - 2))


def arrange(x: Tensor) -> Tensor:
    """Return the values as columns or rows; copy only if the layout is neither.

    Columns are contiguous (M, C), for values whose channels are the innermost dimension; rows are contiguous
    (N, C, *).
    """
    if x.is_contiguous():
        return x if x.dim() == 2 or x.numel() != x.shape[0] * x.shape[1] else x.view(x.shape[:2])
    return x.as_strided(*_as_columns(x)) if is_columns(x) else x.contiguous()


def arrange_like(dy: Tensor, values: Tensor) -> Tensor:
    """Return a gradient in the layout of `values`, which `arrange` made of the input."""
    arranged = arrange(dy)
    if arranged.shape == values.shape:
        return arranged
    return dy.movedim(1, -1).reshape(values.shape).contiguous() if values.dim() == 2 else dy.contiguous()


def rearrange(result: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """Return a result in the layout of `values` as a tensor like x.

    `values` is what `arrange` made of x.
    """
    # Of another shape, the values are a view of x, whose memory is dense.
    return result if values.shape == x.shape else result.as_strided(x.shape, x.stride())


def is_columns(x: Tensor) -> bool:
    """Return whether channels are the innermost dimension of dense values.

    No operator is dispatched.
    """
    shape, strides = x.shape, x.stride()
    if shape[1] == 1:
        return False
    expected = 1
    for dimension in (1, *range(x.dim() - 1, 1, -1), 0):
        if shape[dimension] != 1 and strides[dimension] != expected:
            return False
        expected *= shape[dimension]
    return True


def _as_columns(x: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    return (x.numel() // x.shape[1], x.shape[1]), (x.shape[1], 1)
