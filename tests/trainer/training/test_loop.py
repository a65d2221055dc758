import math
import shutil

import pytest
import torch

from tests.dist import run_on_ranks
from tests.trainer.factories import make_spec, run_here, train_here
from trainer.errors import ConfigurationError, Diverged
from trainer.jobspec import MlpSpec, SgdSpec
from trainer.models import build_model
from trainer.training.parallel import may_leave_unused


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


@pytest.mark.dist
def test_the_divergence_of_one_worker_ends_the_run_on_all_in_the_same_step():
    model = {"name": "import:tests.trainer.networks:breaks_on_one", "arguments": {"rank": 1, "step": 4}}
    assert run_on_ranks(diverge, 2, make_spec(norm="none", num_workers=2, model=model)) == [4, 4]


def diverge(spec):
    """Train until it is over, and return the step."""
    with pytest.raises(Diverged, match="the training loss is not finite") as error:
        train_here(spec)
    return error.value.step


BACKWARDS = {"name": "import:tests.trainer.networks:backwards"}
CNN = {"name": "cnn", "channels": [4, 8]}
RESNET = {"model": {"name": "torchvision:resnet18"}, "global_batch_size": 8,
          "data": {"name": "digits", "transform": {"resize": 16, "channels": 3}}}  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("norm", ["none", "sync"])
def test_half_precision_comes_near_float32(precision, norm):
    whole = train_here(make_spec(precision="fp32", norm=norm, steps=60, eval_every=60))
    half = train_here(make_spec(precision=precision, norm=norm, steps=60, eval_every=60))
    assert half[1]["test_loss"] == pytest.approx(whole[1]["test_loss"], rel=0.1)
    assert half[0]["linear1.weight"].dtype == torch.float32
    assert not torch.equal(half[0]["linear1.weight"], whole[0]["linear1.weight"])


@pytest.mark.parametrize("norm", ["none", "batch", "sync"])
def test_channels_last_changes_the_memory_and_not_the_result(norm):
    plain = train_here(make_spec(model=CNN, norm=norm))
    last = train_here(make_spec(model=CNN, norm=norm, channels_last=True))
    assert last[1] == pytest.approx(plain[1], abs=1e-9)


def test_channels_last_is_for_images():
    spec = make_spec(channels_last=True, data={"name": "synthetic", "shape": [5], "classes": 3, "train_samples": 100})
    assert train_here(spec)[2].keys() == {0, 10, 20}


@pytest.mark.parametrize("norm", ["batch", "sync"])
def test_activations_that_are_computed_anew_change_nothing(norm):
    spec = make_spec(**RESNET, norm=norm, steps=2, eval_every=2)
    plain = train_here(spec)
    anew = train_here(spec.model_copy(update={"activation_checkpointing": True}))
    assert all(torch.equal(plain[0][name], anew[0][name]) for name in plain[0])


def test_a_model_without_blocks_has_no_activations_to_forget():
    with pytest.raises(ConfigurationError, match="activation_checkpointing: must be used with a model that has blocks"):
        train_here(make_spec(model=BACKWARDS, activation_checkpointing=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of Inductor's pool
def test_a_compiled_model_trains_alike():
    plain = train_here(make_spec(steps=6))
    compiled = train_here(make_spec(steps=6, compile=True))
    assert compiled[0].keys() == plain[0].keys()
    assert compiled[1] == pytest.approx(plain[1], abs=1e-9)


@pytest.mark.parametrize("norm", ["none", "group", "layer"])
def test_parts_of_a_batch_add_up_where_statistics_do_not_depend_on_it(norm):
    whole, parts = train_here(make_spec(norm=norm)), train_here(make_spec(norm=norm, accumulate=7))
    assert parts[1] == pytest.approx(whole[1], abs=1e-9)


@pytest.mark.dist
@pytest.mark.parametrize("changes", [{}, {"clip_norm": 0.1}, {"accumulate": 3}, {"precision": "bf16"}], ids=str)
def test_sharded_parameters_give_what_copies_give(changes):
    spec = make_spec(num_workers=2, **changes)
    copies = run_on_ranks(train_here, 2, spec)[0]
    shards = run_on_ranks(train_whole, 2, spec.model_copy(update={"parallel": "fsdp"}))[0]
    assert shards[1] == pytest.approx(copies[1], abs=1e-9 if spec.precision == "fp64" else 1e-2)


def train_whole(spec):
    """Train with shards, and return metrics alone."""
    result, notes = run_here(spec)
    return None, result.metrics, notes.metrics


@pytest.mark.dist
def test_ghost_batches_are_between_one_and_all():
    """Groups of one worker are what each worker's own statistics are; groups of all are `sync`."""
    alone = run_on_ranks(train_here, 2, make_spec(num_workers=2, norm="batch"))
    groups = run_on_ranks(train_here, 2, make_spec(num_workers=2, sync_group_size=1))
    together = run_on_ranks(train_here, 2, make_spec(num_workers=2, sync_group_size=2))
    plain = run_on_ranks(train_here, 2, make_spec(num_workers=2))
    for rank in range(2):
        assert groups[rank][1] == pytest.approx(alone[rank][1], abs=1e-9)
        assert together[rank][1] == pytest.approx(plain[rank][1], abs=1e-12)
    assert plain[0][1]["test_loss"] != pytest.approx(alone[0][1]["test_loss"], abs=1e-6)


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")
def test_gradients_that_overflow_under_every_loss_scale_are_a_divergence(monkeypatch):
    monkeypatch.setattr("trainer.training.loop.LEAST_SCALE", 2.0**12)
    spec = make_spec(
        precision="fp16", norm="none", model=MlpSpec(hidden=[16], activation="relu", init_std=10), steps=40
    )
    with pytest.raises(Diverged, match=r"overflow under every loss scale|training loss is not finite"):
        train_here(spec.model_copy(update={"optimizer": SgdSpec(lr=1e4)}))


UNUSED = {"name": "import:tests.trainer.networks:unused"}


@pytest.mark.dist
@pytest.mark.parametrize("sometimes", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 2}, {"num_workers": [1, 2]}, {"optimizer": {"name": "adamw", "lr": 0.01}}],
    ids=["plain", "parts", "elastic", "adamw"],
)
def test_parameters_without_gradients_train_on_two_workers_as_on_one(sometimes, changes):
    spec = make_spec(model=UNUSED | {"arguments": {"sometimes": sometimes}}, **{"num_workers": 2} | changes)
    alone, metrics, _ = train_here(spec.model_copy(update={"num_workers": 1}))
    for state, metrics_there, _ in run_on_ranks(train_here, 2, spec):
        assert metrics_there == pytest.approx(metrics, abs=1e-9)
        for name, value in alone.items():
            assert (state[name].double() - value.double()).abs().max() <= 1e-9, name


@pytest.mark.dist
def test_an_unused_parameter_trains_in_shards():
    model = UNUSED | {"arguments": {"sometimes": False}}
    _, metrics, _ = train_here(make_spec(model=model))
    for result in run_on_ranks(train_whole, 2, make_spec(model=model, num_workers=2, parallel="fsdp")):
        assert result[1] == pytest.approx(metrics, abs=1e-9)


def test_unused_parameters_of_library_models_are_found():
    spec = make_spec(model=CNN)
    model = build_model(spec.model, spec.norm, (1, 8, 8), 10, 0)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert not may_leave_unused(model, spec, (1, 8, 8))
    model.register_parameter("never", torch.nn.Parameter(torch.zeros(3)))
    assert may_leave_unused(model, spec, (1, 8, 8))
    assert model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
