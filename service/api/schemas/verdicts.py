"""Schemas of the verdict on a claim."""

import math

from pydantic import BaseModel, Field

from service.domain.recipes import Claim, Figure, Rule, Selection
from service.domain.statistics import Interval
from service.domain.verdicts import Finding, Judgement, RecipeVerdict, Value


class IntervalView(BaseModel):
    """Interval, in which an unknown bound is null.

    A bound is unknown for a run that never reached its level, for example.
    """

    low: float | None = Field(examples=[8.1])
    high: float | None = Field(examples=[10.6])

    @classmethod
    def of(cls, interval: Interval) -> "IntervalView":
        """Show an interval."""
        low, high = (bound if math.isfinite(bound) else None for bound in (interval.low, interval.high))
        return cls(low=low, high=high)


class ValueView(BaseModel):
    """Number of a figure for one seed."""

    seed: int = Field(examples=[0])
    number: IntervalView | None = Field(description="null: runs are missing")
    first: IntervalView | None = Field(
        description="of the first of the two variants of a ratio or difference"
    )
    second: IntervalView | None = Field(description="of the second one")

    @classmethod
    def of(cls, value: Value) -> "ValueView":
        """Show a value."""
        number, first, second = (
            part and IntervalView.of(part) for part in (value.number, value.of, value.against)
        )
        return cls(seed=value.seed, number=number, first=first, second=second)


class FindingView(BaseModel):
    """Figure in one case, over seeds."""

    figure: Rule | Figure = Field(
        examples=[
            {
                "label": "steps to 80 %, none / sync",
                "measure": {"take": "steps_to", "level": 0.8},
                "of": {"norm": "none"},
                "against": {"norm": "sync"},
                "by": "ratio",
                "relation": "at_least",
                "bound": 5,
            }
        ],
        description="with `relation` and `bound` if it is a rule of the verdict",
    )
    case: Selection = Field(description="value of the figure's `each` that it is about")
    values: list[ValueView] = Field(description="one per seed")
    interval: IntervalView | None = Field(
        description="95 % interval of the mean over seeds, of ratios of the geometric mean; null: too "
        "few seeds"
    )
    judgement: Judgement | None = Field(examples=["holds"], description="null: no rule is about it")
    shows_no_difference: bool = Field(description="the interval of a ratio or difference contains equality")

    @classmethod
    def of(cls, finding: Finding) -> "FindingView":
        """Show a finding."""
        return cls(
            figure=finding.figure,
            case=finding.case,
            values=[ValueView.of(value) for value in finding.values],
            interval=finding.interval and IntervalView.of(finding.interval),
            judgement=finding.judgement,
            shows_no_difference=finding.shows_no_difference,
        )


class VerdictView(BaseModel):
    """Verdict on a claim."""

    judgement: Judgement = Field(
        examples=["holds"],
        description="fails if a rule fails in a case; holds if all rules hold in all cases",
    )
    claim: str = Field(examples=["With batch normalisation the network learns faster."])
    falsified_if: str = Field(examples=["not five times fewer steps to 80 %"])
    findings: list[FindingView]

    @classmethod
    def of(cls, claim: Claim, verdict: RecipeVerdict) -> "VerdictView":
        """Show a verdict."""
        return cls(
            judgement=verdict.judgement,
            claim=claim.claim,
            falsified_if=claim.falsified_if,
            findings=[FindingView.of(finding) for finding in verdict.findings],
        )
