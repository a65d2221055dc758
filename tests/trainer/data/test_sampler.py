import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.data.image_files import make_spec
from trainer.data import batch_indices, shard
from trainer.data.sampler import DistributedBatchSampler
from trainer.errors import ConfigurationError
from trainer.jobspec import DigitsSpec

sizes = st.integers(1, 50)


@given(samples=sizes, batch=sizes, steps=st.integers(1, 8), seed=st.integers(0, 2**32 - 1))
def test_each_pass_sees_every_sample_once(samples, batch, steps, seed):
    row = np.concatenate([batch_indices(samples, batch, step, seed) for step in range(steps)])
    assert len(row) == steps * batch
    for start in range(0, len(row) - samples + 1, samples):
        assert sorted(row[start : start + samples]) == list(range(samples))


@given(samples=sizes, step=st.integers(0, 20), seed=st.integers(0, 100))
def test_the_order_depends_on_seed_and_step(samples, step, seed):
    assert (batch_indices(samples, 7, step, seed) == batch_indices(samples, 7, step, seed)).all()


def test_seeds_and_passes_differ():
    assert (batch_indices(100, 100, 0, 0) != batch_indices(100, 100, 0, 1)).any()
    assert (batch_indices(100, 100, 0, 0) != batch_indices(100, 100, 1, 0)).any()


@given(samples=st.integers(0, 60), world_size=st.integers(1, 9))
def test_shards_are_even_and_complete(samples, world_size):
    shards = [shard(np.arange(samples), rank, world_size) for rank in range(world_size)]
    assert np.concatenate(shards).tolist() == list(range(samples))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(
    batch=st.integers(8, 40),
    count=st.integers(1, 2),
    world_size=st.integers(1, 4),
    step=st.integers(0, 9),
)
def test_each_part_of_a_step_is_the_same_for_any_number_of_workers(batch, count, world_size, step):
    spec = make_spec(DigitsSpec(), global_batch_size=batch, gradient_accumulation_steps=count, seed=3)
    shares = [DistributedBatchSampler(spec, rank, world_size, 45).train(step) for rank in range(world_size)]
    parts = [np.concatenate(part) for part in zip(*shares, strict=True)]
    whole = np.array_split(batch_indices(45, batch, step, 3), count)
    assert [part.tolist() for part in parts] == [part.tolist() for part in whole]


@given(samples=st.integers(0, 60), world_size=st.integers(1, 5), size=st.integers(1, 20))
def test_every_test_sample_occurs_once_in_equally_many_batches_per_worker(samples, world_size, size):
    spec = make_spec(DigitsSpec(), evaluation={"batch_size": size})
    orders = [DistributedBatchSampler(spec, rank, world_size, 45) for rank in range(world_size)]
    batches = [
        np.concatenate(shares) for shares in zip(*(order.test(samples) for order in orders), strict=True)
    ]
    assert [len(batch) for batch in batches] == [size] * (samples // size) + [samples % size] * (
        samples % size > 0
    )
    assert np.concatenate([*batches, []]).tolist() == list(range(samples))


@given(world_size=st.integers(1, 4), count=st.integers(1, 2), seed=st.integers(0, 50))
def test_by_label_gives_workers_disjoint_labels(world_size, count, seed):
    labels = np.random.default_rng(seed).permutation(np.arange(40) % 4)
    changes = {
        "global_batch_size": 10,
        "gradient_accumulation_steps": count,
        "num_workers": world_size,
        "seed": seed,
    }
    iid = make_spec(DigitsSpec(), **changes)
    by_label = make_spec(DigitsSpec(), data_partition="by_label", **changes)
    seen = []
    for rank in range(world_size):
        order = DistributedBatchSampler(by_label, rank, world_size, 40, labels)
        steps = [order.train(step) for step in range(12)]
        assert [len(part) for part in steps[0]] == [
            len(part) for part in DistributedBatchSampler(iid, rank, world_size, 40).train(0)
        ]
        row = np.concatenate([part for step in steps for part in step])
        own = shard(np.argsort(labels, kind="stable"), rank, world_size)
        assert sorted(row[: len(own)]) == sorted(own)  # one pass over the shard
        assert order.train(5)[0].tolist() == steps[5][0].tolist()
        seen.append(set(row.tolist()))
    assert set.union(*seen) == set(range(40))
    assert sum(map(len, seen)) == 40


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigurationError, match=r"global_batch_size: must be at most 5.*\(got 6\)"):
        DistributedBatchSampler(make_spec(DigitsSpec()), 0, 1, samples=5)
