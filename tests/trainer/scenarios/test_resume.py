"""Resumption of an interrupted run: bit-exact, or up to rounding with other numbers of workers."""

import time

import pytest
import torch.distributed as dist

from tests.dist import run_on_ranks
from tests.trainer.factories import (
    InterruptedRunError,
    Interrupting,
    RecordingLogger,
    make_spec,
    run_here,
    train_here,
)
from trainer.checkpoint.state import TrainProgress
from trainer.errors import Preempted
from trainer.jobspec import EarlyStopSpec, MlpSpec
from trainer.training.early_stopping import should_stop, update


def state_of(result):
    """Return the model state as bytes by name."""
    return {name: value.numpy().tobytes() for name, value in result.model.state_dict().items()}


def interrupt(spec, folder, step):
    with pytest.raises(InterruptedRunError):
        run_here(spec, folder, metrics_logger=Interrupting(step))


def finish(spec, folder):
    result, notes = run_here(spec, folder)
    return state_of(result), result.metrics, notes.metrics, notes.resumed_from


def train_and_kill(spec, folder, rank, step):
    """Train, and kill one rank while the others continue."""
    metrics_logger = Interrupting(step, kill=True) if dist.get_rank() == rank else RecordingLogger()
    run_here(spec, folder, metrics_logger=metrics_logger)


class Slow(Interrupting):
    """Metrics logger that takes its time once."""

    def update(self, step):
        if step == 5:
            time.sleep(1)
        super().update(step)


def test_the_time_of_training_includes_that_before_a_resumption(tmp_path):
    spec = make_spec(checkpoint={"every": 3})
    with pytest.raises(InterruptedRunError):
        run_here(spec, tmp_path, metrics_logger=Slow(14))
    _, notes = run_here(spec, tmp_path)
    assert notes.resumed_from == 12
    assert notes.seconds[20] > 1


SPECS = {
    "sync": {},
    "batch": {"norm": "batch"},
    "none, dropout": {"norm": "none", "model": MlpSpec(hidden=[16, 16], init_std=0.3, dropout=0.3)},
    "fp32, cosine, adamw": {
        "precision": "fp32",
        "optimizer": {"name": "adamw", "lr": 0.01},
        "lr_schedule": {"name": "cosine", "warmup_steps": 4},
    },
    "bf16": {"precision": "bf16"},
    "fp16, scaled loss": {"precision": "fp16", "max_grad_norm": 1.0},
    "parts": {"gradient_accumulation_steps": 3},
    "early stop": {
        "early_stop": {"patience": 50},
        "evaluation": {"statistics": "precise", "precise_batches": 4},
    },
    "shuffled by label": {"data_partition": "by_label"},
}


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS.keys())
def test_one_worker_resumes_with_the_bits_of_an_uninterrupted_run(tmp_path, changes):
    spec = make_spec(checkpoint={"every": 3}, **changes)
    whole, metrics, curve, _ = finish(spec, tmp_path / "whole")
    for step in (1, 8, 14):
        interrupt(spec, tmp_path / "cut", step)
    state, metrics_then, curve_then, resumed_from = finish(spec, tmp_path / "cut")
    assert resumed_from == 12
    assert state == whole
    assert metrics_then == metrics
    assert curve_then == {step: values for step, values in curve.items() if step > 12}


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(
    "name", ["sync", "batch", "none, dropout", "fp32, cosine, adamw", "shuffled by label"]
)
def test_several_workers_resume_with_the_bits_of_an_uninterrupted_run(tmp_path, world_size, name):
    spec = make_spec(num_workers=world_size, checkpoint={"every": 3}, **SPECS[name])
    whole = run_on_ranks(finish, world_size, spec, tmp_path / "whole")
    run_on_ranks(interrupt, world_size, spec, tmp_path / "cut", 8)
    assert run_on_ranks(finish, world_size, spec, tmp_path / "cut")[0][3] == 6
    for rank, again in enumerate(run_on_ranks(finish, world_size, spec, tmp_path / "cut")):
        assert again[0] == whole[rank][0]


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killing_a_worker_changes_no_bit_of_the_result(tmp_path, rank):
    """The sums of three workers depend on the order of terms; gradients arrive in another order."""
    model = {"name": "import:tests.trainer.networks:backwards"}
    spec = make_spec(num_workers=3, model=model, checkpoint={"every": 2}, precision="fp32", steps=12)
    whole = run_on_ranks(finish, 3, spec, tmp_path / "whole")
    with pytest.raises((EOFError, RuntimeError)):
        run_on_ranks(train_and_kill, 3, spec, tmp_path / "cut", rank, 7, timeout_seconds=20)
    again = run_on_ranks(finish, 3, spec, tmp_path / "cut")
    assert [state for state, *_ in again] == [state for state, *_ in whole]
    # The checkpoint of step 6 may be incomplete at the kill, after which step 7 began.
    assert {resumed for *_, resumed in again} <= {4, 6}


@pytest.mark.dist
@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2}, {"parallel": "fsdp"}], ids=["plain", "parts", "fsdp"]
)
def test_four_then_two_then_four_workers_equal_one(tmp_path, changes):
    """50 samples divide evenly over neither four workers nor, in two parts, over two."""
    spec = make_spec(num_workers=[2, 4], checkpoint={"every": 1}, **changes)
    alone, metrics, curve = train_here(make_spec(num_workers=1, **changes | {"parallel": "ddp"}))
    run_on_ranks(interrupt, 4, spec, tmp_path, 7)
    run_on_ranks(interrupt, 2, spec, tmp_path, 13)
    for state, metrics_there, curve_there in run_on_ranks(resume_whole, 4, spec, tmp_path):
        for name, value in alone.items():
            assert (state[name].double() - value.double()).abs().max() <= 1e-9, name
        assert metrics_there == pytest.approx(metrics, abs=1e-9)
        assert curve_there == {20: pytest.approx(curve[20], abs=1e-9)}


