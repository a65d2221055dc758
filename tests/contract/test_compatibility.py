import copy
import json
import subprocess

import pytest

from tests.contract import compatibility
from tests.contract.compatibility import DOCUMENT, breaking_changes

OLD = {
    "info": {"version": "1"},
    "components": {
        "schemas": {
            "Colour": {"enum": ["red", "green"], "type": "string"},
            "Request": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "maxLength": 10, "pattern": "^a"},
                    "size": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
                    "colour": {"$ref": "#/components/schemas/Colour"},
                    "parts": {"type": "array", "items": {"$ref": "#/components/schemas/Request"}},
                },
            },
            "Answer": {
                "type": "object",
                "required": ["id", "colour"],
                "properties": {
                    "id": {"type": "string"},
                    "colour": {"$ref": "#/components/schemas/Colour"},
                    "size": {"type": "number"},
                    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                },
            },
        }
    },
    "paths": {
        "/things": {
            "post": {
                "operationId": "make",
                "security": [{"Bearer": ["submit"]}],
                "parameters": [
                    {"name": "limit", "in": "query", "schema": {"type": "integer", "maximum": 100}}
                ],
                "requestBody": {
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Request"}}}
                },
                "responses": {
                    "201": {
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Answer"}}}
                    },
                    "404": {},
                },
            }
        }
    },
}
POST = ("paths", "/things", "post")
REQUEST, ANSWER, COLOUR = (("components", "schemas", name) for name in ("Request", "Answer", "Colour"))
GONE = object()


def changed(*changes):
    """Return the old document with values at these paths replaced or removed."""
    new = copy.deepcopy(OLD)
    for path, value in changes:
        *parents, last = path
        found = new
        for parent in parents:
            found = found[parent]
        if value is GONE:
            del found[last]
        else:
            found[last] = value
    return new


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("paths", "/things"), GONE, "is gone"),
        (POST, GONE, "is gone"),
        ((*POST, "operationId"), "create", "operationId was make, is create"),
        ((*POST, "security"), [{"Bearer": ["admin"]}], "security was"),
        ((*POST, "parameters"), [], "query limit is no longer taken"),
        ((*POST, "parameters", 0, "required"), True, "query limit is required now"),
        (
            (*POST, "parameters", 0, "schema", "maximum"),
            50,
            "no longer takes limit: maximum 100 is not within 50",
        ),
        ((*POST, "requestBody", "required"), True, "a body is required now"),
        (
            (*POST, "requestBody", "content"),
            {"text/plain": {}},
            "a body of application/json is no longer taken",
        ),
        ((*POST, "responses"), {"404": {}}, "201 is no longer answered"),
        ((*POST, "responses", "201", "content"), {}, "201 is no longer answered in application/json"),
        ((*REQUEST, "required"), ["name", "size"], "no longer takes body.size: it may be missing"),
        ((*REQUEST, "properties", "size"), GONE, "no longer takes body.size: there is no such field"),
        ((*REQUEST, "properties", "size", "anyOf", 1), GONE, "body.size: type null is not within integer"),
        ((*REQUEST, "properties", "size", "anyOf", 0, "minimum"), 1, "body.size: minimum 0 is not within 1"),
        (
            (*REQUEST, "properties", "size", "anyOf", 0, "maximum"),
            9,
            "body.size: maximum none is not within 9",
        ),
        ((*REQUEST, "properties", "name", "maxLength"), 5, "body.name: maxLength 10 is not within 5"),
        ((*REQUEST, "properties", "name", "pattern"), "^b", "body.name: pattern ^a is not ^b"),
        ((*REQUEST, "properties", "name", "type"), "integer", "body.name: type string is not within integer"),
        ((*REQUEST, "properties", "name", "multipleOf"), 2, "body.name: multipleOf none is not 2"),
        (
            (*REQUEST, "properties", "parts", "items"),
            {"type": "string"},
            "body.parts[]: type object is not within string",
        ),
        ((*ANSWER, "required"), ["id"], "may answer another body.colour: it may be missing"),
        (
            (*ANSWER, "properties", "id", "type"),
            ["string", "null"],
            "another body.id: type null is not within string",
        ),
        (
            (*ANSWER, "properties", "size"),
            {"type": "string"},
            "another body.size: type string is not within number",
        ),
        (
            (*ANSWER, "properties", "labels", "additionalProperties"),
            True,
            "body.labels.*: type array is not within string",
        ),
        ((*COLOUR, "enum"), ["red"], 'no longer takes body.colour: value "green" is not within "red"'),
        (
            (*COLOUR, "enum"),
            ["red", "green", "blue"],
            'may answer another body.colour: value "blue" is not within',
        ),
        (COLOUR, {"type": "string"}, "may answer another body.colour: any value is not within"),
    ],
)
def test_incompatible_changes_are_reported(path, value, message):
    changes = breaking_changes(OLD, changed((path, value)))
    assert any(message in change for change in changes), changes
    assert all(change.startswith("POST /things: ") for change in changes)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("paths", "/others"), {"get": {"operationId": "list", "responses": {}}}),
        ((*POST, "description"), "in other words"),
        ((*POST, "responses", "409"), {}),
        ((*POST, "responses", "404"), GONE),
        ((*POST, "parameters", 0, "schema", "maximum"), GONE),
        ((*POST, "requestBody", "content", "application/xml"), {}),
        ((*REQUEST, "properties", "weight"), {"type": "number"}),
        ((*REQUEST, "required"), []),
        ((*REQUEST, "additionalProperties"), True),
        ((*REQUEST, "properties", "size"), {"type": ["number", "null"]}),
        ((*REQUEST, "properties", "name", "maxLength"), 20),
        ((*REQUEST, "properties", "name", "default"), "a"),
        ((*REQUEST, "properties", "colour"), {"type": "string"}),
        ((*ANSWER, "properties", "weight"), {"type": "number"}),
        ((*ANSWER, "required"), ["id", "colour", "size"]),
        ((*ANSWER, "properties", "size", "type"), "integer"),
        ((*ANSWER, "properties", "colour"), {"const": "red", "type": "string"}),
    ],
)
def test_compatible_changes_are_not_reported(path, value):
    assert breaking_changes(OLD, changed((path, value))) == []


