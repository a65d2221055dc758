import math

import pytest
import torch

from tests.dist import run_on_ranks
from tests.trainer.factories import make_spec, train_here
from trainer.errors import Diverged
from trainer.jobspec import MlpSpec, SgdSpec


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_under_sync_the_number_of_workers_changes_nothing(world_size):
    """50 samples over 3 or 4 workers divide unevenly: the loss must be weighted."""
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
def test_under_batch_workers_keep_separate_statistics_and_evaluate_with_those_of_rank_0():
    first, second = run_on_ranks(train_here, 2, make_spec(norm="batch", num_workers=2))
    assert first[1] == second[1]
    assert torch.equal(first[0]["linear1.weight"], second[0]["linear1.weight"])
    assert (first[0]["norm1.running_mean"] - second[0]["norm1.running_mean"]).abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["none", "batch", "sync", "group", "layer"])
def test_training_with_every_norm_improves_accuracy(norm):
    model = MlpSpec(hidden=[32, 32], activation="relu", init_std=0.2)
    spec = make_spec(
        norm=norm, model=model, steps=150, eval_every=150, precision="fp32", optimizer=SgdSpec(lr=0.1)
    )
    _, metrics, curve = train_here(spec)
    assert metrics["accuracy"] > 0.8
    assert curve[150]["train_loss"] < curve[0]["test_loss"]
    assert math.isfinite(metrics["test_loss"])


def test_the_same_spec_gives_the_same_bits():
    spec = make_spec(precision="fp32")
    first, again, other = (
        train_here(spec)[0],
        train_here(spec)[0],
        train_here(spec.model_copy(update={"seed": 1}))[0],
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear1.weight"], other["linear1.weight"])


def test_the_last_step_is_always_evaluated():
    _, _, curve = train_here(make_spec(steps=7, eval_every=5))
    assert list(curve) == [0, 5, 7]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("norm", ["none", "sync"])
def test_half_precision_is_close_to_float32(precision, norm):
    whole = train_here(make_spec(precision="fp32", norm=norm, steps=60, eval_every=60))
    half = train_here(make_spec(precision=precision, norm=norm, steps=60, eval_every=60))
    assert half[1]["test_loss"] == pytest.approx(whole[1]["test_loss"], rel=0.1)
    assert half[0]["linear1.weight"].dtype == torch.float32
    assert not torch.equal(half[0]["linear1.weight"], whole[0]["linear1.weight"])


@pytest.mark.parametrize("norm", ["none", "group", "layer"])
def test_parts_of_a_batch_add_up_where_statistics_do_not_depend_on_it(norm):
    whole, parts = (
        train_here(make_spec(norm=norm)),
        train_here(make_spec(norm=norm, gradient_accumulation_steps=7)),
    )
    assert parts[1] == pytest.approx(whole[1], abs=1e-9)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
def test_gradients_that_overflow_at_every_loss_scale_are_a_divergence(monkeypatch):
    monkeypatch.setattr("trainer.training.loop.MIN_LOSS_SCALE", 2.0**12)
    spec = make_spec(
        precision="fp16", norm="none", model=MlpSpec(hidden=[16], activation="relu", init_std=10), steps=40
    )
    with pytest.raises(Diverged, match=r"overflow under every loss scale|training loss is not finite"):
        train_here(spec.model_copy(update={"optimizer": SgdSpec(lr=1e4)}))
