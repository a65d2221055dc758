"""The most expensive requests that every route accepts or refuses: meanwhile, others are answered."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from service.api.app import MAX_BODY_BYTES
from service.domain.comparisons import MAX_COMPARISON_BYTES, MAX_SPEC_BYTES
from tests.service.api.serving import TOKEN, serving_elsewhere
from trainer.jobspec import LOG_FILE

MAX_SECONDS = 0.5
MAX_ANSWER_BYTES = 9_000_000
AT_ONCE = 20
"""Requests of one token at the same time."""
MODEL = "import:models:build"
JUNK = {"junk": ["x" * 97] * 600}
LARGE = {"steps": 1, "model": {"name": "timm:resnet26", "arguments": JUNK}}
"""A spec that is nearly as large as one may be."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def url(folder):
    with serving_elsewhere(folder) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120) as client:
        yield client


class JobFeed:
    """Asks /livez all the time in a thread of its own, and keeps the longest time that an answer took."""

    def __init__(self, url):
        self.longest, self._ended, self._answered = 0.0, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(url,))

    def _run(self, url):
        with httpx.Client(timeout=60) as client:
            while not self._ended.is_set():
                began = time.monotonic()
                assert client.get(f"{url}/livez").is_success
                if self._answered.is_set():  # the first connects, and is not one of those that are measured
                    self.longest = max(self.longest, time.monotonic() - began)
                self._answered.set()
                self._ended.wait(0.01)

    def __enter__(self):
        self._thread.start()
        assert self._answered.wait(60)
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()


def comparison(**changes):
    return {"name": "large", "spec": LARGE, "matrix": {"seed": list(range(100))}} | changes


NESTED = json.loads("[" * 90 + "]" * 90)
OVERLAPPING = {f"v{n}": {f"a{m}": n for m in range(32)} for n in range(100)}
REQUESTS = {
    "a large job": ("POST", "/v1/jobs", {"name": "x", "spec": LARGE}, 202),
    "a spec that is too large": (
        "POST",
        "/v1/jobs",
        {"name": "x", "spec": LARGE | {"model": {"name": "timm:x", "arguments": {"junk": ["x" * 9] * 9_000}}}},
        422,
    ),
    "a large comparison": ("POST", "/v1/comparisons", comparison(), 202),
    "many small jobs": (
        "POST",
        "/v1/comparisons",
        {"name": "many", "spec": {"steps": 1}, "matrix": {"seed": list(range(256))}},
        202,
    ),
    "a comparison that is too large": (
        "POST",
        "/v1/comparisons",
        comparison(matrix={"seed": list(range(256))}),
        422,
    ),
    "the same, only checked": ("POST", "/v1/comparisons:validate", comparison(), 200),
    "values that are too large": (
        "POST",
        "/v1/comparisons",
        comparison(spec={"steps": 1}, matrix={"model.hidden": [[n] * 1_000 for n in range(1, 60)]}),
        422,
    ),
    "fields that overlap": ("POST", "/v1/comparisons", comparison(variants=OVERLAPPING, spec={"steps": 1}), 422),
    "many wrong fields": (
        "POST",
        "/v1/jobs",
        {"name": "x", "spec": {"steps": 1, "model": {"name": "mlp", "hidden": ["x"] * 50_000}}},
        422,
    ),
    "many unknown fields": ("POST", "/v1/jobs", {f"field{n}": n for n in range(12_000)}, 422),
    "deep nesting": (
        "POST",
        "/v1/jobs",
        {"name": "x", "spec": {"steps": 1, "model": {"name": MODEL, "arguments": {"a": [NESTED] * 1_300}}}},
        422,
    ),
    "many overrides": ("POST", "/v1/jobs/{job}:clone", {"overrides": {f"optimizer.x{n}": n for n in range(64)}}, 422),
    "a large clone": ("POST", "/v1/jobs/{job}:clone", {"overrides": {"seed": 1}}, 202),
    "a large override": (
        "POST",
        "/v1/jobs/{job}:clone",
        {"overrides": {"model.arguments": {"junk": ["x" * 9] * 9_000}}},
        422,
    ),
    "a webhook": (
        "POST",
        "/v1/webhooks",
        {"url": "https://example.org", "thresholds": [{"metric": "x" * 60, "above": 1}] * 2_500},
        422,
    ),
    "a token": ("POST", "/v1/tokens", {"owner": "a" * 250_000, "scopes": ["read"]}, 422),
    "a link": ("POST", "/v1/sign-in-links", {"next": "/" + "x" * 250_000}, 422),
    "the longest list": ("GET", "/v1/jobs?page_size=200", None, 200),
    "a comparison": ("GET", "/v1/comparisons/{comparison}", None, 200),
    "a report": ("GET", "/v1/comparisons/{comparison}/report?curves=true", None, 200),
    "curves": ("GET", "/v1/comparisons/{comparison}/curves", None, 200),
    "a job": ("GET", "/v1/jobs/{job}", None, 200),
    "events": ("GET", "/v1/jobs/{job}/events", None, 200),
    "tokens": ("GET", "/v1/tokens?page_size=200", None, 200),
    "a resumption": ("POST", "/v1/jobs/{job}:resume", {"overrides": {f"x{n}": n for n in range(64)}}, 409),
    "a cancellation": ("POST", "/v1/jobs/{job}:cancel", None, 202),
    "a revocation": ("POST", "/v1/tokens/token-0:revoke", None, 404),
    "the cluster": ("GET", "/v1/cluster", None, 200),
    "webhooks": ("GET", "/v1/webhooks?page_size=200", None, 200),
    "messages of a webhook": ("GET", "/v1/webhooks/webhook-0/deliveries?page_size=200", None, 404),
    "a deletion": ("DELETE", "/v1/webhooks/webhook-0", None, 404),
    "the caller": ("GET", "/v1/me", None, 200),
    "a form": ("POST", "/sign-in", {"token": "x" * 250_000}, 413),
    "what is not forwarded to MLflow": (
        "POST",
        "/mlflow/ajax-api/3.0/mlflow/assistant/message",
        {"x": "x" * 250_000},
        403,
    ),
    "the audit": ("GET", "/v1/audit?page_size=200", None, 200),
    "metrics": ("GET", "/metrics", None, 200),
    "the document": ("GET", "/openapi.json", None, 200),
}


