"""A stolen token with scope read: no request that it is good for changes anything."""

import hashlib
import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest

from service.api import web
from service.domain.resources import Resources
from tests.contract.service import AcceptingWebhooks
from tests.fakes import FakeRay
from tests.security.test_mlflow import ATTACKS
from tests.service.running_api import SPEC, TOKEN, RunningApi

DOCUMENT = json.loads((Path(__file__).parent.parent.parent / "docs" / "openapi.json").read_text())
CHANGING = ("post", "put", "patch", "delete")
OWN_SESSION = "/v1/sign-in-links"
"""The one call with scope read that stores something: a code by which the holder opens the pages."""
HEARTBEATS = {"replicas", "leases"}
"""Tables that the service itself writes all the time."""


def rows_of(database, table):
    """Return the rows of a table; when a token was used last is evidence, not a change."""
    cursor = database.execute(f'SELECT * FROM "{table}"')
    kept = [number for number, column in enumerate(cursor.description) if column[0] != "last_used_at"]
    return sorted(repr([row[number] for number in kept]) for row in cursor)


class Victim:
    """Service with data of an owner, two tokens of that owner, and a copy of everything stored."""

    def __init__(self, folder):
        # Jobs stay in the queue, so that the service changes nothing by itself.
        ray = FakeRay(total=Resources(cpus=64, gpus=0))
        self.api = RunningApi(folder, ray, quota_jobs=0, poll_seconds=0.05, check_seconds=0)
        self.ids = {}

    def __enter__(self):
        with patch("service.wiring.WebhookHttp", AcceptingWebhooks):
            self.api.start()
        try:
            self.prepare()
        except BaseException:
            self.api.stop()
            raise
        return self

    def __exit__(self, *_):
        self.api.stop()

    def prepare(self):
        with self.client(TOKEN) as admin:
            made = [
                admin.post("/v1/tokens", json={"owner": "ann", "scopes": scopes}).json()
                for scopes in (["submit", "read"], ["read"])
            ]
            self.submit_token, self.read_token = (one["token"] for one in made)
            self.ids["token_id"] = made[0]["id"]
        with self.client(self.submit_token) as ann:
            self.ids["job_id"] = ann.post("/v1/jobs", json={"name": "mine", "spec": SPEC}).json()["id"]
            comparison = {"name": "mine", "spec": SPEC, "matrix": {"norm": ["none", "batch"]}}
            self.ids["comparison_id"] = ann.post("/v1/comparisons", json=comparison).json()["id"]
            hook = {"url": "https://example.org/hook"}
            self.ids["webhook_id"] = ann.post("/v1/webhooks", json=hook).json()["id"]
        with self.client(self.submit_token) as ann:
            deadline = time.monotonic() + 30
            while not all("quota" in job["reason"] for job in ann.get("/v1/jobs").json()["jobs"]):
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def client(self, token):
        return httpx.Client(base_url=self.api.url, headers={"Authorization": f"Bearer {token}"}, timeout=30)

    def stored(self):
        """Return all rows and files, and what Ray and MLflow were given."""
        with closing(sqlite3.connect(self.api.folder / "test.db")) as database:
            names = {
                name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            }
            rows = {name: rows_of(database, name) for name in names - HEARTBEATS}
        files = {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.api.settings.storage.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        }
        mlflow = self.api.mlflow
        return rows, files, dict(self.api.ray.submissions), repr(vars(mlflow))

    def filled(self, path):
        for name, value in self.ids.items():
            path = path.replace("{" + name + "}", value)
        assert "{" not in path, "a new kind of identifier: add it to `ids`"
        return path


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    with Victim(tmp_path_factory.mktemp("victim")) as victim:
        yield victim


