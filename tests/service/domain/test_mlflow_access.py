import json

import pytest

from service.domain.mlflow_access import Forwarded, Grant, is_clean, is_readable, of_attempt
from trainer.jobspec import InvalidField

API = "/api/2.0/mlflow"
GRANT = Grant("job-1", "a" * 32, "7")
OTHER = "b" * 32


def ask(method, path, content=None, **query):
    return of_attempt(GRANT, method, path, query, b"" if content is None else json.dumps(content).encode())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("HEAD", "/"),
        ("GET", "/static-files/static/js/main.js"),
        ("GET", "/ajax-api/2.0/mlflow/runs/get"),
        ("POST", "/ajax-api/2.0/mlflow/runs/search"),
        ("GET", f"{API}/metrics/get-history"),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts/1/2/artifacts/figure.png"),
        ("POST", "/graphql"),
    ],
)
def test_pages_and_queries_can_be_read(method, path):
    assert is_readable(method, path)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/ajax-api/3.0/mlflow/assistant/config"),
        ("PUT", "/ajax-api/3.0/mlflow/assistant/config"),
        ("POST", "/ajax-api/3.0/mlflow/assistant/message"),
        ("POST", "/gateway/x/mlflow/invocations"),
        ("GET", "/ajax-api/2.0/mlflow/gateway-proxy"),
        ("POST", "/ajax-api/3.0/mlflow/scorer/invoke"),
        ("GET", "/ajax-api/3.0/mlflow/jobs/1"),
        ("GET", "/ajax-api/3.0/mlflow/gateway/secrets/list"),
        ("POST", f"{API}/experiments/create"),
        ("POST", f"{API}/runs/create"),
        ("POST", f"{API}/runs/delete"),
        ("POST", f"{API}/runs/log-metric"),
        ("POST", f"{API}/runs/log-batch"),
        ("POST", f"{API}/runs/set-tag"),
        ("POST", "/ajax-api/2.0/mlflow/upload-artifact"),
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/1/2/artifacts/x"),
        ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/1/2/artifacts/x"),
        ("POST", f"{API}/webhooks"),
        ("GET", f"{API}/webhooks"),
        ("GET", "/graphql/../ajax-api/3.0/mlflow/assistant/config"),
        ("OPTIONS", "/"),
    ],
)
def test_other_routes_are_closed_to_signed_in_users(method, path):
    assert not is_readable(method, path)


@pytest.mark.parametrize(
    "path", ["", "x", "//x", "/a//b", "/a/../b", "/a/.", "/a\\b", "/a%2e/b", "/a\nb", "/a\x00"]
)
def test_an_ambiguous_path_is_not_clean(path):
    assert not is_clean(path)


@pytest.mark.parametrize("path", ["/", "/a/b", "/a/b/", "/static-files/lib/ünï.js", "/a/..b"])
def test_an_ordinary_path_is_clean(path):
    assert is_clean(path)


def test_an_attempt_may_write_to_its_own_run():
    metric = {"key": "accuracy", "value": 0.5, "timestamp": 1, "step": 2}
    forwarded = ask("POST", f"{API}/runs/log-batch", {"run_id": GRANT.run_id, "metrics": [metric]})
    assert forwarded == Forwarded({}, {"run_id": GRANT.run_id, "metrics": [metric]})
    assert ask("GET", f"{API}/runs/get", run_id=GRANT.run_id) == Forwarded({"run_id": GRANT.run_id})
    own = f"/api/2.0/mlflow-artifacts/artifacts/7/{GRANT.run_id}/artifacts/figures/x.png"
    assert ask("PUT", own) == Forwarded({})
    assert ask("PUT", "/api/2.0/mlflow-artifacts/artifacts/7/models/m-1/artifacts/MLmodel").model_id == "m-1"