def test_the_largest_requests_are_what_they_are_called():
    assert 0.9 * MAX_SPEC_BYTES < len(json.dumps(LARGE)) < MAX_SPEC_BYTES
    assert 0.7 * MAX_COMPARISON_BYTES < 100 * len(json.dumps(LARGE)) < MAX_COMPARISON_BYTES
    assert all(len(json.dumps(body)) < MAX_BODY_BYTES for _, _, body, _ in REQUESTS.values() if body)


@pytest.mark.parametrize("name", REQUESTS)
def test_whoever_asks_for_much_keeps_nobody_waiting(url, client, name):
    method, path, body, status = REQUESTS[name]
    if "{" in path:
        jobs = client.post("/v1/comparisons", json=comparison()).json()
        path = path.format(job=jobs["jobs"][0]["id"], comparison=jobs["id"])
    content, headers = json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
    with JobFeed(url) as watch, ThreadPoolExecutor(AT_ONCE) as threads:
        sent = [threads.submit(client.request, method, path, content=content, headers=headers) for _ in range(AT_ONCE)]
        answers = [answer.result() for answer in sent]
    assert {answer.status_code for answer in answers} == {status}, answers[0].text[:1_000]
    assert all(len(answer.content) < MAX_ANSWER_BYTES for answer in answers)
    if status == 422:
        assert all(len(answer.content) < 20_000 for answer in answers)
    print(f"{name}: /livez answered within {watch.longest:.3f} s, {len(answers[0].content):,} bytes")
    assert watch.longest < MAX_SECONDS


@pytest.mark.parametrize("query", ["", "?rank=0&level=error", "?follow=true"])
def test_whoever_reads_a_large_log_keeps_nobody_waiting(url, client, folder, query):
    job = client.post("/v1/jobs", json={"name": "x", "spec": {"steps": 1}}).json()["id"]
    log = folder / "storage" / job / "attempt-1" / LOG_FILE
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes((b"x" * 99 + b"\n") * 100_000 + b"\r" * 1_000_000 + b"y" * 20_000_000 + b"\n")
    with JobFeed(url) as watch:
        size = 0
        with client.stream("GET", f"/v1/jobs/{job}/logs{query}") as answer:
            for part in answer.iter_bytes():
                size += len(part)
                if size > 20_000_000:
                    break
    assert answer.status_code == 200
    assert size > 0 or "level" in query
    print(f"a log{query}: /livez answered within {watch.longest:.3f} s, {size:,} bytes")
    assert watch.longest < MAX_SECONDS
