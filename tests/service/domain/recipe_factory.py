"""Recipes for tests."""

from service.domain.recipes import Recipe

COMPARISON = {"spec": {"steps": 10}, "matrix": {"norm": ["none", "sync"], "seed": [0, 1]}}


FASTER = {
    "label": "steps to 80 %, none / sync",
    "measure": {"take": "steps_to", "level": 0.8},
    "of": {"norm": "none"},
    "against": {"norm": "sync"},
    "by": "ratio",
    "relation": "at_least",
    "bound": 5,
}


FINAL = {
    "label": "final",
    "measure": {"take": "final"},
    "of": {"norm": "sync"},
    "relation": "at_least",
    "bound": 0.8,
}


def make_recipe(*rules, figures=()):
    texts = dict.fromkeys(("claim", "source", "paper", "falsified_if"), "words")
    return Recipe.model_validate(
        {
            "name": "example",
            "presets": {"quick": COMPARISON},
            "verdict": list(rules),
            "figures": list(figures),
        }
        | texts
    )
