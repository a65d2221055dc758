import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from tests.trainer.factories import InterruptedRunError, Interrupting, make_spec, run_here
from tests.trainer.training.schedules import schedule
from trainer.checkpoint.state import TrainProgress
from trainer.errors import ConfigurationError
from trainer.jobspec import (
    CnnSpec,
    CosineSchedule,
    MlpSpec,
    Norm,
    OptimizerSpec,
    SgdSpec,
)
from trainer.jobspec.optimizers import TORCH_OPTIMIZERS
from trainer.models import build_model
from trainer.training.optim import build_optimizer, build_schedule, extend_schedule, rate_factor

INTERNAL = {"self", "params", "lr", "weight_decay", "capturable", "differentiable"}


def optimizer_spec(**content):
    return TypeAdapter(OptimizerSpec).validate_python(content)


def test_the_table_of_optimizers_matches_torch():
    classes = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    }
    assert classes.keys() - TORCH_OPTIMIZERS.keys() == {"LBFGS", "SparseAdam", "Muon", "Rprop"}
    for name, arguments in TORCH_OPTIMIZERS.items():
        assert set(inspect.signature(classes[name]).parameters) - INTERNAL == arguments, name


@pytest.mark.parametrize("name", sorted(TORCH_OPTIMIZERS))
def test_each_optimizer_trains(name):
    rate = 0.5 if name in ("Adadelta", "SGD", "ASGD") else 0.01
    spec = make_spec(
        optimizer={"name": f"torch:{name}", "lr": rate, "weight_decay": 1e-4}, steps=60, eval_every=60
    )
    result, notes = run_here(spec)
    assert notes.metrics[60]["test_loss"] < notes.metrics[0]["test_loss"]
    assert result.step == 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "torch:Adams"}, "must be torch: and one of"),
        ({"name": "torch:LBFGS"}, "must be torch: and one of"),
        ({"name": "torch:Adam", "arguments": {"momentum": 0.9}}, "must be among amsgrad, betas"),
        ({"name": "adam"}, "name must be sgd, adamw or torch:"),
        ({"name": "sgd", "nesterov": True}, "must be used with a momentum above 0"),
        ({"name": "adamw", "betas": [0.9]}, "at least 2 items"),
    ],
)
def test_unknown_optimizers_are_rejected_before_the_run(content, message):
    with pytest.raises(ValidationError, match=message):
        optimizer_spec(**content)


def test_values_rejected_by_torch_name_the_field():
    model = build_model(MlpSpec(hidden=[4]), Norm.NONE, (4,), 2, 0)
    with pytest.raises(
        ConfigurationError, match=r"optimizer\.arguments: must be valid arguments of torch:Adam"
    ):
        build_optimizer(optimizer_spec(name="torch:Adam", arguments={"betas": [2.0, 0.9]}), model)


def decay_of(optimizer):
    return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("norm", ["none", "batch", "sync", "group", "layer"])
def test_only_weight_matrices_and_kernels_decay(norm):
    model = build_model(CnnSpec(channels=[4, 8]), Norm(norm), (1, 8, 8), 3, seed=0)
    decay = decay_of(build_optimizer(SgdSpec(weight_decay=0.01), model))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.01 if parameter.ndim > 1 else 0), name
    assert len(decay) == len(list(model.parameters()))


def test_all_parameters_decay_on_request():
    model = build_model(MlpSpec(hidden=[4]), Norm.SYNC, (4,), 2, 0)
    assert set(decay_of(build_optimizer(SgdSpec(weight_decay=0.01, decay_all=True), model)).values()) == {
        0.01
    }


STEPS = 100


rates = st.floats(0.01, 1)


schedules = st.one_of(
    st.builds(dict, name=st.just("constant"), warmup_steps=st.integers(0, 20), warmup_factor=st.floats(0, 1)),
    st.builds(
        dict,
        name=st.just("step"),
        steps=st.lists(st.integers(1, 99), min_size=1, unique=True).map(sorted),
        factor=rates,
        warmup_steps=st.integers(0, 20),
    ),
    st.builds(
        dict,
        name=st.just("exponential"),
        factor=rates,
        every=st.integers(1, 50),
        warmup_steps=st.integers(0, 20),
    ),
    st.builds(dict, name=st.just("cosine"), final_factor=st.floats(0, 1), warmup_steps=st.integers(0, 99)),
)


@given(schedules, st.integers(0, STEPS))
def test_a_rate_increases_only_during_warm_up(content, step):
    spec = schedule(**content)
    now, then = rate_factor(spec, step, STEPS), rate_factor(spec, step + 1, STEPS)
    assert 0 <= now <= 1 + 1e-12
    if step + 1 < spec.warmup_steps:
        assert then >= now
    elif step >= spec.warmup_steps:
        assert then <= now + 1e-12


@settings(deadline=None)  # builds a model and an optimizer
@given(schedules, st.integers(0, STEPS - 1))
def test_a_resumed_schedule_gives_the_same_rates(content, at):
    def rates_from(start):
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        built = build_schedule(schedule(**content), optimizer, TrainProgress(schedule_end=STEPS))
        if start:
            built.load_state_dict(saved)
        seen = []
        for step in range(start, STEPS):
            seen.append(built.get_last_lr()[0])
            optimizer.step()
            built.step()
            if step + 1 == at:
                saved.update(built.state_dict())
        return seen

    saved = {}
    whole = rates_from(0)
    assert rates_from(at) == whole[at:]


