import shutil

import pytest
import torch

from tests.dist import run_on_ranks
from tests.trainer.factories import make_spec, run_here, train_here
from trainer.errors import ConfigurationError
from trainer.models import build_model
from trainer.training.parallel import may_leave_unused

BACKWARDS = {"name": "import:tests.trainer.networks:backwards"}


CNN = {"name": "cnn", "channels": [4, 8]}


RESNET = {"model": {"name": "torchvision:resnet18"}, "global_batch_size": 8,
          "data": {"name": "digits", "transform": {"resize": 16, "channels": 3}}}  # fmt: skip


@pytest.mark.parametrize("norm", ["none", "batch", "sync"])
def test_channels_last_changes_the_memory_format_but_not_the_result(norm):
    plain = train_here(make_spec(model=CNN, norm=norm))
    last = train_here(make_spec(model=CNN, norm=norm, channels_last=True))
    assert last[1] == pytest.approx(plain[1], abs=1e-9)


def test_channels_last_is_for_images():
    spec = make_spec(
        channels_last=True, data={"name": "synthetic", "shape": [5], "classes": 3, "train_samples": 100}
    )
    assert train_here(spec)[2].keys() == {0, 10, 20}


@pytest.mark.parametrize("norm", ["batch", "sync"])
def test_activation_recomputation_does_not_change_the_result(norm):
    spec = make_spec(**RESNET, norm=norm, steps=2, eval_every=2)
    plain = train_here(spec)
    recomputed = train_here(spec.model_copy(update={"activation_checkpointing": True}))
    assert all(torch.equal(plain[0][name], recomputed[0][name]) for name in plain[0])


def test_a_model_without_blocks_cannot_recompute_activations():
    with pytest.raises(
        ConfigurationError, match="activation_checkpointing: must be used with a model that has blocks"
    ):
        train_here(make_spec(model=BACKWARDS, activation_checkpointing=True))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of Inductor's pool
def test_a_compiled_model_trains_equally():
    plain = train_here(make_spec(steps=6))
    compiled = train_here(make_spec(steps=6, compile=True))
    assert compiled[0].keys() == plain[0].keys()
    assert compiled[1] == pytest.approx(plain[1], abs=1e-9)


@pytest.mark.dist
@pytest.mark.parametrize(
    "changes",
    [{}, {"max_grad_norm": 0.1}, {"gradient_accumulation_steps": 3}, {"precision": "bf16"}],
    ids=str,
)
def test_sharded_parameters_give_the_result_of_replicas(changes):
    spec = make_spec(num_workers=2, **changes)
    copies = run_on_ranks(train_here, 2, spec)[0]
    shards = run_on_ranks(train_whole, 2, spec.model_copy(update={"parallel": "fsdp"}))[0]
    assert shards[1] == pytest.approx(copies[1], abs=1e-9 if spec.precision == "fp64" else 1e-2)


def train_whole(spec):
    """Train with shards and return only the metrics."""
    result, notes = run_here(spec)
    return None, result.metrics, notes.metrics


@pytest.mark.dist
def test_ghost_batches_range_from_one_worker_to_all():
    """Groups of one worker equal per-worker statistics; a group of all equals `sync`."""
    alone = run_on_ranks(train_here, 2, make_spec(num_workers=2, norm="batch"))
    groups = run_on_ranks(train_here, 2, make_spec(num_workers=2, sync_group_size=1))
    together = run_on_ranks(train_here, 2, make_spec(num_workers=2, sync_group_size=2))
    plain = run_on_ranks(train_here, 2, make_spec(num_workers=2))
    for rank in range(2):
        assert groups[rank][1] == pytest.approx(alone[rank][1], abs=1e-9)
        assert together[rank][1] == pytest.approx(plain[rank][1], abs=1e-12)
    assert plain[0][1]["test_loss"] != pytest.approx(alone[0][1]["test_loss"], abs=1e-6)


UNUSED = {"name": "import:tests.trainer.networks:unused"}


@pytest.mark.dist
@pytest.mark.parametrize("sometimes", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"num_workers": [1, 2]},
        {"optimizer": {"name": "adamw", "lr": 0.01}},
    ],
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