def test_the_document_is_compatible_with_itself(document):
    assert breaking_changes(document, document) == []


def test_removing_a_field_of_the_real_document_is_reported(document):
    new = copy.deepcopy(document)
    del new["components"]["schemas"]["JobView"]["properties"]["reason"]
    new["components"]["schemas"]["JobView"]["required"].remove("reason")
    new["components"]["schemas"]["JobSpec"]["properties"]["steps"]["maximum"] = 10
    changes = breaking_changes(document, new)
    assert "GET /v1/jobs/{job_id}: may answer another body.reason: it may be missing" in changes
    assert "POST /v1/jobs: no longer takes body.spec.steps: maximum 100000000.0 is not within 10" in changes


def test_a_branch_is_compared_with_its_merge_base(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compatibility, "ROOT", tmp_path)

    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x", *arguments], cwd=tmp_path, check=True
        )

    def commit(document):
        (tmp_path / DOCUMENT).write_text(json.dumps(document))
        git("add", ".")
        git("commit", "-q", "-m", "x")

    (tmp_path / "docs").mkdir()
    git("init", "-q", "-b", "main")
    commit(OLD)
    compatibility.main()
    assert "no earlier" in capsys.readouterr().out
    git("checkout", "-q", "-b", "mine")
    git("checkout", "-q", "main")
    commit(changed((("paths", "/others"), {"get": {"operationId": "list", "responses": {}}})))
    compatibility.main()
    git("checkout", "-q", "mine")
    commit(changed(((*POST, "responses", "409"), {})))
    compatibility.main()
    assert capsys.readouterr().out.count("Nothing breaks") == 2
    broken = changed((POST, GONE))
    commit(broken)
    with pytest.raises(SystemExit, match="1 changes break clients"):
        compatibility.main()
    assert "POST /things: is gone" in capsys.readouterr().out
    commit(broken | {"info": {"version": "2"}})
    compatibility.main()
