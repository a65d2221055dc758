"""Recipe files, and their verdicts on generated runs."""

import math
from importlib.resources import files
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.domain.comparisons import expand, without_seed
from service.domain.recipes import Claim, Figure, read_recipe
from service.domain.verdicts import select
from tests.service.domain.recipe_factory import COMPARISON, FASTER, FINAL, make_recipe
from trainer.jobspec import InvalidField

RECIPES = sorted((Path(str(files("trainer"))) / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_rules_of_recipes_match_variants_of_their_presets(path):
    recipe = read_recipe(path)
    for preset in ("quick", "paper"):
        comparison = recipe.presets[preset]
        points = expand(comparison.spec, comparison.matrix, comparison.variants)
        variants = [
            dict(text) for text in {tuple(without_seed(point).items()) for point, _ in map(_hashable, points)}
        ]
        for figure in (*recipe.verdict, *recipe.figures):
            along = figure.measure.window.along if figure.measure and figure.measure.window else None
            for _, of, against in figure.cases():
                for selection in (of, against) if figure.against is not None else (of,):
                    found = select(_frozen(selection), variants, along)
                    assert len(found) > 1 if along else len(found) == 1, (preset, figure.label, selection)


def _hashable(point):
    return _frozen(point[0]), point[1]


def _frozen(selection):
    return {path: tuple(value) if isinstance(value, list) else value for path, value in selection.items()}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_three_seeds_are_compared(path):
    recipe = read_recipe(path)
    assert all(len(recipe.presets[preset].matrix["seed"]) >= 3 for preset in ("quick", "paper"))


def test_batch_norm_with_one_sample_per_worker_is_rejected():
    quick = read_recipe(next(path for path in RECIPES if path.stem == "sync-vs-batch")).presets["quick"]
    with pytest.raises(InvalidField, match="4 workers with norm 'batch'"):
        expand(quick.spec, {"norm": ["batch"], "global_batch_size": [4]})


def test_a_recipe_lists_the_metrics_of_its_rules():
    assert make_recipe(
        FINAL, FINAL | {"measure": {"metric": "a", "minus": "b", "take": "mean"}}
    ).metrics() == {
        "accuracy",
        "a",
        "b",
    }


@pytest.mark.parametrize(
    "change",
    [
        {"measure": {"take": "steps_to"}},
        {"measure": {"take": "final", "level": 1}},
        {"by": "weights"},
        {"measure": None},
        {"by": "value"},
        {"against": None},
        {"each": {"norm": ["none"], "seed": [0]}},
        {"relation": ">="},
        {"bound": math.nan},
    ],
)
def test_an_empty_rule_is_rejected(change):
    with pytest.raises(ValidationError):
        make_recipe(FASTER | change)


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="example has the presets quick"):
        make_recipe(FINAL).request("paper")
    recipe = make_recipe(FINAL)
    claim = recipe.model_dump(mode="json", exclude={"name", "presets"}, exclude_unset=True)
    asked = recipe.request("quick")
    assert Claim.model_validate(asked.pop("recipe")) == Claim.model_validate(claim)
    assert asked == {"name": "example"} | COMPARISON


def test_a_case_completes_the_selections_of_a_rule():
    figure = Figure.model_validate(
        {"label": "", "of": {}, "against": {"num_workers": 1}, "by": "weights", "each": {"num_workers": [2]}}
    )
    assert figure.cases() == [({"num_workers": 2}, {"num_workers": 2}, {"num_workers": 1})]


def test_a_preset_that_does_not_vary_the_paths_of_the_rules_has_no_claim():
    """The demo has one learning rate, and the rules of its recipe are about two."""
    recipe = read_recipe(next(path for path in RECIPES if path.stem == "fig1-activations"))
    assert "recipe" in recipe.request("quick")
    assert "recipe" not in recipe.request("demo")