def resume_whole(spec, folder):
    """Train like train_here, with a sharded model gathered."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    result, notes = run_here(spec, folder)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=False)
    state = get_model_state_dict(result.model, options=options)
    if dist.get_rank() > 0 and spec.parallel == "fsdp":
        state = None
    shared = [state]
    dist.broadcast_object_list(shared, src=0)
    return shared[0], result.metrics, notes.metrics


class DrainedNode:
    """Preemption notice from the second query on."""

    def __init__(self):
        self.looks = 0

    def is_preempted(self):
        self.looks += 1
        return self.looks == 2

    def is_stop_requested(self):
        return False


class StopRequest:
    """Request of the service to stop, seen by rank 0 from the second query on."""

    def __init__(self):
        self.looks = 0

    def is_preempted(self):
        return False

    def is_stop_requested(self):
        assert dist.get_rank() == 0
        self.looks += 1
        return self.looks == 2


def train_until_preempted(spec, folder, notices):
    with pytest.raises(Preempted) as error:
        run_here(spec, folder, notices=notices)
    return error.value.step


@pytest.mark.dist
@pytest.mark.parametrize("notices", [DrainedNode(), StopRequest()])
def test_a_drained_node_or_stopped_attempt_saves_and_no_step_is_lost(tmp_path, notices):
    spec = make_spec(num_workers=2, steps=4_000, eval_every=4_000, precision="fp32")
    first, second = run_on_ranks(train_until_preempted, 2, spec, tmp_path, notices)
    assert first == second > 0
    assert run_on_ranks(finish, 2, spec.model_copy(update={"steps": first + 1}), tmp_path)[0][3] == first


def test_a_time_limit_ends_the_run_with_its_current_result(tmp_path):
    spec = make_spec(steps=10_000_000, eval_every=1_000_000, max_train_seconds=0.5)
    result, notes = run_here(spec, tmp_path)
    assert result.end == "deadline"
    assert 0 < result.step < spec.steps
    assert set(notes.metrics) == {0, result.step}
    again, notes = run_here(spec, tmp_path)
    assert (again.end, again.step, notes.resumed_from) == ("deadline", result.step, result.step)


def test_an_early_stop_is_final(tmp_path):
    spec = make_spec(steps=500, early_stop={"patience": 3}, eval_every=10)
    result, notes = run_here(spec, tmp_path)
    assert result.end == "stopped early"
    best = max(values["accuracy"] for values in notes.metrics.values())
    assert [values["accuracy"] for values in notes.metrics.values()].index(best) == len(notes.metrics) - 4
    again, _ = run_here(spec, tmp_path)
    assert (again.end, again.step) == ("stopped early", result.step)


def test_changing_the_early_stop_metric_resets_its_best(tmp_path):
    first, _ = run_here(make_spec(steps=100, early_stop={"metric": "accuracy"}), tmp_path)
    assert first.end == "finished"
    assert first.metrics["accuracy"] > first.metrics["test_loss"]
    # As a loss, the accuracy would be a best value that no later evaluation reaches, and the first one would
    # end the run.
    second, notes = run_here(
        make_spec(steps=160, eval_every=20, early_stop={"metric": "test_loss", "mode": "max", "patience": 1}),
        tmp_path,
    )
    assert notes.resumed_from == 100
    assert second.step >= 140


@pytest.mark.parametrize(
    ("metric", "mode", "ends"),
    [
        ("test_loss", None, [False, False, False, True]),
        ("calibration_error", None, [False, False, False, True]),
        ("accuracy", None, [False, True, True, True]),
        ("test_loss", "max", [False, True, True, True]),
        ("accuracy", "min", [False, False, False, True]),
    ],
)
def test_patience_uses_the_direction_of_the_metric(metric, mode, ends):
    spec, position, found = EarlyStopSpec(metric=metric, mode=mode, patience=1), TrainProgress(), []
    for value in (0.9, 0.5, 0.4, 0.45):
        position.metrics = {metric: value}
        update(spec, position)
        found.append(should_stop(spec, position))
    assert found == ends


def test_a_loss_as_target_is_reached_from_above():
    spec, position, ends = EarlyStopSpec(metric="test_loss", target=0.5), TrainProgress(), []
    for value in (0.9, 0.6, 0.5):
        position.metrics = {"test_loss": value}
        update(spec, position)
        ends.append(should_stop(spec, position))
    assert ends == [False, False, True]


def test_a_target_reached_by_less_than_min_delta_ends_the_run():
    spec, position = EarlyStopSpec(target=0.8, min_delta=0.01), TrainProgress()
    ends = []
    for accuracy in (0.795, 0.799, 0.803):
        position.metrics = {"accuracy": accuracy}
        update(spec, position)
        ends.append(should_stop(spec, position))
    assert ends == [False, False, True]


def test_a_target_ends_the_run(tmp_path):
    result, notes = run_here(make_spec(steps=500, early_stop={"target": 0.5}))
    assert result.end == "stopped early"
    assert result.metrics["accuracy"] >= 0.5 > list(notes.metrics.values())[-2]["accuracy"]
