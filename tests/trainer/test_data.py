import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import batch_indices, load_dataset, shard
from trainer.spec import TRAIN_SAMPLES, DigitsSpec, Mnist5kSpec

sizes = st.integers(1, 50)


@given(samples=sizes, batch=sizes, steps=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_each_pass_sees_every_sample_once(samples, batch, steps, seed):
    row = np.concatenate([batch_indices(samples, batch, step, seed) for step in range(steps)])
    assert len(row) == steps * batch
    for start in range(0, len(row) - samples + 1, samples):
        assert sorted(row[start : start + samples]) == list(range(samples))


@given(samples=sizes, step=st.integers(0, 20), seed=st.integers(0, 100))
def test_the_order_is_a_function_of_seed_and_step(samples, step, seed):
    assert (batch_indices(samples, 7, step, seed) == batch_indices(samples, 7, step, seed)).all()


def test_seeds_and_passes_differ():
    assert (batch_indices(100, 100, 0, 0) != batch_indices(100, 100, 0, 1)).any()
    assert (batch_indices(100, 100, 0, 0) != batch_indices(100, 100, 1, 0)).any()


@given(samples=st.integers(0, 60), world_size=st.integers(1, 9))
def test_shards_are_even_and_together_the_whole(samples, world_size):
    shards = [shard(np.arange(samples), rank, world_size) for rank in range(world_size)]
    assert np.concatenate(shards).tolist() == list(range(samples))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(("spec", "features", "tests"), [(Mnist5kSpec(), 784, 1_000), (DigitsSpec(), 64, 360)])
def test_datasets_are_whole_and_split_by_label(tmp_path, monkeypatch, spec, features, tests):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = load_dataset(spec, torch.float64, torch.device("cpu"))
    assert first.train_inputs.shape == (TRAIN_SAMPLES[spec.name], features)
    assert first.test_inputs.shape == (tests, features)
    assert (first.train_inputs.dtype, first.test_labels.dtype, first.classes) == (torch.float64, torch.int64, 10)
    assert first.train_inputs.min() == 0
    assert first.train_inputs.max() == 1
    shares = torch.bincount(first.test_labels) / tests
    assert (shares - 0.1).abs().max() < 0.005
    again = load_dataset(spec, torch.float64, torch.device("cpu"))
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert [path.name for path in (tmp_path / "syncbn").glob("*/*")] == [f"{spec.name}.npz"]


def test_mnist5k_is_binary_as_in_the_paper():
    dataset = load_dataset(Mnist5kSpec(), torch.float32, torch.device("cpu"))
    assert dataset.train_inputs.unique().tolist() == [0, 1]
