"""Recipes: a claim, the comparisons that test it, the rules of its verdict.

A rule's vocabulary, in full; `service/domain/verdicts.py` measures each seed, and judges by an interval over seeds:

    take    what a run's curve of `metric` (or of `metric` - `minus`) comes to:
              steps_to    first step at which it is `level` or better: a number, or the best value of another variant
              final       last value
              most, least, mean, range (most - least) over its steps, from step `from_step` on
    window  of a path's values, those whose runs take `at_least` or more: their `lowest`, `highest`, `count`, or `width`
            (highest / lowest)
    of, against   which variants: paths of the matrix with one value each; together with a window's path and `each`, all of them
    by      what the two come to: `value` (of `of` alone), `ratio` (of / against), `difference` (of - against), or
            `weights` (largest absolute difference between the final weights and buffers of both; takes no measure)
    each    a path with values at which the same is asked again
    relation, bound   what must hold of all the interval, at each value
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from service.domain.comparisons import ComparisonSpec
from trainer.jobspec import FrozenModel, read_yaml

Selection = dict[str, JsonValue]
"""Paths of the matrix with one value each."""


class Window(FrozenModel):
    """Values of a path at which a measure is large enough."""

    along: str = Field(description="path of the matrix")
    at_least: float
    size: Literal["lowest", "highest", "count", "width"]


class Measure(FrozenModel):
    """Measure of a run's curve, or with a window of the runs of one seed."""

    metric: str = "accuracy"
    minus: str | None = Field(None, description="metric that is subtracted, step by step")
    take: Literal["steps_to", "final", "most", "least", "mean", "range"]
    level: float | Selection | None = Field(
        None, description="of steps_to: a value, or the variant whose best value on the same seed it is"
    )
    from_step: int = Field(0, ge=0)
    window: Window | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if (self.level is None) == (self.take == "steps_to"):
            raise ValueError(f"only steps_to must have a level (got {self.take}, level {self.level})")
        return self


class Figure(FrozenModel):
    """Figure of a recipe: a number per seed."""

    says: str = Field(description="what the number is, in words")
    measure: Measure | None = None
    of: Selection
    against: Selection | None = None
    by: Literal["value", "ratio", "difference", "weights"] = "value"
    each: dict[str, Annotated[list[JsonValue], Field(min_length=1)]] = Field({}, max_length=1)

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if (self.measure is None) != (self.by == "weights"):
            raise ValueError(f"must have a measure, or by: weights (got by {self.by})")
        if (self.against is None) != (self.by == "value"):
            raise ValueError(f"by {self.by} takes {'no ' if self.by == 'value' else ''}against")
        return self

    def cases(self) -> list[tuple[Selection, Selection, Selection]]:
        """Return the cases of a figure: each value of `each` with its `of` and `against`."""
        places: list[Selection] = [{path: value} for path, values in self.each.items() for value in values] or [{}]
        return [(place, place | self.of, place | (self.against or {})) for place in places]


class Rule(Figure):
    """Rule of a recipe: a figure and its bound."""

    relation: Literal["above", "at_least", "below", "at_most"]
    bound: float


class Recipe(FrozenModel):
    """Recipe: a comparison that tests one claim."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$", max_length=60)]
    claim: str = Field(description="one sentence")
    source: str = Field(description="where the claim is made")
    paper: str = Field(description="what is reported there")
    falsified_if: str
    presets: dict[Literal["quick", "paper", "demo"], ComparisonSpec]
    verdict: Annotated[list[Rule], Field(min_length=1)]
    figures: list[Figure] = Field([], description="reported beside the verdict, which they do not decide")

    def request(self, preset: str) -> dict[str, Any]:
        """Return a preset as the body of POST /v1/comparisons. Raises ValueError."""
        for name, comparison in self.presets.items():
            if name == preset:
                return {"name": self.name, **comparison.model_dump(mode="json", exclude_unset=True)}
        raise ValueError(f"{self.name} has the presets {', '.join(self.presets)} (got {preset!r})")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises OSError, and ValueError naming the invalid field."""
    return Recipe.model_validate(read_yaml(path))