def bodies_of(operation):
    """Return the examples of an operation's body, or one empty request."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    return [example["value"] for example in content.get("examples", {}).values()] or [None]


OPERATIONS = [
    (method, path, operation)
    for path, operations in DOCUMENT["paths"].items()
    for method, operation in operations.items()
    if method in CHANGING and path != OWN_SESSION
]


@pytest.mark.parametrize(
    ("method", "path", "operation"), OPERATIONS, ids=[f"{method} {path}" for method, path, _ in OPERATIONS]
)
def test_a_read_token_may_call_no_operation_that_changes_something(victim, method, path, operation):
    before = victim.stored()
    for body in bodies_of(operation):
        for headers in ({}, {"If-Match": "*"}, {"Idempotency-Key": "stolen"}):
            with victim.client(victim.read_token) as thief:
                answer = thief.request(method, victim.filled(path), json=body, headers=headers)
            assert answer.status_code == 403, answer.text
            assert "scope" in answer.json()["detail"]
    assert victim.stored() == before


def test_methods_that_are_not_in_the_document_do_not_exist(victim):
    before = victim.stored()
    with victim.client(victim.read_token) as thief:
        for path, operations in DOCUMENT["paths"].items():
            for method in set(CHANGING) - operations.keys():
                filled = victim.filled(path.replace("{artifact}", "x"))
                assert thief.request(method, filled, json={}).status_code in (404, 405), (method, path)
    assert victim.stored() == before


FORMS = [
    (method.lower(), route.path)
    for router in web.ROUTERS
    for route in router.routes
    for method in route.methods
    if method.lower() in CHANGING
]


@pytest.fixture(scope="module")
def browser(victim):
    """Browser that has signed in with the stolen token."""
    with httpx.Client(base_url=victim.api.url, headers={"Origin": victim.api.url}, timeout=30) as browser:
        assert browser.post("/sign-in", data={"token": victim.read_token}).status_code == 303
        assert browser.get("/jobs").status_code == 200
        yield browser


@pytest.mark.parametrize(("method", "path"), FORMS)
def test_no_form_of_the_pages_works_with_a_read_token(victim, browser, method, path):
    before = victim.stored()
    filled = victim.filled(path.replace(":identifier", ""))
    data = {
        "owner": "eve",
        "scopes": "admin",
        "url": "https://example.org/evil",
        "name": "evil",
        "spec": json.dumps(SPEC),
    }
    answer = browser.request(method, filled, data=data)
    assert answer.status_code == 403, answer.text
    assert "scope" in answer.text
    # The bearer token opens no page; a form leads to the sign-in page.
    with victim.client(victim.read_token) as thief:
        assert thief.request(method, filled, data=data).status_code in (303, 401, 403)
    assert victim.stored() == before


def test_mlflow_cannot_be_changed_with_a_read_token(victim, browser):
    before = victim.stored()
    with victim.client(victim.read_token) as thief:
        for method, path, body in ATTACKS:
            filled = f"/mlflow{path}".replace("{run}", "0" * 32).replace("{experiment}", "1")
            for client in (thief, browser):
                assert client.request(method, filled, json=body).status_code in (403, 404), (method, path)
    assert victim.stored() == before


def test_a_sign_in_link_stores_nothing_but_its_code(victim):
    before = victim.stored()
    with victim.client(victim.read_token) as thief:
        assert thief.post(OWN_SESSION, json={"next": "/jobs"}).status_code == 201
    after = victim.stored()
    assert len(after[0].pop("credentials")) == len(before[0].pop("credentials")) + 1
    assert after == before


def test_the_same_requests_are_accepted_from_their_owner(tmp_path):
    """Otherwise the refusals above could have other reasons than the scope."""
    with Victim(tmp_path) as victim, victim.client(TOKEN) as admin:
        before = victim.stored()
        for method, path, operation in OPERATIONS:
            if "revoke" in path:
                continue  # of the token that owns the rest
            answer = admin.request(method, victim.filled(path), json=bodies_of(operation)[0])
            # The job's state, which earlier requests changed, may not allow it.
            depends = answer.status_code == 409 and path.endswith((":pause", ":resume"))
            assert answer.status_code < 300 or depends, (method, path, answer.text)
        assert victim.stored() != before