@pytest.mark.parametrize(
    ("content", "step", "factor"),
    [
        ({"name": "constant"}, 50, 1),
        ({"name": "constant", "warmup_steps": 10}, 0, 0.1),
        ({"name": "constant", "warmup_steps": 10, "warmup_factor": 0.5}, 9, 1),
        ({"name": "step", "steps": [10, 20]}, 9, 1),
        ({"name": "step", "steps": [10, 20]}, 20, 0.01),
        ({"name": "exponential", "factor": 0.5, "every": 10}, 20, 0.25),
        ({"name": "exponential", "factor": 0.5, "every": 10}, 5, math.sqrt(0.5)),
        ({"name": "cosine"}, 50, 0.5),
        ({"name": "cosine", "final_factor": 0.1}, 100, 0.1),
        ({"name": "cosine", "warmup_steps": 50}, 75, 0.5),
    ],
)
def test_factors_of_schedules(content, step, factor):
    assert rate_factor(schedule(**content), step, STEPS) == pytest.approx(factor)


def test_the_learning_rate_is_logged():
    _, notes = run_here(make_spec(lr_schedule=CosineSchedule(name="cosine"), steps=20, eval_every=10))
    assert [values["learning_rate"] for values in notes.metrics.values()] == pytest.approx([0.5, 0.25, 0])


COSINE = {"name": "cosine", "warmup_steps": 2}


EXTENSIONS = [("continue", 0, 20), ("restart", 20, 40), ("rescale", 0, 40)]


def extended_rate(step, start, end):
    return 0.5 * rate_factor(schedule(**COSINE), step - start, end - start)


@pytest.mark.parametrize(("on_extend", "start", "end"), EXTENSIONS)
def test_a_cosine_schedule_is_extended_as_the_spec_chooses(tmp_path, capsys, on_extend, start, end):
    def resume(steps):
        spec = make_spec(
            lr_schedule=COSINE, eval_every=1, checkpoint={"every": 5}, steps=steps, on_extend=on_extend
        )
        return run_here(spec, tmp_path)[1]

    resume(20)
    notes = resume(40)
    assert notes.resumed_from == 20
    rates = {step: values["learning_rate"] for step, values in notes.metrics.items()}
    assert rates == pytest.approx({step: extended_rate(step, start, end) for step in range(21, 41)})
    assert "on_extend: the cosine schedule" in capsys.readouterr().out


@pytest.mark.parametrize(("on_extend", "start", "end"), EXTENSIONS)
def test_the_first_step_after_an_extension_has_its_rate(on_extend, start, end):
    position = TrainProgress(schedule_end=20)
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.5)
    built = build_schedule(schedule(**COSINE), optimizer, position)
    for position.step in range(1, 21):
        optimizer.step()
        built.step()
    extend_schedule(make_spec(lr_schedule=COSINE, steps=40, on_extend=on_extend), built, position)
    assert (
        built.get_last_lr()
        == [optimizer.param_groups[0]["lr"]]
        == [pytest.approx(extended_rate(20, start, end))]
    )


def test_changing_the_steps_of_a_cosine_schedule_needs_an_explicit_choice(tmp_path):
    run_here(make_spec(lr_schedule=COSINE), tmp_path)
    with pytest.raises(ConfigurationError, match=r"on_extend: must be continue, .* over 20 steps"):
        run_here(make_spec(lr_schedule=COSINE, steps=40), tmp_path)
    assert run_here(make_spec(lr_schedule=COSINE, steps=10), tmp_path)[0].step == 20  # has no steps left


def test_an_extended_run_keeps_its_rates_when_resumed(tmp_path):
    changes = {"lr_schedule": COSINE, "eval_every": 1, "checkpoint": {"every": 5}, "on_extend": "restart"}
    run_here(make_spec(**changes), tmp_path)
    with pytest.raises(InterruptedRunError):
        run_here(make_spec(steps=40, **changes), tmp_path, metrics_logger=Interrupting(32))
    _, notes = run_here(make_spec(steps=40, **changes), tmp_path)
    assert notes.resumed_from == 30
    assert notes.metrics[31]["learning_rate"] == pytest.approx(extended_rate(31, 20, 40))


def test_gradients_are_clipped():
    free, _ = run_here(make_spec(steps=1, norm="none"))
    held, _ = run_here(make_spec(steps=1, norm="none", max_grad_norm=1e-3))
    start, _ = run_here(make_spec(steps=1, norm="none", optimizer=SgdSpec(lr=1e-30)))

    def way(result):
        pairs = zip(result.model.parameters(), start.model.parameters(), strict=True)
        return sum((a - b).detach().square().sum() for a, b in pairs).sqrt()

    assert way(held) == pytest.approx(0.5 * 1e-3, rel=1e-5)  # torch adds 1e-6 to the norm
    assert way(free) > 10 * way(held)
