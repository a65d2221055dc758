"""Recipes: a claim, the comparisons that test it, the rules of its verdict.

Vocabulary of a rule; `service/domain/verdicts.py` measures each seed, and judges by an interval over seeds:

    take      measure of a run's curve of `metric` (or of `metric` - `minus`), from step `from_step` on:
                steps_to  first step at which it is `level` or better: a number, or the best value of another
                          variant
                final, max, min, mean, range (max - min)
    window    values of a path whose runs measure at least `at_least`: their `lowest`, `highest`, `count`, or
              `width` (highest / lowest)
    of, against   variants: paths of the matrix with one value each; with the path of a window and `each`, all
                  of them
    by        value (of `of`), ratio (of / against), difference (of - against), or weights (largest absolute
              difference between the final weights and buffers of both; without a measure)
    each      path with values, for each of which the rule is judged
    relation, bound   condition on the whole interval
"""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from service.domain.comparisons import VARIANT, ComparisonSpec
from trainer.jobspec import FrozenModel, read_yaml

MAX_CLAIM_BYTES = 16_384
MAX_METRICS = 16
"""Maximum number of metrics, each of which is read from MLflow for each run."""
Selection = Annotated[dict[str, JsonValue], Field(max_length=32)]
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
    take: Literal["steps_to", "final", "max", "min", "mean", "range"]
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

    label: str = Field(max_length=300, description="what the number is, in words")
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
        places: list[Selection] = [
            {path: value} for path, values in self.each.items() for value in values
        ] or [{}]
        return [(place, place | self.of, place | (self.against or {})) for place in places]


class Rule(Figure):
    """Rule of a recipe: a figure and its bound."""

    relation: Literal["above", "at_least", "below", "at_most"]
    bound: float


class Claim(FrozenModel):
    """Claim, and the rules by which the runs of a comparison are judged."""

    claim: Annotated[str, Field(max_length=1_000)] = Field(description="one sentence")
    source: Annotated[str, Field(max_length=1_000)] = Field(description="where the claim is made")
    paper: Annotated[str, Field(max_length=1_000)] = Field(description="what is reported there")
    falsified_if: Annotated[str, Field(max_length=1_000)]
    verdict: Annotated[list[Rule], Field(min_length=1, max_length=16)]
    figures: Annotated[list[Figure], Field(max_length=16)] = Field(
        [], description="reported with the verdict, which they do not decide"
    )

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        if (size := len(self.model_dump_json())) > MAX_CLAIM_BYTES:
            raise ValueError(f"must have at most {MAX_CLAIM_BYTES:,} bytes as JSON (got {size:,})")
        if (count := len(self.metrics())) > MAX_METRICS:
            raise ValueError(f"must measure at most {MAX_METRICS} metrics (got {count})")
        return self

    def metrics(self) -> set[str]:
        """Return the metrics that the rules and figures measure."""
        measures = [figure.measure for figure in (*self.verdict, *self.figures) if figure.measure is not None]
        return {name for measure in measures for name in (measure.metric, measure.minus) if name is not None}


class Recipe(Claim):
    """Recipe: a comparison that tests one claim."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$", max_length=60)]
    presets: dict[Literal["quick", "paper", "demo"], ComparisonSpec]

    def _is_tested_by(self, comparison: ComparisonSpec) -> bool:
        """Return whether a comparison has the paths that the rules select variants by."""
        paths = {*comparison.matrix, *([VARIANT] if comparison.variants else [])}
        return all(paths >= {*of, *against} for rule in self.verdict for _, of, against in rule.cases())

    def request(self, preset: str) -> dict[str, Any]:
        """Return a preset as the body of POST /v1/comparisons. Raises ValueError."""
        for name, comparison in self.presets.items():
            if name == preset:
                # Only set fields, so that the API applies its own defaults and warnings.
                body = {"name": self.name, **comparison.model_dump(mode="json", exclude_unset=True)}
                if self._is_tested_by(comparison):
                    claim = Claim(**{field: getattr(self, field) for field in Claim.model_fields})
                    body["recipe"] = claim.model_dump(mode="json", exclude_unset=True)
                return body
        raise ValueError(f"{self.name} has the presets {', '.join(self.presets)} (got {preset!r})")


RECIPES = Path(str(files("trainer"))) / "recipes"


def read_recipes() -> list[Recipe]:
    """Read all recipes of the trainer, by name."""
    return [read_recipe(path) for path in sorted(RECIPES.glob("*.yaml"))]


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises OSError, and ValueError naming the invalid field."""
    return Recipe.model_validate(read_yaml(path))
