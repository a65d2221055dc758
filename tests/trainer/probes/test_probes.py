"""Each probe against its definition written out; on several workers against one; and the run without them, bit for bit."""

import copy
import math
import random
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from syncbn import Moments
from tests.dist import run_on_ranks
from tests.trainer.factories import here, make_spec, run_here
from tests.trainer.test_resume import InterruptedRunError, Interrupting
from trainer.data import Batch
from trainer.errors import ConfigurationError
from trainer.jobspec import MlpSpec
from trainer.models import build_model
from trainer.probes import Probes
from trainer.probes.statistics import discrepancy

EVERYTHING = ["percentiles", "drift", "discrepancy", "variance_share", "gradient_norm", "landscape", "shift"]
RATE = 0.3
RELU = MlpSpec(hidden=[16, 12], init_std=0.3, activation="relu")


def make_model(spec, shape=(64,)):
    return build_model(spec.model, spec.norm, shape, 10, spec.seed).double()


def make_batch(count=50, shape=(64,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(count, *shape, generator=generator, dtype=torch.float64),
        torch.randint(10, (count,), generator=generator),
    )


def measure(spec, *batches, shape=(64,)):
    """Measure on batches, one after the other, and return what came of the last."""
    probes = Probes(spec, make_model(spec, shape), here())
    return [probes.measure([batch], RATE) for batch in batches][-1]


def differentiate(model, batch):
    loss = F.cross_entropy(model(batch.inputs), batch.labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return float(loss.detach()), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def step(model, gradients, rate, names=None):
    """Return a copy of the model that has taken a step, or of which some parameters have."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if names is None or name in names:
                parameter -= rate * gradients[name]
    return moved


def norm_of(vectors):
    return math.sqrt(sum(float(vector.square().sum()) for vector in vectors))


@pytest.mark.parametrize("norm", ["none", "sync"])
def test_percentiles_are_those_of_the_middle_unit_before_the_activation(norm):
    spec = make_spec(norm=norm, model=RELU, probes={"measure": ["percentiles"]})
    values = measure(spec, make_batch())
    model = make_model(spec)
    inputs = model[: list(dict(model.named_children())).index("activation2")](make_batch().inputs)
    expected = np.percentile(inputs[:, 6].detach(), [15, 50, 85])
    assert [values[f"probe/activation2/unit6/p{percent}"] for percent in (15, 50, 85)] == pytest.approx(expected)
    assert len(values) == 6


def test_a_unit_of_a_convolution_is_a_map_with_all_its_positions():
    spec = make_spec(model={"name": "cnn", "channels": [4, 6]}, norm="none", probes={"measure": ["percentiles"]})
    values = measure(spec, make_batch(shape=(1, 8, 8)), shape=(1, 8, 8))
    maps = make_model(spec, (1, 8, 8)).conv1(make_batch(shape=(1, 8, 8)).inputs)[:, 2]
    assert values["probe/activation1/unit2/p85"] == pytest.approx(np.percentile(maps.detach(), 85))


def test_drift_is_in_standard_deviations_and_variances_of_the_time_before():
    spec = make_spec(norm="none", probes={"measure": ["drift"], "layers": ["linear2"]})
    first, second = make_batch(seed=1), make_batch(seed=2)
    assert measure(spec, first) == {}
    values = measure(spec, first, second)
    model = make_model(spec)
    layer = list(dict(model.named_children())).index("linear2")
    before, after = (model[: layer + 1](batch.inputs).detach() for batch in (first, second))
    variance, variance_after = before.var(0, correction=0), after.var(0, correction=0)
    assert values == {
        "probe/linear2/mean_drift": pytest.approx(
            float(((after.mean(0) - before.mean(0)).abs() / variance.sqrt()).mean())
        ),
        "probe/linear2/variance_drift": pytest.approx(float(((variance_after - variance).abs() / variance).mean())),
    }


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_gradient_norms_are_those_of_the_mean_loss(norm):
    spec = make_spec(norm=norm, probes={"measure": ["gradient_norm"]})
    values = measure(spec, make_batch())
    _, gradients = differentiate(make_model(spec), make_batch())
    assert values["probe/gradient_norm"] == pytest.approx(norm_of(gradients.values()))
    layer = [gradient for name, gradient in gradients.items() if name.startswith("linear2.")]
    assert values["probe/linear2/gradient_norm"] == pytest.approx(norm_of(layer))


def test_the_landscape_is_the_loss_and_the_gradient_along_the_step():
    spec = make_spec(norm="batch", model=RELU, probes={"measure": ["landscape"]})
    values = measure(spec, make_batch())
    model = make_model(spec)
    _, gradients = differentiate(model, make_batch())
    there = [differentiate(step(model, gradients, RATE * size), make_batch()) for size in (0.5, 1, 2, 4)]
    losses = [loss for loss, _ in there]
    change = max(norm_of(other[name] - gradients[name] for name in gradients) for _, other in there)
    assert values == {
        "probe/loss_least": pytest.approx(min(losses)),
        "probe/loss_most": pytest.approx(max(losses)),
        "probe/loss_range": pytest.approx(max(losses) - min(losses)),
        "probe/gradient_change": pytest.approx(change),
        "probe/gradient_change_ratio": pytest.approx(change / norm_of(gradients.values())),
    }


@pytest.mark.parametrize(
    ("changes", "layer", "own", "below"),
    [
        ({}, "output", "output.", ("linear1.", "norm1.", "linear2.", "norm2.")),
        ({"probes": {"measure": ["shift"], "layers": ["linear2"]}}, "linear2", "linear2.", ("linear1.", "norm1.")),
        # Modules that are called in another order than they are made in.
        ({"model": {"name": "import:tests.trainer.networks:backwards"}}, "layers.1", "layers.1.", ("layers.0.", "norms.0.")),
    ],
    ids=["last", "named", "backwards"],
)  # fmt: skip
def test_the_shift_is_of_a_layers_gradient_by_the_step_of_those_below(changes, layer, own, below):
    spec = make_spec(**{"norm": "batch", "model": RELU, "probes": {"measure": ["shift"]}} | changes)
    values = measure(spec, make_batch())
    model = make_model(spec)
    _, gradients = differentiate(model, make_batch())
    _, shifted = differentiate(
        step(model, gradients, RATE, [name for name in gradients if name.startswith(below)]), make_batch()
    )
    names = [name for name in gradients if name.startswith(own)]
    before, after = (torch.cat([source[name].flatten() for name in names]) for source in (gradients, shifted))
    assert values[f"probe/{layer}/shift"] == pytest.approx(float((after - before).norm()))
    assert values[f"probe/{layer}/shift_cosine"] == pytest.approx(float(F.cosine_similarity(before, after, dim=0)))
    assert values[f"probe/{layer}/shift"] > 1e-4
    assert "probe/linear1/shift" not in values


@pytest.mark.parametrize(("samples", "expected"), [(2, 0.570), (4, 0.394), (8, 0.284), (16, 0.201), (32, 0.138)])
def test_the_discrepancy_of_independent_workers_follows_theory(samples, expected):
    """√(2/(π·b)) for many workers; two of them know half of each other's samples."""
    values = torch.randn(512, samples, 400, generator=torch.Generator().manual_seed(0))
    found = discrepancy([Moments.measure(part) for part in values])
    assert found == pytest.approx(math.sqrt(2 / (math.pi * samples)), rel=0.02)
    assert found == pytest.approx(expected, rel=0.04)
    pairs = [discrepancy([Moments.measure(part) for part in pair]) for pair in values.split(2)]
    if samples >= 8:  # below, the standard deviation of so few samples is too small
        assert np.mean(pairs) == pytest.approx(math.sqrt(1 / (math.pi * samples)), rel=0.05)


def see_workers(spec):
    """Measure on this rank's share of a batch, uneven ones; return also what the layer itself says of its variance."""
    batch, rank, size = make_batch(), here().rank, here().world_size
    share = Batch(batch.inputs.tensor_split(size)[rank], batch.labels.tensor_split(size)[rank])
    model = make_model(spec)
    values = Probes(spec, model, here()).measure([share], RATE)
    model.norm1.track_between_rank_variance = True
    model(share.inputs)
    return values, getattr(model.norm1, "between_worker_variance_share", None)


@pytest.mark.dist
def test_discrepancy_and_variance_share_are_of_the_workers_shares_before_the_norm():
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
def test_the_discrepancy_used_is_that_of_the_statistics_that_are_shared():
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
    assert alone == {"probe/activation1/discrepancy": 0, "probe/activation2/discrepancy": 0}


def measure_grouped(spec):
    share = make_batch(48)
    rank = dist.get_rank()
    return Probes(spec, make_model(make_spec()), here()).measure(
        [Batch(share.inputs.tensor_split(4)[rank], share.labels.tensor_split(4)[rank])], RATE
    )


def train_measured(spec):
    """Train as one of the ranks, or alone; return the bits of all that the model holds, and what was measured."""
    result, notes = run_here(spec)
    parts = {name: getattr(value, "to_local", lambda v=value: v)() for name, value in result.model.state_dict().items()}
    return {name: part.numpy().tobytes() for name, part in parts.items()}, notes.probes


OF_WORKERS = ("discrepancy", "variance_share")
SPLIT_FREE = [probe for probe in EVERYTHING if probe not in OF_WORKERS]


@pytest.mark.dist
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("changes", [{"norm": "sync"}, {"norm": "none"}, {"norm": "layer", "accumulate": 3}], ids=str)
def test_values_do_not_depend_on_the_number_of_workers(changes, parallel):
    """50 samples divide unevenly over 3 workers, and over parts."""
    settings = {"steps": 5, "parallel": parallel, "probes": {"measure": SPLIT_FREE, "every": 2}} | changes
    _, alone = train_measured(make_spec(**settings))
    assert list(alone) == [0, 2, 4]
    assert all("drift" not in name for name in alone[0])
    for world_size in (2, 3):
        for _, values in run_on_ranks(train_measured, world_size, make_spec(num_workers=world_size, **settings)):
            for step_measured, expected in alone.items():
                assert values[step_measured] == pytest.approx(expected, abs=1e-9)


TRACES = {
    "none": {"norm": "none", "model": MlpSpec(hidden=[16, 16], init_std=0.3, dropout=0.3)},
    "batch": {"norm": "batch", "accumulate": 2},
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
def test_a_run_has_the_bits_that_it_has_without_probes(changes, world_size):
    spec = make_spec(num_workers=world_size, steps=7, eval_every=3, **changes)
    without = run_on_ranks(train_measured, world_size, spec)
    probes = {"measure": EVERYTHING, "every": 2} | changes.get("probes", {})
    measured = run_on_ranks(train_measured, world_size, make_spec(**spec.model_dump(mode="json") | {"probes": probes}))
    assert [bits for bits, _ in measured] == [bits for bits, _ in without]
    assert all(values == measured[0][1] for _, values in measured)
    assert list(measured[0][1]) == [0, 2, 4, 6]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on CPUs")
def test_a_compiled_model_is_measured_too_and_has_the_same_bits_after():
    plain = make_spec(steps=4, compile=True)
    measured = make_spec(steps=4, compile=True, probes={"measure": EVERYTHING, "every": 2})
    (bits, values), (same, _) = train_measured(measured), train_measured(plain)
    assert bits == same
    assert "probe/activation2/unit8/p50" in values[2]


def test_what_was_there_before_a_measurement_is_there_after():
    spec = make_spec(norm="batch", model=MlpSpec(hidden=[8], dropout=0.5), probes={"measure": EVERYTHING})
    model = make_model(spec)
    model(make_batch().inputs).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    probes = Probes(spec, model, here())
    values = probes.measure([make_batch()], RATE)
    assert values == Probes(spec, model, here()).measure([make_batch()], RATE)  # the same dropout too
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
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
        run_here(spec, folder, journal=Interrupting(8))
    return run_here(spec, folder)[1].probes


def test_tokens_have_their_channels_last_and_a_module_used_twice_is_two_places():
    vit = {"name": "timm:vit_tiny_patch16_224", "arguments": {"img_size": 32, "depth": 1}}
    spec = make_spec(model=vit, norm="layer", probes={"measure": ["percentiles", "discrepancy"]})
    values = measure(spec, make_batch(4, (3, 32, 32)), shape=(3, 32, 32))
    assert {"probe/blocks.0.mlp.act/unit384/p50", "probe/blocks.0.norm1/discrepancy"} <= values.keys()
    spec = make_spec(model={"name": "torchvision:resnet18"}, probes={"measure": ["percentiles"]})
    values = measure(spec, make_batch(4, (3, 32, 32)), shape=(3, 32, 32))
    assert {"probe/layer4.1.relu/unit256/p50", "probe/layer4.1.relu:2/unit256/p50"} <= values.keys()


@pytest.mark.parametrize(
    ("probes", "takes"),
    [
        ({"measure": ["drift"], "layers": ["layers.1", "layers.9"]}, r"such as layers.*'layers.9'"),
        ({"measure": ["shift"], "layers": ["norms"]}, "must be modules with trained weights for the measurement shift"),
    ],
)
def test_layers_that_are_not_there_are_refused_by_name(probes, takes):
    with pytest.raises(ConfigurationError, match=takes) as error:
        run_here(make_spec(model={"name": "import:tests.trainer.networks:backwards"}, norm="none", probes=probes))
    assert error.value.field == "probes.layers"


def test_a_model_without_activation_modules_takes_named_layers():
    model = {"name": "import:tests.trainer.networks:backwards"}
    with pytest.raises(ConfigurationError, match="no activation modules"):
        run_here(make_spec(model=model, probes={"measure": ["percentiles"]}))
    values = run_here(make_spec(model=model, steps=1, probes={"measure": ["percentiles"], "layers": ["norms.1"]}))[1]
    assert len(values.probes[0]) == 3


def test_what_is_not_finite_is_left_out():
    spec = make_spec(norm="none", model=RELU, probes={"measure": ["landscape", "gradient_norm"]})
    values = Probes(spec, make_model(spec), here()).measure([make_batch()], 1e300)
    assert "probe/gradient_norm" in values
    assert "probe/loss_range" not in values


def test_nothing_is_measured_unless_asked_for():
    assert run_here(make_spec(steps=2))[1].probes == {}
