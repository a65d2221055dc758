"""Links to MLflow's pages, and the saved view of a comparison.

MLflow's UI stores the state of its charts in a tag of the experiment, `mlflow.sharedViewState.<id>`, when a
user shares a view. The service writes the same for each comparison, so that its link shows the comparison's
charts instead of one card per metric. The format is not documented: it is that of MLflow 3.17, and
`tests/browser/test_mlflow_views.py` opens a view in a browser.
"""

import base64
import json
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from service.domain.comparisons import Comparison, describe
from service.domain.recipes import Claim
from trainer.jobspec import DIRECTIONS, TRAIN_SECONDS

SUPPORTED_VERSION = "3.17."
"""Versions of MLflow that read this format of saved views."""
VIEW_TAG_PREFIX = "mlflow.sharedViewState."
MAX_EXPERIMENT_TAG_CHARS = 20_000
"""Length at which MLflow cuts tags of experiments."""
MAX_CHARTS = 8
MAX_CHART_RUNS = 100
"""Maximum number of runs that MLflow draws in one chart."""
LAYOUT = "workflowType=machine_learning"
"""Query that opens MLflow's layout for training; the default one shows traces of language models."""
LOSSES = ("test_loss", "train_loss")
LOGGED = sorted({*DIRECTIONS, "learning_rate", TRAIN_SECONDS})
"""Metrics of an evaluation."""
SECTION = "comparison"
MAX_NAME_CHARS = 100


class InMlflow(Protocol):
    """Job or comparison with its run in MLflow."""

    @property
    def mlflow_run_id(self) -> str | None:
        """Identifier of the run; None before it exists."""

    @property
    def mlflow_experiment_id(self) -> str | None:
        """Identifier of the run's experiment."""


def page_url(base: str, page: str, query: str = "") -> str:
    """Return the URL of a page of MLflow in its layout for training."""
    return f"{base}/#/{page}?{LAYOUT}{query}"


def home_url(base: str) -> str:
    """Return the URL of MLflow's list of experiments."""
    return page_url(base, "experiments")


def run_url(base: str, of: InMlflow) -> str | None:
    """Return the URL of a run in MLflow, or None before there is one."""
    if of.mlflow_run_id is None:
        return None
    return page_url(base, f"experiments/{of.mlflow_experiment_id}/runs/{of.mlflow_run_id}")


def comparison_url(base: str, comparison: Comparison) -> str | None:
    """Return the URL of a comparison's saved view, or of its parent run.

    The parent run is shown if the installed MLflow may not read the view. None before there is a run.
    """
    if comparison.mlflow_run_id is None or not supports_views():
        return run_url(base, comparison)
    query = f"&viewStateShareKey={comparison.id}&compareRunsMode=CHART"
    return page_url(base, f"experiments/{comparison.mlflow_experiment_id}/runs", query)


@cache
def supports_views() -> bool:
    """Return whether the installed MLflow reads this format of saved views."""
    try:
        return version("mlflow").startswith(SUPPORTED_VERSION)
    except PackageNotFoundError:
        return False


def view_tag(comparison: Comparison) -> str:
    """Return the name of the experiment's tag that stores the view of a comparison."""
    return f"{VIEW_TAG_PREFIX}{comparison.id}"


def saved_view(comparison: Comparison, parent_run_id: str) -> str:
    """Return the saved view of a comparison, as the value of its tag.

    It has one line chart per metric that matters: a line per variant, the mean over seeds, with a band from
    the least to the greatest seed. The value has at most 20,000 characters, for which charts are dropped.
    """
    metrics = charted_metrics(comparison)
    while True:
        state = json.dumps(_state(comparison, parent_run_id, metrics), separators=(",", ":"))
        packed = base64.b64encode(zlib.compress(state.encode())).decode()
        content = {
            "name": f"{comparison.name[:MAX_NAME_CHARS]} ({comparison.id})",
            "createdAt": int(comparison.created_at.timestamp() * 1_000),
            "state": f"deflate;{packed}",
        }
        value = json.dumps(content, separators=(",", ":"))
        if len(value) <= MAX_EXPERIMENT_TAG_CHARS or len(metrics) == 1:
            return value
        metrics = metrics[:-1]


def charted_metrics(comparison: Comparison) -> list[str]:
    """Return the metrics of the charts: the compared one, losses, those of the claim."""
    claimed = sorted(Claim.model_validate(comparison.recipe).metrics()) if comparison.recipe else []
    return list(dict.fromkeys([comparison.metric, *LOSSES, *claimed]))[:MAX_CHARTS]


def experiment_note(comparison: Comparison) -> str:
    """Return the line of Markdown above the charts of a comparison's experiment."""
    claim = Claim.model_validate(comparison.recipe).claim if comparison.recipe else None
    what = claim or f"{comparison.metric} against the baseline {describe(comparison.baseline)}."
    return f"{plain(what)} Each comparison is a parent run with its report, and a saved view with its curves."


def plain(text: str) -> str:
    """Return text of users on one line, with HTML and Markdown escaped."""
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]<>#|!&" else letter for letter in text)
    return " ".join(escaped.split())


def _state(comparison: Comparison, parent: str, metrics: Sequence[str]) -> dict[str, Any]:
    columns = ["tags.`variant`", "tags.`seed`", *(f"metrics.`{name}`" for name in metrics)]
    return {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        # Without groups, child runs stay folded below their parent, and the charts are empty.
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": "variant"}],
        },
        "useGroupedValuesInCharts": True,
        "groupsExpanded": {},
        "runsHidden": [parent],
        "runsVisibilityMap": {parent: False},
        "runsHiddenMode": "SHOWALL",
        "runsPinned": [],
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "selectedColumns": columns,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunSections": [
            {
                "uuid": SECTION,
                "name": comparison.name[:MAX_NAME_CHARS],
                "display": True,
                "isReordered": True,
                "columns": 1 if len(metrics) == 1 else 2,
                "cardHeight": 400,
            }
        ],
        "compareRunCharts": [
            *(_chart(name) for name in metrics),
            # MLflow adds a chart for each metric that has none.
            *(_chart(name) | {"deleted": True} for name in LOGGED if name not in metrics),
        ],
    }


def _chart(metric: str) -> dict[str, Any]:
    return {
        "uuid": f"chart-{metric}",
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "metricSectionId": SECTION,
        "runsCountToCompare": MAX_CHART_RUNS,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "selectedXAxisMetricKey": "",
        "lineSmoothness": 0,
        "useGlobalLineSmoothing": False,
        "useGlobalXaxisKey": False,
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "displayPoints": False,
        "deleted": False,
        "isGenerated": False,
    }
