"""Advice from probes of real runs: the recipe's network on 4 workers, with 2 and with 16 samples each."""

from collections import defaultdict
from importlib.resources import files
from pathlib import Path

import pytest

from service.domain.advice import advise
from service.domain.recipes import read_recipe
from tests.dist import run_on_ranks
from tests.trainer.factories import run_here
from trainer.jobspec import JobSpec

RECIPE = Path(str(files("trainer"))) / "recipes" / "sync-vs-batch.yaml"


def probes_here(spec):
    return run_here(spec)[1].probes


def advice_of(variant, **changes):
    """Train a variant of the recipe for a few dozen steps and return the advice."""
    comparison = read_recipe(RECIPE).presets["quick"]
    content = comparison.spec.model_dump(mode="json") | comparison.variants[variant] | changes
    content["probes"]["every"] = 5
    spec = JobSpec.model_validate(content | {"steps": 36, "eval_every": 36})
    curves = defaultdict(list)
    for step, values in run_on_ranks(probes_here, spec.max_workers, spec)[0].items():
        for name, value in values.items():
            curves[name].append((step, value))
    return advise(spec, curves)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("variant", "decision", "group"),
    [
        ("batch-4x2", "synchronise", 4),
        ("sync-4x2", "synchronise", 4),
        ("batch-4x16", "no need", None),
        ("sync-4x16", "no need", None),
    ],
)
def test_small_shares_need_synchronisation_and_larger_ones_do_not(variant, decision, group):
    advice = advice_of(variant)
    assert (advice.decision, advice.basis, advice.sync_group_size) == (decision, "measured", group)
    assert advice.layers[0].layer == "norm1"
    # The first layer sees the samples themselves, which are independent.
    assert advice.layers[0].effective_values == pytest.approx(advice.layers[0].values, rel=0.25)
    assert advice.cost.sync_seconds > 0
    assert advice.cost.step_seconds > 0


@pytest.mark.dist
def test_positions_of_images_do_not_replace_samples():
    """The network trains much worse with two samples per worker, also with many values in each."""
    advice = advice_of("sync-4x2", model={"name": "cnn", "channels": [4, 8]})
    assert all(layer.effective_values > 12 for layer in advice.layers)
    assert advice.decision == "synchronise"
    assert "but of 2 samples" in advice.reason


@pytest.mark.dist
def test_shards_that_differ_need_synchronisation_at_any_size():
    advice = advice_of("batch-4x16", data_partition="by_label")
    assert advice.decision == "synchronise"
    assert "the shards differ" in advice.reason
