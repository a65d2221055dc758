"""Correspondence of client, command and API document, in both directions."""

import inspect
from typing import get_args

import pytest
from typer.main import get_command

from service.api.app import make_app
from service.cli.app import app as command
from service.client import AsyncClient, Client, calls, sse
from service.client.call import Call, Listing
from service.client.calls import Level
from service.client.operations import Operations
from service.client.sse import Stream
from service.domain.access import Scope
from service.domain.jobs import JobState
from service.settings import Settings
from tests.fakes import FakeMlflow, FakeRay
from trainer.jobspec import Norm

ID = {"job_id": "job-1", "comparison_id": "comparison-1", "token_id": "token-1", "webhook_id": "webhook-1"}
VALUES = ID | {
    "name": "x", "spec": {}, "body": {}, "owner": "ann", "scopes": ["read"], "metric": "accuracy",
    "next": "/mlflow/", "curves": True, "rank": 0, "level": "info", "attempt": 1, "state": "failed",
    "comparison": "comparison-1", "norm": "sync", "tag": "a", "page_size": 7, "key": "k", "if_match": '"1"',
    "overrides": {"steps": 1}, "expires_in_seconds": 1, "since": "2026-03-01", "until": "2026-04-01",
    "options": None, "unfinished": True, "format": "csv",
}  # fmt: skip
HANDLED_WITHIN = {"page_token", "If-None-Match", "Last-Event-ID", "follow"}
"""Paging and streams, and If-None-Match: a client caches no jobs."""
METHODS = [name for name, value in vars(Operations).items() if not name.startswith("_")]


@pytest.fixture(scope="module")
def document():
    return make_app(Settings(), FakeRay(), FakeMlflow()).openapi()


def described(name):
    """Return the call that a method makes, with every parameter set."""
    describe = getattr(calls, name, None) or getattr(sse, name)
    made = describe(**{parameter: VALUES[parameter] for parameter in inspect.signature(describe).parameters})
    match made:
        case Listing():
            return made.first
        case Stream():
            return made.call
    assert isinstance(made, Call)
    return made


def test_operations_and_client_methods_correspond(document):
    theirs = {
        (method.upper(), path) for path, operations in document["paths"].items() for method in operations
    }
    assert {(call.method, call.route) for call in map(described, METHODS)} == theirs


def test_every_parameter_has_an_argument(document):
    given, documented = {}, {}
    for call in map(described, METHODS):
        operation = (call.method, call.route)
        parameters = document["paths"][call.route][call.method.lower()].get("parameters", [])
        documented[operation] = {each["name"].lower() for each in parameters} - {
            name.lower() for name in HANDLED_WITHIN
        }
        names = {*call.query, *call.path, *call.headers} - HANDLED_WITHIN
        given[operation] = given.get(operation, set()) | {name.lower() for name in names}
    for operation, names in documented.items():
        # A key is harmless for validation, where none is accepted.
        is_keyless = operation[1].endswith((":validate", "/sign-in-links"))
        spare = {"idempotency-key"} if is_keyless else set()
        assert given[operation] - spare == names, operation


def test_request_bodies_have_fields_of_the_api(document):
    for name in METHODS:
        call = described(name)
        if call.body and call.body.keys():
            schema = document["paths"][call.route]["post"]["requestBody"]["content"]["application/json"][
                "schema"
            ]
            fields = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
            assert call.body.keys() <= fields.keys(), name


def test_both_clients_have_the_same_methods():
    assert {name for name in vars(Client) if not name.startswith("_")} == {
        name for name in vars(AsyncClient) if not name.startswith("_")
    }


def test_choices_equal_those_of_the_api(document):
    def choices(path, name):
        parameter = next(
            each for each in document["paths"][path]["get"]["parameters"] if each["name"] == name
        )
        schema = next(each for each in parameter["schema"]["anyOf"] if each != {"type": "null"})
        schema = (
            document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
            if "$ref" in schema
            else schema
        )
        return set(schema["enum"])

    assert choices("/v1/jobs", "state") == {state.value for state in JobState}
    assert choices("/v1/jobs", "norm") == {norm.value for norm in Norm}
    assert choices("/v1/jobs/{job_id}/logs", "level") == set(get_args(Level))
    assert set(document["components"]["schemas"]["Scope"]["enum"]) == {scope.value for scope in Scope}


def test_the_command_has_options_for_all_filters(document):
    """Filters and submission options are options by the API's names."""
    commands = get_command(command).commands

    def options(name):
        return {option.name for option in commands[name].params}

    def queries(path):
        return {
            each["name"] for each in document["paths"][path]["get"]["parameters"] if each["in"] == "query"
        }

    assert queries("/v1/jobs") - {"page_size", "page_token"} <= options("jobs")
    assert queries("/v1/jobs/{job_id}/logs") <= options("logs")
    terms = document["components"]["schemas"]["SubmitComparison"]["properties"].keys() & {
        "priority", "tags", "retries", "secrets", "queue_timeout_seconds", "max_run_seconds",
    }  # fmt: skip
    for name in ("submit", "compare"):
        assert terms <= options(name)


def test_every_command_that_prints_data_has_json():
    commands = dict(get_command(command).commands)
    commands |= {f"token {name}": each for name, each in commands.pop("token").commands.items()}
    plain = {
        name for name, each in commands.items() if "as_json" not in {option.name for option in each.params}
    }
    assert plain == {"demo", "up", "serve", "watch"}
