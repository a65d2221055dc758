"""Range of usable learning rates of each variant."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.domain.comparisons import describe
from service.domain.variants import VariantResult

LEARNING_RATE = "optimizer.lr"


@dataclass(frozen=True, kw_only=True)
class UsableRates:
    """Learning rates at which every run of a variant reached the target."""

    label: str
    """The variant without its learning rate."""
    tried: Sequence[float]
    usable: Sequence[float]

    @property
    def width(self) -> float | None:
        """Return the greatest usable rate over the smallest, or None if none is usable."""
        return max(self.usable) / min(self.usable) if self.usable else None


def usable_rates(variants: Sequence[VariantResult]) -> list[UsableRates]:
    """Return the usable learning rates of each variant of the other fields.

    A rate is usable if every run at it reached the target; diverged, failed and unfinished runs did not.
    """
    groups: dict[str, dict[float, bool]] = {}
    for result in variants:
        rate = result.variant.get(LEARNING_RATE)
        if isinstance(rate, int | float):
            others = {path: value for path, value in result.variant.items() if path != LEARNING_RATE}
            groups.setdefault(describe(others), {})[rate] = 0 < result.reached == len(result.runs)
    return [
        UsableRates(
            label=label,
            tried=sorted(rates),
            usable=sorted(rate for rate, is_usable in rates.items() if is_usable),
        )
        for label, rates in groups.items()
    ]
