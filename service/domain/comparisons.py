"""Comparisons: one base spec under several variants, expanded to jobs."""

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field, JsonValue, ValidationError, ValidationInfo, field_validator

from trainer.jobspec import (
    BATCH_DEPENDENT_NORMS,
    FrozenModel,
    InvalidField,
    JobSpec,
    Measured,
    field_path,
    spec_warnings,
)

MAX_COMPARISON_JOBS = 256
"""Maximum number of jobs of a comparison."""
MAX_SPEC_BYTES = 65_536
"""Maximum size of a spec as JSON, with all defaults."""
MAX_COMPARISON_BYTES = 8_000_000
"""Maximum total size of the specs of a comparison."""
MAX_VARIANT_BYTES = 4_000
"""Maximum size of the values that the axes set in one job, as JSON; they are part of lists."""
SEED = "seed"
"""Path whose values repeat a variant instead of making another one."""
VARIANT = "variant"
"""Axis of named variants, which change several fields together."""

Matrix = dict[str, list[Any]]
Variant = dict[str, Any]


class ComparisonSpec(FrozenModel):
    """Axes of a comparison, and its metric, baseline and target."""

    spec: JobSpec
    variants: dict[
        Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=60)],
        Annotated[dict[str, JsonValue], Field(max_length=32)],
    ] = Field(
        {},
        max_length=MAX_COMPARISON_JOBS,
        description="variants by name, each with the paths into the spec that it sets together, such as "
        '`{"bn-x5": {"norm": "sync", "optimizer.lr": 0.05}}`; the matrix multiplies them',
    )
    matrix: dict[str, Annotated[list[JsonValue], Field(min_length=1, max_length=MAX_COMPARISON_JOBS)]] = (
        Field(
            {},
            max_length=32,
            validate_default=True,
            description="path into the spec, such as `optimizer.lr`, to its values; `seed` repeats each "
            "variant",
        )
    )
    baseline: dict[str, JsonValue] | None = Field(
        None,
        description="variant that the others are measured against, a named one by `variant`; default: the "
        "first value of each path",
    )
    metric: Measured = Field(
        "accuracy",
        description="metric to compare, one of the spec's `evaluation.metrics` or `test_loss`; the "
        "smallest losses and calibration "
        "errors are best, and the largest values of the others",
    )
    target: float | None = Field(
        None, description="value to reach; default: the best value that every run of the baseline reaches"
    )

    @field_validator("matrix")
    @classmethod
    def _has_variants(cls, matrix: Matrix, info: ValidationInfo) -> Matrix:
        if not matrix and not info.data.get("variants"):
            raise ValueError("must have a path with values, unless there are variants")
        return matrix

    @field_validator("metric")
    @classmethod
    def _is_measured(cls, metric: Measured, info: ValidationInfo) -> Measured:
        spec = info.data.get("spec")
        if spec is not None and metric not in (*spec.evaluation.metrics, "test_loss"):
            measured = ", ".join(spec.evaluation.metrics)
            raise ValueError(
                f"must be test_loss or one of the spec's evaluation.metrics: {measured} (got {metric!r})"
            )
        return metric

    @property
    def axes(self) -> Matrix:
        """The matrix, with the names of the variants, if any, as its first axis."""
        return ({VARIANT: list(self.variants)} if self.variants else {}) | self.matrix


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparison: one base spec under several variants."""

    id: str
    name: str
    owner: str
    matrix: Matrix
    baseline: Variant
    metric: str
    target: float | None
    recipe: dict[str, Any] | None = None
    """Claim of a recipe and the rules of its verdict, as JSON."""
    created_at: datetime
    mlflow_run_id: str | None = None
    mlflow_experiment_id: str | None = None
    mlflow_closed: bool = False


def warnings_of(specs: Sequence[JobSpec]) -> list[str]:
    """Return warnings about specs and their comparison, each once."""
    found = dict.fromkeys(warning for spec in specs for warning in spec_warnings(spec))
    parts = sorted({spec.gradient_accumulation_steps for spec in specs if spec.norm in BATCH_DEPENDENT_NORMS})
    if len(parts) > 1:
        found["gradient_accumulation_steps: the variants take statistics of parts of different sizes, "
              f"so they differ in more than memory (got {', '.join(map(str, parts))})"] = None  # fmt: skip
    return list(found)


def expand(
    spec: JobSpec, matrix: Matrix, variants: Mapping[str, Variant] | None = None
) -> list[tuple[Variant, JobSpec]]:
    """Return one spec per point of `matrix` and variant; the last key varies fastest.

    Raises InvalidField naming the key and the value that cannot be taken.
    """
    variants = variants or {}
    if variants and VARIANT in matrix:
        raise InvalidField(
            f"matrix.{VARIANT}", matrix[VARIANT], "is the name of the variants, which are given already"
        )
    axes = ({VARIANT: list(variants)} if variants else {}) | matrix
    count = math.prod(len(values) for values in axes.values())
    if count > MAX_COMPARISON_JOBS:
        raise InvalidField("matrix", f"{count} jobs", f"must expand to at most {MAX_COMPARISON_JOBS} jobs")
    # Both checks run before the expansion, which takes time and memory in proportion to the number of jobs.
    _refuse_overlaps(matrix, variants)
    _refuse_size(spec, axes, variants, count)
    base = spec.model_dump(mode="json")
    points: list[tuple[Variant, JobSpec]] = []
    known: dict[str, Variant] = {}
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        resolved = _resolve(base, _changes(point, matrix, variants), point)
        # Compared after validation, since defaults and number types can make different settings equal.
        same = known.setdefault(hashlib.sha256(resolved.model_dump_json().encode()).hexdigest(), point)
        if same is not point:
            raise InvalidField(
                "matrix",
                describe(point),
                f"each point must be another job, but {describe(same)} occurs twice",
            )
        points.append((point, resolved))
    return points


def size_of(content: Any) -> int:
    """Return the size of `content` as JSON in bytes."""
    return len(json.dumps(content, separators=(",", ":")))


def check_size(spec: JobSpec) -> int:
    """Return the size of a spec as JSON. Raises InvalidField if it is too large."""
    size = len(spec.model_dump_json())
    if size > MAX_SPEC_BYTES:
        raise InvalidField(
            "spec", f"{size:,} bytes", f"must have at most {MAX_SPEC_BYTES:,} bytes as JSON with all defaults"
        )
    return size


def _refuse_size(spec: JobSpec, axes: Matrix, variants: Mapping[str, Variant], count: int) -> None:
    """Raise InvalidField for a comparison whose jobs would be too large.

    The check does not expand the comparison.
    """
    largest = {path: max(size_of(value) for value in values) for path, values in axes.items()}
    point = sum(len(path) + size + 4 for path, size in largest.items())
    if point > MAX_VARIANT_BYTES:
        path = max(largest, key=lambda path: largest[path])
        must = (
            f"must have values of at most {MAX_VARIANT_BYTES:,} bytes in all per job; name larger ones "
            "as `variants`"
        )
        raise InvalidField(f"matrix.{path}", f"{point:,} bytes", must)
    size = check_size(spec) + point + max((size_of(variant) for variant in variants.values()), default=0)
    if size * count > MAX_COMPARISON_BYTES:
        must = (
            f"must have at most {MAX_COMPARISON_BYTES:,} bytes of specs: {count} jobs of up to {size:,} "
            "bytes each"
        )
        raise InvalidField("spec", f"{size * count:,} bytes", must)


def _refuse_overlaps(matrix: Matrix, variants: Mapping[str, Variant]) -> None:
    """Raise InvalidField for a path that is set twice, or within another one."""
    of_matrix = [(f"matrix.{path}", path) for path in matrix]
    for name, variant in variants.items() or [("", {})]:
        fields = [*of_matrix, *((f"variants.{name}.{path}", path) for path in variant)]
        # A variant's paths are checked against those of the matrix, because each point sets both.
        for (_, path), (field, other) in itertools.permutations(fields, 2):
            if other.startswith(f"{path}."):
                raise InvalidField(field, other, f"the comparison sets {path} as a whole already")
            if other == path:
                raise InvalidField(field, other, "must be a path that is set once")


def _changes(point: Variant, matrix: Matrix, variants: Mapping[str, Variant]) -> list[tuple[str, str, Any]]:
    """Return the settings of a point: request field, path into the spec, value."""
    named = point.get(VARIANT) if variants else None
    changes = (
        [(f"variants.{named}.{path}", path, value) for path, value in variants.get(named, {}).items()]
        if named
        else []
    )
    return changes + [
        (f"matrix.{path}[{matrix[path].index(value)}]", path, value)
        for path, value in point.items()
        if not (named and path == VARIANT)
    ]


def override(spec: JobSpec, overrides: Mapping[str, Any]) -> JobSpec:
    """Set the fields at these paths. Raises InvalidField."""
    for path, other in itertools.permutations(overrides, 2):
        if other.startswith(f"{path}."):
            raise InvalidField(f"overrides.{other}", other, f"{path} is set as a whole already")
    changes = [(f"overrides.{path}", path, value) for path, value in overrides.items()]
    return _resolve(spec.model_dump(mode="json"), changes, dict(overrides), "overrides")


def _resolve(
    base: dict[str, Any], changes: list[tuple[str, str, Any]], point: Variant, whole: str = "matrix"
) -> JobSpec:
    content = copy.deepcopy(base)
    for field, path, value in changes:
        _set(content, field.partition("[")[0], path, value)
    try:
        resolved = JobSpec.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        rule = first["msg"].removeprefix("Value error, ")
        broken = field_path(first["loc"], content)
        for field, path, value in changes:
            if broken == path or broken.startswith((f"{path}.", f"{path}[")):
                raise InvalidField(field, value, rule) from None
        raise InvalidField(whole, point, f"this variant has no valid {broken}: {rule}") from None
    check_size(resolved)
    return resolved


def _set(content: dict[str, Any], field: str, path: str, value: Any) -> None:
    """Set the existing field at a dotted `path`; a misspelt path is an error."""
    *parents, last = path.split(".")
    place: Any = content
    for parent in parents:
        place = place.get(parent) if isinstance(place, dict) else None
    # The content has all defaults, so every settable path exists in it.
    if not isinstance(place, dict) or last not in place:
        raise InvalidField(field, path, f"must be a path into the spec, one of {', '.join(_paths(content))}")
    place[last] = value


def _paths(content: dict[str, Any], prefix: str = "") -> list[str]:
    paths = []
    for key, value in content.items():
        paths.append(prefix + key)
        if isinstance(value, dict):
            paths += _paths(value, f"{prefix}{key}.")
    return paths


def without_seed(variant: Variant) -> Variant:
    """Return the variant without its seed."""
    return {path: value for path, value in variant.items() if path != SEED}


def choose_baseline(matrix: Matrix, wanted: Variant | None) -> Variant:
    """Return the baseline: `wanted`, completed by the first values of the matrix.

    Raises InvalidField if `wanted` names a path or value that the matrix does not have.
    """
    baseline = without_seed({path: values[0] for path, values in matrix.items()})
    for path, value in (wanted or {}).items():
        if path not in baseline:
            raise InvalidField(
                f"baseline.{path}",
                value,
                f"must be a path of the matrix: {', '.join(baseline) or 'it has none'}",
            )
        if value not in matrix[path]:
            raise InvalidField(f"baseline.{path}", value, f"must be a value of the matrix: {matrix[path]}")
        # As the matrix spells it: 1 and 1.0 are one value under two names.
        baseline[path] = matrix[path][matrix[path].index(value)]
    return baseline


def describe(variant: Variant) -> str:
    """Return the display name of a variant: `norm=sync optimizer.lr=0.1`."""
    return " ".join(f"{path}={_plain(value)}" for path, value in variant.items()) or "base"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
