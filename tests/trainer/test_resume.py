"""A run that was interrupted goes on as if nothing had happened, to the last bit; with other numbers of workers, to rounding."""

import pytest
import torch.distributed as dist

from tests.dist import run_on_ranks
from tests.trainer.factories import InterruptedRunError, Interrupting, Notes, make_spec, run_here, train_here
from trainer.checkpoint.state import TrainProgress
from trainer.errors import Preempted
from trainer.jobspec import EarlyStopSpec, MlpSpec
from trainer.training.early_stopping import should_stop, update


def state_of(result):
    """All that a model holds, as bytes by name."""
    return {name: value.numpy().tobytes() for name, value in result.model.state_dict().items()}


def interrupt(spec, folder, step):
    with pytest.raises(InterruptedRunError):
        run_here(spec, folder, journal=Interrupting(step))


def finish(spec, folder):
    result, notes = run_here(spec, folder)
    return state_of(result), result.metrics, notes.metrics, notes.resumed_from


def be_killed(spec, folder, rank, step):
    """Train, and have one rank killed while the others go on."""
    journal = Interrupting(step, kill=True) if dist.get_rank() == rank else Notes()
    run_here(spec, folder, journal=journal)


SPECS = {
    "sync": {},
    "batch": {"norm": "batch"},
    "none, dropout": {"norm": "none", "model": MlpSpec(hidden=[16, 16], init_std=0.3, dropout=0.3)},
    "fp32, cosine, adamw": {
        "precision": "fp32",
        "optimizer": {"name": "adamw", "lr": 0.01},
        "schedule": {"name": "cosine", "warmup_steps": 4},
    },
    "bf16": {"precision": "bf16"},
    "fp16, scaled loss": {"precision": "fp16", "clip_norm": 1.0},
    "parts": {"accumulate": 3},
    "early stop": {"early_stop": {"patience": 50}, "evaluation": {"statistics": "precise", "precise_batches": 4}},
    "shuffled by label": {"sharding": "by_label"},
}


@pytest.mark.parametrize("changes", SPECS.values(), ids=SPECS.keys())
def test_alone_the_bits_are_those_of_an_uninterrupted_run(tmp_path, changes):
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
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", ["sync", "batch", "none, dropout", "fp32, cosine, adamw", "shuffled by label"])
def test_on_several_workers_too(tmp_path, world_size, name):
    spec = make_spec(num_workers=world_size, checkpoint={"every": 3}, **SPECS[name])
    whole = run_on_ranks(finish, world_size, spec, tmp_path / "whole")
    run_on_ranks(interrupt, world_size, spec, tmp_path / "cut", 8)
    assert run_on_ranks(finish, world_size, spec, tmp_path / "cut")[0][3] == 6
    for rank, again in enumerate(run_on_ranks(finish, world_size, spec, tmp_path / "cut")):
        assert again[0] == whole[rank][0]


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 2])
def test_a_worker_that_is_killed_costs_no_bit(tmp_path, rank):
    """Three workers, whose sums depend on the order of the summands, on a network whose gradients come in another order."""
    model = {"name": "import:tests.trainer.networks:backwards"}
    spec = make_spec(num_workers=3, model=model, checkpoint={"every": 2}, precision="fp32", steps=12)
    whole = run_on_ranks(finish, 3, spec, tmp_path / "whole")
    with pytest.raises((EOFError, RuntimeError)):
        run_on_ranks(be_killed, 3, spec, tmp_path / "cut", rank, 7, timeout_seconds=20)
    again = run_on_ranks(finish, 3, spec, tmp_path / "cut")
    assert [state for state, *_ in again] == [state for state, *_ in whole]
    # That of step 6 may not have been finished when the worker was killed, after which step 7 began.
    assert {resumed for *_, resumed in again} <= {4, 6}


@pytest.mark.dist
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"parallel": "fsdp"}], ids=["plain", "parts", "fsdp"])
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
    """As train_here, with a sharded model put together."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    result, notes = run_here(spec, folder)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=False)
    state = get_model_state_dict(result.model, options=options)
    if dist.get_rank() > 0 and spec.parallel == "fsdp":
        state = None
    shared = [state]
    dist.broadcast_object_list(shared, src=0)
    return shared[0], result.metrics, notes.metrics


class NodeGoes:
    """Notices of a node that is drained from the second look on."""

    def __init__(self):
        self.looks = 0

    def is_preempted(self):
        self.looks += 1
        return self.looks == 2


def be_preempted(spec, folder):
    with pytest.raises(Preempted) as error:
        run_here(spec, folder, notices=NodeGoes())
    return error.value.step


@pytest.mark.dist
def test_a_drained_node_saves_before_it_goes_and_no_step_is_lost(tmp_path, monkeypatch):
    spec = make_spec(num_workers=2, steps=4_000, eval_every=4_000, precision="fp32")
    first, second = run_on_ranks(be_preempted, 2, spec, tmp_path)
    assert first == second > 0
    assert run_on_ranks(finish, 2, spec.model_copy(update={"steps": first + 1}), tmp_path)[0][3] == first


def test_a_deadline_ends_the_run_with_what_it_has(tmp_path):
    spec = make_spec(steps=10_000_000, eval_every=1_000_000, deadline_seconds=0.5)
    result, notes = run_here(spec, tmp_path)
    assert result.end == "deadline"
    assert 0 < result.step < spec.steps
    assert set(notes.metrics) == {0, result.step}
    again, notes = run_here(spec, tmp_path)
    assert (again.end, again.step, notes.resumed_from) == ("deadline", result.step, result.step)


def test_an_early_stop_stays_one(tmp_path):
    spec = make_spec(steps=500, early_stop={"patience": 3}, eval_every=10)
    result, notes = run_here(spec, tmp_path)
    assert result.end == "stopped early"
    best = max(values["accuracy"] for values in notes.metrics.values())
    assert [values["accuracy"] for values in notes.metrics.values()].index(best) == len(notes.metrics) - 4
    again, _ = run_here(spec, tmp_path)
    assert (again.end, again.step) == ("stopped early", result.step)


def test_an_early_stop_by_another_metric_does_not_count_on_the_old_ones_best(tmp_path):
    first, _ = run_here(make_spec(steps=100, early_stop={"metric": "accuracy"}), tmp_path)
    assert first.end == "finished"
    assert first.metrics["accuracy"] > first.metrics["test_loss"]
    # Taken for a loss, the accuracy would be one that no later evaluation comes up to, and the first of them the end.
    second, notes = run_here(
        make_spec(steps=160, eval_every=20, early_stop={"metric": "test_loss", "mode": "max", "patience": 1}), tmp_path
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
def test_patience_ends_the_run_by_the_direction_of_the_metric(metric, mode, ends):
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


def test_a_target_ends_the_run_though_it_is_reached_by_less_than_counts_as_improvement():
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
