"""Comparisons: one base spec under several variants, made into jobs; pure."""

import copy
import itertools
import json
import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from service.domain.errors import InvalidField
from trainer.spec import JobSpec, field_path

MOST_JOBS = 256
"""Jobs that one comparison may have."""
SEED = "seed"
"""The path that repeats a variant instead of making another one."""

Matrix = dict[str, list[Any]]
Variant = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One base spec under several variants, and what is to be compared."""

    id: str
    name: str
    matrix: Matrix
    baseline: Variant
    metric: str
    target: float | None
    created_at: datetime
    mlflow_run_id: str | None = None
    mlflow_experiment_id: str | None = None
    mlflow_closed: bool = False


def expand(spec: JobSpec, matrix: Matrix) -> list[tuple[Variant, JobSpec]]:
    """Make one spec per point of `matrix`, in its order; the last key varies fastest.

    Raises InvalidField naming the key and the value that cannot be taken.
    """
    count = math.prod(len(values) for values in matrix.values())
    if count > MOST_JOBS:
        raise InvalidField("matrix", f"{count} jobs", f"takes at most {MOST_JOBS} jobs in all")
    for path, other in itertools.permutations(matrix, 2):
        if other.startswith(f"{path}."):
            raise InvalidField(f"matrix.{other}", other, f"the matrix sets {path} as a whole already")
    base = spec.model_dump(mode="json")
    points: list[tuple[Variant, JobSpec]] = []
    known: dict[str, Variant] = {}
    for values in itertools.product(*matrix.values()):
        point = dict(zip(matrix, values, strict=True))
        resolved = _resolve(base, point, matrix)
        same = known.setdefault(resolved.model_dump_json(), point)
        if same is not point:
            raise InvalidField(
                "matrix", describe(point), f"each point is a job of its own, but {describe(same)} is the same one"
            )
        points.append((point, resolved))
    return points


def _resolve(base: dict[str, Any], point: Variant, matrix: Matrix) -> JobSpec:
    content = copy.deepcopy(base)
    for path, value in point.items():
        _set(content, path, value)
    try:
        return JobSpec.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        takes = first["msg"].removeprefix("Value error, ")
        broken = field_path(first["loc"], content)
        for path, value in point.items():
            if broken == path or broken.startswith((f"{path}.", f"{path}[")):
                raise InvalidField(f"matrix.{path}[{matrix[path].index(value)}]", value, takes) from None
        raise InvalidField("matrix", point, f"this variant has no valid {broken}: {takes}") from None


def _set(content: dict[str, Any], path: str, value: Any) -> None:
    """Set the field at a dotted `path`; it must be there already, so that a misspelt path is an error and not a new field."""
    *parents, last = path.split(".")
    place: Any = content
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        raise InvalidField(f"matrix.{path}", path, f"takes a path into the spec, one of {', '.join(_paths(content))}")
    place[last] = value


def _paths(content: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in content.items():
        paths.append(prefix + key)
        if isinstance(value, dict):
            paths += _paths(value, f"{prefix}{key}.")
    return paths


def without_seed(variant: Variant) -> Variant:
    """Drop the seed: what is left tells one variant from another."""
    return {path: value for path, value in variant.items() if path != SEED}


def choose_baseline(matrix: Matrix, wanted: Variant | None) -> Variant:
    """Complete the variant that the others are measured against: `wanted`, with the matrix's first value where it says nothing.

    Raises InvalidField if `wanted` names a path or value that the matrix does not have.
    """
    baseline = without_seed({path: values[0] for path, values in matrix.items()})
    for path, value in (wanted or {}).items():
        if path not in baseline:
            raise InvalidField(
                f"baseline.{path}", value, f"takes paths of the matrix: {', '.join(baseline) or 'it has none'}"
            )
        if value not in matrix[path]:
            raise InvalidField(f"baseline.{path}", value, f"takes a value of the matrix: {matrix[path]}")
        # As the matrix spells it: 1 and 1.0 are one value under two names.
        baseline[path] = matrix[path][matrix[path].index(value)]
    return baseline


def describe(variant: Variant) -> str:
    """Name a variant for people: `norm=sync optimizer.lr=0.1`."""
    return " ".join(f"{path}={_plain(value)}" for path, value in variant.items()) or "base"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
