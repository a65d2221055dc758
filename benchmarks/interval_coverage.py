"""Coverage of 95 % intervals of a mean over few seeds: Student's t, the bootstrap, and the wider of both.

Prints the share of simulated experiments whose interval contains the true mean, and the mean width, for
normal, skewed and bounded values.
"""

import argparse
import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, t

from service.domain.statistics import mean_interval

DISTRIBUTIONS = {
    "normal": (lambda random, size: random.normal(size=size), 0.0),
    "lognormal": (lambda random, size: random.lognormal(sigma=0.7, size=size), math.exp(0.7**2 / 2)),
    "uniform": (lambda random, size: random.random(size), 0.5),
}


def student(values: NDArray[np.float64]) -> tuple[float, float]:
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return values.mean() - half, values.mean() + half


def plain_bootstrap(values: NDArray[np.float64]) -> tuple[float, float]:
    interval = bootstrap((values,), np.mean, n_resamples=1_999, method="BCa", rng=0).confidence_interval
    return interval.low, interval.high


def of_verdicts(values: NDArray[np.float64]) -> tuple[float, float]:
    interval = mean_interval([(value, value) for value in values.tolist()])
    return interval.low, interval.high


INTERVALS = {"Student's t": student, "BCa bootstrap": plain_bootstrap, "the wider (verdicts)": of_verdicts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=1_000)
    count = parser.parse_args().experiments
    print(f"{count:,} experiments each; one standard error is about {math.sqrt(0.95 * 0.05 / count):.1%}")
    print(f"{'values':<10} {'seeds':>5}  " + "  ".join(f"{name:>22}" for name in INTERVALS))
    for name, (draw, mean) in DISTRIBUTIONS.items():
        for n in (3, 5, 10, 20):
            rows = draw(np.random.default_rng(n), (count, n))
            cells = []
            for interval in INTERVALS.values():
                found = np.array([interval(row) for row in rows])
                covered = np.mean((found[:, 0] <= mean) & (mean <= found[:, 1]))
                cells.append(f"{covered:>10.1%} width {np.mean(found[:, 1] - found[:, 0]):.2f}")
            print(f"{name:<10} {n:>5}  " + "  ".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
