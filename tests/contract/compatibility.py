"""Detection of API changes that break clients of an older document.

Request values of an older client must still be accepted, and response values must still match the older
document. Both are one question, whether all values of one schema are values of another, asked in both
directions. Everything is pure except `main`, which CI calls.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = "docs/openapi.json"
ANNOTATIONS = {
    "$defs", "contentMediaType", "default", "deprecated", "description", "discriminator", "example",
    "examples", "title",
}  # fmt: skip
"""Keywords that reject no value."""
LOWER_BOUNDS = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
UPPER_BOUNDS = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}
MISSING = object()

Schema = dict[str, Any]
Reason = tuple[str, str]
"""Path into a value, and the reason why the other schema rejects it."""


def breaking_changes(old: Schema, new: Schema) -> list[str]:
    """Return incompatibilities for a client made for `old` with a service described by `new`."""
    return [
        f"{method.upper()} {path}: {change}"
        for path, methods in old["paths"].items()
        for method, operation in methods.items()
        for change in _changes(old, new, operation, new["paths"].get(path, {}).get(method))
    ]


def _changes(old: Schema, new: Schema, before: Schema, after: Schema | None) -> Iterator[str]:
    if after is None:
        yield "is gone"
        return
    for key in ("operationId", "security"):
        if before.get(key) != after.get(key):
            yield f"{key} was {before.get(key)}, is {after.get(key)}"
    yield from _changed_parameters(old, new, before, after)
    if after.get("requestBody", {}).get("required") and not before.get("requestBody", {}).get("required"):
        yield "a body is required now"
    taken = after.get("requestBody", {}).get("content", {})
    for media_type, content in before.get("requestBody", {}).get("content", {}).items():
        if media_type not in taken:
            yield f"a body of {media_type} is no longer taken"
        else:
            compared = Comparison(old, new).refused(
                content.get("schema", {}), taken[media_type].get("schema", {}), "body"
            )
            yield from (f"no longer takes {where}: {why}" for where, why in compared)
    for status, answer in before["responses"].items():
        if not status.startswith("2"):
            continue
        if status not in after["responses"]:
            yield f"{status} is no longer answered"
            continue
        given = after["responses"][status].get("content", {})
        for media_type, content in answer.get("content", {}).items():
            if media_type not in given:
                yield f"{status} is no longer answered in {media_type}"
            else:
                found = Comparison(new, old).refused(
                    given[media_type].get("schema", {}), content.get("schema", {}), "body"
                )
                yield from (f"may answer another {where}: {why}" for where, why in found)


def _changed_parameters(old: Schema, new: Schema, before: Schema, after: Schema) -> Iterator[str]:
    known = {(each["in"], each["name"]): each for each in before.get("parameters", ())}
    taken = {(each["in"], each["name"]): each for each in after.get("parameters", ())}
    for key, parameter in taken.items():
        if parameter.get("required") and not known.get(key, {}).get("required"):
            yield f"{key[0]} {key[1]} is required now"
    for key, parameter in known.items():
        if key not in taken:
            yield f"{key[0]} {key[1]} is no longer taken"
        else:
            found = Comparison(old, new).refused(parameter["schema"], taken[key]["schema"], key[1])
            yield from (f"no longer takes {where}: {why}" for where, why in found)


class Comparison:
    """Comparison of the schemas of two documents."""

    def __init__(self, ours: Schema, theirs: Schema) -> None:
        self._ours, self._theirs = ours, theirs
        self._seen: set[tuple[str, str]] = set()
        """Pairs of named schemas under comparison; schemas may be recursive."""

    def refused(self, ours: Any, theirs: Any, where: str) -> list[Reason]:
        """Return reasons why values of schema `ours` may not be values of `theirs`."""
        names = _name(ours), _name(theirs)
        if all(names):
            if names in self._seen:
                return []
            self._seen.add(names)
        ours, theirs = _resolve(self._ours, ours), _resolve(self._theirs, theirs)
        for union in ("anyOf", "oneOf"):
            if union in ours:
                rest = {key: value for key, value in ours.items() if key != union}
                return [reason for each in ours[union] for reason in self.refused(each | rest, theirs, where)]
        for union in ("anyOf", "oneOf"):
            if union in theirs:
                rest = {key: value for key, value in theirs.items() if key != union}
                return self._by_no_member(ours, [each | rest for each in theirs[union]], where)
        return list(self._by_keywords(ours, theirs, where))

    def _by_no_member(self, ours: Schema, members: list[Schema], where: str) -> list[Reason]:
        """Return the rejections of the closest member of a union, or none if one member accepts."""
        refusals = []
        for member in members:
            before = set(self._seen)
            refusals.append(self.refused(ours, member, where))
            if refusals[-1]:
                self._seen = before
        return min(refusals, key=len)

    def _by_keywords(self, ours: Schema, theirs: Schema, where: str) -> Iterator[Reason]:
        for key, allowed in theirs.items():
            value = ours.get(key, MISSING)
            match key:
                case "type":
                    yield from _other_values("type", _types(ours), _types(theirs), where)
                case "enum" | "const":
                    yield from _other_values("value", _values(ours), _values(theirs), where)
                case "properties" | "required" | "additionalProperties":
                    pass  # compared as a whole below
                case "items" | "propertyNames":
                    yield from self.refused({} if value is MISSING else value, allowed, f"{where}[]")
                case "prefixItems":
                    for index, item in enumerate(allowed):
                        mine = value[index] if value is not MISSING and index < len(value) else {}
                        yield from self.refused(mine, item, f"{where}[{index}]")
                case _ if key in LOWER_BOUNDS | UPPER_BOUNDS:
                    if value is MISSING or (value < allowed if key in LOWER_BOUNDS else value > allowed):
                        yield where, f"{key} {'none' if value is MISSING else value} is not within {allowed}"
                case _ if key not in ANNOTATIONS and value != allowed:
                    yield where, f"{key} {'none' if value is MISSING else value} is not {allowed}"
        if "object" in _types(ours) and ({"properties", "required", "additionalProperties"} & theirs.keys()):
            yield from self._by_fields(ours, theirs, where)

    def _by_fields(self, ours: Schema, theirs: Schema, where: str) -> Iterator[Reason]:
        for name in theirs.get("required", ()):
            if name not in ours.get("required", ()):
                yield f"{where}.{name}", "it may be missing"
        known, others = theirs.get("properties", {}), theirs.get("additionalProperties", True)
        for name, schema in ours.get("properties", {}).items():
            if name in known:
                yield from self.refused(schema, known[name], f"{where}.{name}")
            elif others is False:
                yield f"{where}.{name}", "there is no such field"
            elif others is not True:
                yield from self.refused(schema, others, f"{where}.{name}")
        mine = ours.get("additionalProperties", True)
        if others is False and mine is not False:
            yield where, "other fields are refused"
        elif others not in (True, False) and mine is not False:
            yield from self.refused({} if mine is True else mine, others, f"{where}.*")


def _name(schema: Any) -> str:
    return schema.get("$ref", "") if isinstance(schema, dict) else ""


def _resolve(document: Schema, schema: Any) -> Schema:
    if schema is True:
        return {}
    while "$ref" in schema:
        rest = {key: value for key, value in schema.items() if key != "$ref"}
        found: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found | rest
    return schema


def _types(schema: Schema) -> set[str]:
    types = schema.get("type", ["null", "boolean", "object", "array", "number", "integer", "string"])
    return {types} if isinstance(types, str) else set(types)


def _values(schema: Schema) -> set[str] | None:
    """Return the values of an enumeration as JSON, or None for other schemas."""
    if "const" in schema:
        return {json.dumps(schema["const"])}
    return {json.dumps(value) for value in schema["enum"]} if "enum" in schema else None


def _other_values(what: str, ours: set[str] | None, theirs: set[str] | None, where: str) -> Iterator[Reason]:
    if ours is None:
        yield where, f"any {what} is not within {', '.join(sorted(theirs or ()))}"
    elif theirs is not None:
        allowed = theirs | ({"integer"} if what == "type" and "number" in theirs else set())
        for other in sorted(ours - allowed):
            yield where, f"{what} {other} is not within {', '.join(sorted(theirs))}"


def main() -> None:
    """Compare the document with the merge base, or on the main line with the previous commit."""
    new = json.loads((ROOT / DOCUMENT).read_text())
    old = _before()
    if old is None:
        print(f"There is no earlier {DOCUMENT} to compare with.")
        return
    changes = breaking_changes(old, new)
    print(*(changes or [f"Nothing breaks clients made for the earlier {DOCUMENT}."]), sep="\n")
    if changes and old["info"]["version"] == new["info"]["version"]:
        sys.exit(
            f"{len(changes)} changes break clients made for the earlier {DOCUMENT}; CONTRIBUTING.md says "
            "what to do."
        )


def _before() -> Schema | None:
    """Read the document at the merge base with the main line."""
    for base in ("origin/main", "main", "HEAD^"):
        commit = _git("merge-base", "HEAD", base)
        if commit and commit != _git("rev-parse", "HEAD"):
            found = _git("show", f"{commit.strip()}:{DOCUMENT}")
            return None if found is None else json.loads(found)
    return None


def _git(*arguments: str) -> str | None:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else None


if __name__ == "__main__":
    main()
