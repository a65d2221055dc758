"""Params, tags and metrics as MLflow stores them, and what exceeds its limits."""

import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from service.domain.statistics import Curve

MAX_PARAM_CHARS, MAX_TAG_CHARS = 6_000, 8_000
"""Lengths at which MLflow cuts params and tags of runs, without an error."""
MAX_METRIC_NAME_CHARS = 250
LONG_VALUES = "long-values"
"""Folder of artifacts for the values that are longer."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Result of a comparison, as MLflow shows it with the parent run."""

    description: str
    """Markdown; what MLflow would cut is in the file `report.md`."""
    metrics: Mapping[str, float]
    """Summary, by which runs are sorted."""
    files: Mapping[str, bytes]
    """Artifacts by path."""
    at: datetime
    """Time of the metrics: the same when repeated, which then adds no points."""


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested fields to dotted paths such as `optimizer.lr`."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def split_long(values: Mapping[str, Any], max_chars: int) -> tuple[dict[str, str], dict[str, str]]:
    """Return the values to store, and the text of the longer ones by artifact path.

    A value that MLflow would cut is replaced by a reference to the artifact that has all of it.
    """
    stored: dict[str, str] = {}
    artifacts: dict[str, str] = {}
    for name, value in values.items():
        text = str(value)
        if len(text) > max_chars:
            path = f"{LONG_VALUES}/{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.txt"
            artifacts[path] = text
            text = f"{len(text):,} characters, in the artifact {path}"
        stored[name] = text
    return stored, artifacts


def fit(text: str, max_chars: int, rest: str) -> str:
    """Return whole lines up to a length; `rest` is the last one if any are left out."""
    if len(text) <= max_chars:
        return text
    head = text[: max_chars - len(rest) - 2]
    return f"{head.rpartition(chr(10))[0]}\n\n{rest}"


def metric_name(text: str) -> str:
    """Return a text as the name of a metric, with the characters that MLflow allows."""
    return re.sub(r"[^\w.\-: /]", "_", text)[:MAX_METRIC_NAME_CHARS]


def curve_of(history: Mapping[int, float]) -> Curve:
    """Return the curve of a metric as MLflow has stored it, by step.

    MLflow stores infinities as the largest finite numbers; they become infinities again.
    """
    return [(step, _as_logged(value)) for step, value in sorted(history.items())]


def _as_logged(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


@cache
def git_commit() -> str:
    """Return the commit of the running code, or `unknown`.

    It is that of SYNCBN_GIT_COMMIT or of the checkout.
    """
    if commit := os.environ.get("SYNCBN_GIT_COMMIT"):
        return commit
    root = Path(__file__).parents[2]
    # Installed into an environment inside some other repository, that one's commit would say nothing.
    if not (root / ".git").exists():
        return "unknown"
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