def test_other_spellings_of_a_run_are_not_forwarded():
    content = {
        "run_id": GRANT.run_id,
        "runId": OTHER,
        "run_uuid": OTHER,
        "metrics": [],
        "params": [{"key": "x"}],
    }
    assert ask("POST", f"{API}/runs/log-batch", content).body == {"run_id": GRANT.run_id, "metrics": []}
    repeated = f'{{"run_id": "{OTHER}", "run_id": "{GRANT.run_id}", "metrics": []}}'.encode()
    forwarded = of_attempt(GRANT, "POST", f"{API}/runs/log-batch", {}, repeated)
    assert forwarded.body == {"run_id": GRANT.run_id, "metrics": []}


def test_a_metric_cannot_be_written_to_the_model_of_another_run():
    metric = {
        "key": "accuracy",
        "value": 1.0,
        "timestamp": 1,
        "step": 2,
        "model_id": "m-other",
        "modelId": "m-other",
    }
    (forwarded,) = ask("POST", f"{API}/runs/log-batch", {"metrics": [metric]}).body["metrics"]
    assert forwarded == {"key": "accuracy", "value": 1.0, "timestamp": 1, "step": 2}


@pytest.mark.parametrize(
    ("path", "content", "field"),
    [
        ("log-batch", {"run_id": OTHER, "metrics": []}, "run_id"),
        ("log-batch", {"metrics": {}}, "metrics"),
        ("log-batch", {"metrics": [1]}, "metrics"),
        ("log-batch", {"tags": [["mlflow.runName", "x"]]}, "tags"),
        ("log-inputs", {"datasets": ["x"]}, "datasets"),
        ("outputs", {"models": [None]}, "models"),
        ("log-batch", {"tags": [{"key": "syncbn.job_id", "value": "job-2"}]}, "tags"),
        ("log-batch", {"tags": [{"key": "mlflow.parentRunId", "value": OTHER}]}, "tags"),
        ("log-batch", {"tags": [{"key": "variant", "value": "norm=sync"}]}, "tags"),
        ("log-inputs", {"run_id": OTHER}, "run_id"),
        ("outputs", {"run_id": OTHER}, "run_id"),
        ("log-batch", [], "body"),
    ],
)
def test_rejected_writes_of_an_attempt_are_named(path, content, field):
    with pytest.raises(InvalidField) as refused:
        ask("POST", f"{API}/runs/{path}", content)
    assert refused.value.field == field


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000])
def test_a_body_that_is_not_json_is_rejected(body):
    with pytest.raises(InvalidField, match="body"):
        of_attempt(GRANT, "POST", f"{API}/runs/log-batch", {}, body)


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", f"{API}/runs/get", {"run_id": OTHER}),
        ("GET", f"{API}/runs/get", {}),
        ("POST", f"{API}/experiments/set-experiment-tag", {}),
        ("POST", f"{API}/runs/delete", {}),
        ("POST", f"{API}/runs/update", {}),
        ("POST", f"{API}/runs/search", {}),
        ("POST", f"{API}/experiments/create", {}),
        ("PUT", f"/api/2.0/mlflow-artifacts/artifacts/7/{OTHER}/artifacts/x", {}),
        ("PUT", f"/api/2.0/mlflow-artifacts/artifacts/8/{GRANT.run_id}/artifacts/x", {}),
        ("PUT", f"/api/2.0/mlflow-artifacts/artifacts/7/{GRANT.run_id}/other/x", {}),
        ("GET", f"/api/2.0/mlflow-artifacts/artifacts/7/{GRANT.run_id}/artifacts/x", {}),
        ("GET", "/", {}),
    ],
)
def test_other_routes_are_closed_to_attempts(method, path, query):
    assert ask(method, path, **query) is None


def test_a_model_search_is_restricted_to_the_own_run():
    content = {"experiment_ids": ["1", "2"], "filter": "source_run_id != ''"}
    assert ask("POST", f"{API}/logged-models/search", content).body == {
        "experiment_ids": ["7"],
        "filter": f"source_run_id = '{GRANT.run_id}'",
        "max_results": 100,
    }
