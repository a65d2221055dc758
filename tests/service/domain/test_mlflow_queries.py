"""MLflow queries of readers: those of its own UI, and others."""

import json

import pytest

from service.domain import mlflow_queries
from service.domain.mlflow_queries import bounded
from trainer.jobspec import InvalidField

API = "/ajax-api/2.0/mlflow"
RUNS = [f"{number:032x}" for number in range(100)]
SEARCH = (
    "query SearchRuns($data: MlflowSearchRunsInput!) "
    "{ __typename mlflowSearchRuns(input: $data) { runs { info { runUuid } } } }"
)
HISTORY = (
    "query GetMetricHistoryBulkInterval($data: MlflowGetMetricHistoryBulkIntervalInput!) @component(name: "
    '"x") '
    "{ mlflowGetMetricHistoryBulkInterval(input: $data) { __typename metrics { step value } } }"
)
OF_THE_UI = [
    ("registered-models/search", [("max_results", "1000"), ("filter", "name ILIKE '%a%'")]),
    ("experiments/search", [("max_results", "1000")]),
    ("metrics/get-history", [("run_uuid", RUNS[0]), ("metric_key", "loss"), ("max_results", "25000")]),
    (
        "metrics/get-history-bulk",
        [("run_id", run) for run in RUNS] + [("metric_key", "a"), ("max_results", "25000")],
    ),
    (
        "metrics/get-history-bulk-interval",
        [("run_ids", run) for run in RUNS] + [("metric_key", "a"), ("max_results", "320")],
    ),
    ("artifacts/list", [("run_id", RUNS[0]), ("path", "a")]),
    (
        "runs/search",
        {"experiment_ids": ["1"], "max_results": 100, "order_by": ["attributes.start_time DESC"]},
    ),
    ("runs/search", {"filter": f"run_id IN ({','.join(repr(run) for run in RUNS)})", "max_results": 100}),
    (
        "logged-models/search",
        {"experiment_ids": ["1"], "order_by": [{"field_name": "creation_time", "ascending": False}]},
    ),
    ("experiments/search-datasets", {"experiment_ids": ["1"]}),
]


def query(route, *pairs):
    return dict(bounded(f"{API}/{route}", list(pairs), None)[0])


def body(route, content):
    return json.loads(bounded(f"{API}/{route}", [], json.dumps(content).encode())[1])


def graphql(query, **variables):
    points, content = bounded("/graphql", [], json.dumps({"query": query, "variables": variables}).encode())
    return dict(points), json.loads(content)["variables"]


@pytest.mark.parametrize(("route", "request_of_ui"), OF_THE_UI)
def test_requests_of_the_ui_are_unchanged(route, request_of_ui):
    if isinstance(request_of_ui, dict):
        assert body(route, request_of_ui) == request_of_ui
    else:
        assert sorted(bounded(f"{API}/{route}", request_of_ui, None)[0]) == sorted(request_of_ui)


@pytest.mark.parametrize("route", mlflow_queries.MAX_RESULTS)
@pytest.mark.parametrize("prefix", ["/api/2.0/mlflow", "/ajax-api/2.0/mlflow", "/ajax-api/3.0/mlflow"])
def test_page_sizes_are_capped(route, prefix):
    most = mlflow_queries.MAX_RESULTS[route]
    assert bounded(f"{prefix}/{route}", [("max_results", "1000000")], None)[0] == [("max_results", str(most))]
    twice = [("max_results", "1000000"), ("max_results", "1")]  # MLflow reads the first value
    assert bounded(f"{prefix}/{route}", twice, None)[0] == [("max_results", str(most))]
    for name in ("max_results", "maxResults"):
        assert body(route, {name: 1_000_000}) == {"max_results": most}
    assert query(route, ("max_results", "7")) == {"max_results": "7"}


@pytest.mark.parametrize("value", ["-1", "0", "x", "", "1e9", "9" * 5_000])
def test_non_numeric_page_sizes_are_rejected(value):
    with pytest.raises(InvalidField, match="max_results"):
        query("metrics/get-history-bulk", ("max_results", value))


def test_a_page_size_is_added_where_mlflow_has_no_limit():
    assert query("metrics/get-history") == {"max_results": "25000"}
    assert query("model-versions/search") == {"max_results": "1000"}
    assert query("runs/search") == {}


def test_points_per_run_decrease_with_the_number_of_runs():
    many = [("run_ids", run) for run in RUNS]
    assert query("metrics/get-history-bulk-interval", *many, ("max_results", "2500"))["max_results"] == "500"
    assert query("metrics/get-history-bulk-interval", *many)["max_results"] == "500"
    assert query("metrics/get-history-bulk-interval", many[0])["max_results"] == "2500"


@pytest.mark.parametrize(
    ("route", "content"),
    [
        ("runs/search", {"filter": " and ".join(["metrics.a > 0"] * 60)}),
        ("runs/search", {"filter": "/**/AND/**/".join(["metrics.a>0"] * 60)}),
        ("runs/search", {"order_by": ["metrics.a"] * 21}),
        ("runs/search", {"orderBy": ["metrics.a"] * 21}),
        ("runs/search", {"experiment_ids": ["1"] * 1_001}),
        ("logged-models/search", {"datasets": [{}] * 1_001}),
        ("runs/search", []),
    ],
)
def test_expensive_queries_are_rejected(route, content):
    with pytest.raises(InvalidField):
        body(route, content)


def test_graphql_queries_have_the_limits_of_other_routes():
    assert graphql(SEARCH, data={"experimentIds": ["1"], "maxResults": 100}) == (
        {},
        {"data": {"experimentIds": ["1"], "maxResults": 100}},
    )
    assert graphql(SEARCH, data={"maxResults": 50_000})[1] == {"data": {"maxResults": 1_000}}
    points, _ = graphql(HISTORY, data={"runIds": RUNS, "maxResults": 320})
    assert points == {"max_results": "320"}
    assert graphql(HISTORY, data={"runIds": RUNS})[0] == {"max_results": "500"}


@pytest.mark.parametrize(
    ("document", "variables"),
    [
        (SEARCH.replace("mlflowSearchRuns(", "a: mlflowSearchRuns("), {"data": {}}),
        (SEARCH.replace("runs {", "runs { a: experiment { name } b: experiment { name }"), {"data": {}}),
        (SEARCH.replace("{ runs", "{ ...f } } fragment f on MlflowSearchRunsResponse { x { "
                                  "runs"), {"data": {}}),
        (SEARCH.replace("input: $data", "input: {maxResults: 50000}"), {"data": {}}),
        (SEARCH.replace("Input!)", "Input = {maxResults: 50000})"), {"data": {}}),
        (SEARCH.replace("Input!)", "Input = {maxResults: 50000})"), {}),
        (SEARCH.replace("{ __typename", "{ other: __typename"), {"data": {}}),
        (SEARCH.replace("{ __typename", "{ mlflowSearchRuns(input: $data) { runs { info { runUuid } } "
                                        "}"), {"data": {}}),
        (SEARCH + SEARCH.replace("SearchRuns(", "Second("), {"data": {}}),
        ("{ __schema { types { name } } }", {}),
        ("{ a { " * 150, {}),
        ("query Q { " + "mlflowGetRun " * 2_000 + "}", {}),
        (SEARCH, {"data": [1]}),
        (HISTORY, {"data": {"runIds": [*RUNS, "x"]}}),
        (None, {}),
    ],
)  # fmt: skip
def test_graphql_that_multiplies_work_is_rejected(document, variables):
    with pytest.raises(InvalidField):
        graphql(document, **variables)
