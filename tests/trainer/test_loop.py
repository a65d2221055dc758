import math

import pytest
import torch

from tests.dist import run_on_ranks
from tests.trainer.training import make_spec, train_here
from trainer.errors import Diverged
from trainer.spec import MlpSpec, SgdSpec


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_under_sync_the_number_of_workers_changes_nothing(world_size):
    """50 samples over 3 or 4 workers divide unevenly: the loss must be weighted for this to hold."""
    spec = make_spec()
    alone, metrics, curve = train_here(spec)
    for state, metrics_there, curve_there in run_on_ranks(
        train_here, world_size, spec.model_copy(update={"num_workers": world_size})
    ):
        for name, value in alone.items():
            assert (state[name].double() - value.double()).abs().max() <= 1e-9, name
        assert metrics_there == pytest.approx(metrics, abs=1e-9)
        assert curve_there.keys() == curve.keys() == {0, 10, 20}
        assert curve_there[10] == pytest.approx(curve[10], abs=1e-9)


@pytest.mark.dist
def test_under_batch_the_workers_keep_statistics_of_their_own_and_evaluate_with_rank_0s():
    first, second = run_on_ranks(train_here, 2, make_spec(norm="batch", num_workers=2))
    assert first[1] == second[1]
    assert torch.equal(first[0]["linear1.weight"], second[0]["linear1.weight"])
    assert (first[0]["norm1.running_mean"] - second[0]["norm1.running_mean"]).abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["none", "batch", "sync", "group", "layer"])
def test_every_norm_learns(norm):
    model = MlpSpec(hidden=[32, 32], activation="relu", init_std=0.2)
    spec = make_spec(norm=norm, model=model, steps=150, eval_every=150, precision="fp32", optimizer=SgdSpec(lr=0.1))
    _, metrics, curve = train_here(spec)
    assert metrics["accuracy"] > 0.8
    assert curve[150]["train_loss"] < curve[0]["test_loss"]
    assert math.isfinite(metrics["test_loss"])


def test_the_same_spec_gives_the_same_bits():
    spec = make_spec(precision="fp32")
    first, again, other = train_here(spec)[0], train_here(spec)[0], train_here(spec.model_copy(update={"seed": 1}))[0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear1.weight"], other["linear1.weight"])


def test_the_last_step_is_always_evaluated():
    _, _, curve = train_here(make_spec(steps=7, eval_every=5))
    assert list(curve) == [0, 5, 7]


@pytest.mark.dist
def test_divergence_ends_the_run_on_every_worker_in_the_same_step():
    spec = make_spec(
        norm="none", num_workers=2, model=MlpSpec(activation="relu", init_std=1), optimizer=SgdSpec(lr=1e5), steps=100
    )
    first, second = run_on_ranks(diverge, 2, spec)
    assert first == second
    assert 1 < first < 20


def diverge(spec):
    """Train until it is over, and return the step."""
    with pytest.raises(Diverged, match="the training loss is not finite") as error:
        train_here(spec)
    return error.value.step
