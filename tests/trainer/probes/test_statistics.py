import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from syncbn import Moments
from tests.dist import run_on_ranks
from tests.trainer.factories import here, make_spec
from tests.trainer.probes.probing import RATE, make_batch, make_model, measure
from trainer.data import Batch
from trainer.probes import Probes
from trainer.probes.statistics import discrepancy


@pytest.mark.parametrize(
    ("samples", "expected"), [(2, 0.570), (4, 0.394), (8, 0.284), (16, 0.201), (32, 0.138)]
)
def test_the_discrepancy_of_independent_workers_follows_theory(samples, expected):
    """√(2/(π·b)) for many workers; two workers share half of each other's samples."""
    values = torch.randn(512, samples, 400, generator=torch.Generator().manual_seed(0))
    found = discrepancy([Moments.measure(part) for part in values])
    assert found == pytest.approx(math.sqrt(2 / (math.pi * samples)), rel=0.02)
    assert found == pytest.approx(expected, rel=0.04)
    pairs = [discrepancy([Moments.measure(part) for part in pair]) for pair in values.split(2)]
    if samples >= 8:  # below, the standard deviation of so few samples is too small
        assert np.mean(pairs) == pytest.approx(math.sqrt(1 / (math.pi * samples)), rel=0.05)


def see_workers(spec):
    """Measure on this rank's uneven share of a batch; return also the layer's own variance share."""
    batch, rank, size = make_batch(), here().rank, here().world_size
    share = Batch(batch.inputs.tensor_split(size)[rank], batch.labels.tensor_split(size)[rank])
    model = make_model(spec)
    values = Probes(spec, model, here()).measure([share], RATE)
    model.norm1.track_between_rank_variance = True
    model(share.inputs)
    return values, getattr(model.norm1, "between_worker_variance_share", None)


@pytest.mark.dist
def test_discrepancy_and_variance_share_compare_worker_shares_before_the_norm():
    spec = make_spec(norm="sync", num_workers=3, probes={"measure": ["discrepancy", "variance_share"]})
    (values, share), *_ = run_on_ranks(see_workers, 3, spec)
    inputs = make_model(spec).linear1(make_batch().inputs.flatten(1)).detach()
    scale, parts = inputs.std(0, correction=0), inputs.tensor_split(3)
    expected = np.mean([float(((part.mean(0) - inputs.mean(0)).abs() / scale).mean()) for part in parts])
    assert values["probe/norm1/discrepancy"] == pytest.approx(expected)
    assert values["probe/norm1/discrepancy_used"] == 0
    within = sum(len(part) * part.var(0, correction=0) for part in parts) / (len(inputs) * scale.square())
    assert values["probe/norm1/variance_share"] == pytest.approx(float((1 - within).mean()))
    assert values["probe/norm1/variance_share"] == pytest.approx(float(share.mean()))


@pytest.mark.dist
def test_the_used_discrepancy_is_of_the_shared_statistics():
    probes = {"measure": ["discrepancy"]}
    for changes, size in (({"norm": "batch"}, 1), ({"norm": "sync", "sync_group_size": 2}, 2)):
        values = run_on_ranks(measure_grouped, 4, make_spec(num_workers=4, probes=probes, **changes))[0]
        inputs = make_model(make_spec()).linear1(make_batch(48).inputs).detach()
        parts = inputs.tensor_split(4 // size)
        scale = inputs.std(0, correction=0)
        expected = np.mean([float(((part.mean(0) - inputs.mean(0)).abs() / scale).mean()) for part in parts])
        assert values["probe/norm1/discrepancy_used"] == pytest.approx(expected)
    assert 0 < values["probe/norm1/discrepancy_used"] < values["probe/norm1/discrepancy"]
    alone = measure(make_spec(norm="none", probes=probes), make_batch())
    assert alone == {
        f"probe/activation{level}/{name}": value
        for level in (1, 2)
        for name, value in (("discrepancy", 0), ("values_per_channel", 50))
    }


def measure_grouped(spec):
    share = make_batch(48)
    rank = dist.get_rank()
    return Probes(spec, make_model(make_spec()), here()).measure(
        [Batch(share.inputs.tensor_split(4)[rank], share.labels.tensor_split(4)[rank])], RATE
    )
