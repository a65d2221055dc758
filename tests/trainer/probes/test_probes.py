"""Probes: definitions, several workers against one, and runs with and without probes bit for bit."""

import copy
import random
import shutil

import numpy as np
import pytest
import torch

from tests.dist import run_on_ranks
from tests.trainer.factories import here, make_spec, run_here
from tests.trainer.probes.probing import RATE, RELU, make_batch, make_model
from tests.trainer.scenarios.test_resume import InterruptedRunError, Interrupting
from trainer.jobspec import MlpSpec
from trainer.probes import Probes

EVERYTHING = ["percentiles", "drift", "discrepancy", "variance_share", "gradient_norm", "landscape", "shift"]


def train_measured(spec):
    """Train as one of the ranks, or alone; return the bits of the model state and the measurements."""
    result, notes = run_here(spec)
    parts = {
        name: getattr(value, "to_local", lambda v=value: v)()
        for name, value in result.model.state_dict().items()
    }
    return {name: part.numpy().tobytes() for name, part in parts.items()}, notes.probes


OF_WORKERS = ("discrepancy", "variance_share")


SPLIT_FREE = [probe for probe in EVERYTHING if probe not in OF_WORKERS]


@pytest.mark.dist
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "changes",
    [{"norm": "sync"}, {"norm": "none"}, {"norm": "layer", "gradient_accumulation_steps": 3}],
    ids=str,
)
def test_values_do_not_depend_on_the_number_of_workers(changes, parallel):
    """50 samples divide unevenly over 3 workers, and over parts."""
    settings = {"steps": 5, "parallel": parallel, "probes": {"measure": SPLIT_FREE, "every": 2}} | changes
    _, alone = train_measured(make_spec(**settings))
    assert list(alone) == [0, 2, 4]
    assert all("drift" not in name for name in alone[0])
    for world_size in (2, 3):
        for _, values in run_on_ranks(
            train_measured, world_size, make_spec(num_workers=world_size, **settings)
        ):
            for step_measured, expected in alone.items():
                assert values[step_measured] == pytest.approx(expected, abs=1e-9)


TRACES = {
    "none": {"norm": "none", "model": MlpSpec(hidden=[16, 16], init_std=0.3, dropout=0.3)},
    "batch": {"norm": "batch", "gradient_accumulation_steps": 2},
    "sync": {"norm": "sync"},
    "group": {"norm": "group", "precision": "bf16"},
    "layer": {"norm": "layer", "precision": "fp16"},
    "fsdp": {"parallel": "fsdp"},
    "order": {
        "model": {"name": "import:tests.trainer.networks:backwards"},
        "precision": "fp32",
        "probes": {"layers": ["norms.0"]},
    },
}


@pytest.mark.dist
@pytest.mark.parametrize("changes", TRACES.values(), ids=TRACES.keys())
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_with_probes_has_the_same_bits_as_without(changes, world_size):
    spec = make_spec(num_workers=world_size, steps=7, eval_every=3, **changes)
    without = run_on_ranks(train_measured, world_size, spec)
    probes = {"measure": EVERYTHING, "every": 2} | changes.get("probes", {})
    measured = run_on_ranks(
        train_measured, world_size, make_spec(**spec.model_dump(mode="json") | {"probes": probes})
    )
    assert [bits for bits, _ in measured] == [bits for bits, _ in without]
    assert all(values == measured[0][1] for _, values in measured)
    assert list(measured[0][1]) == [0, 2, 4, 6]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")
def test_a_compiled_model_is_measured_without_changing_bits():
    plain = make_spec(steps=4, compile=True)
    measured = make_spec(steps=4, compile=True, probes={"measure": EVERYTHING, "every": 2})
    (bits, values), (same, _) = train_measured(measured), train_measured(plain)
    assert bits == same
    assert "probe/activation2/unit8/p50" in values[2]


def test_a_measurement_restores_all_state():
    spec = make_spec(norm="batch", model=MlpSpec(hidden=[8], dropout=0.5), probes={"measure": EVERYTHING})
    model = make_model(spec)
    model(make_batch().inputs).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    probes = Probes(spec, model, here())
    values = probes.measure([make_batch()], RATE)
    assert values == Probes(spec, model, here()).measure([make_batch()], RATE)  # the same dropout mask too
    assert all(
        torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True)
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers[1:]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_measures_the_same(tmp_path, world_size):
    spec = make_spec(
        num_workers=world_size, steps=12, checkpoint={"every": 3}, probes={"measure": EVERYTHING, "every": 2}
    )
    _, whole = run_on_ranks(train_measured, world_size, spec)[0]
    for values in run_on_ranks(interrupt_and_resume, world_size, spec, tmp_path):
        assert values == {step_measured: whole[step_measured] for step_measured in (6, 8, 10)}
        assert "probe/activation1/mean_drift" in values[6]


def interrupt_and_resume(spec, folder):
    with pytest.raises(InterruptedRunError):
        run_here(spec, folder, metrics_logger=Interrupting(8))
    return run_here(spec, folder)[1].probes


def test_non_finite_values_are_omitted():
    spec = make_spec(norm="none", model=RELU, probes={"measure": ["landscape", "gradient_norm"]})
    values = Probes(spec, make_model(spec), here()).measure([make_batch()], 1e300)
    assert "probe/gradient_norm" in values
    assert "probe/loss_range" not in values


def test_nothing_is_measured_by_default():
    assert run_here(make_spec(steps=2))[1].probes == {}
