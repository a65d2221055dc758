"""Fields of a form for a job spec, made from its JSON schema."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from re import fullmatch
from typing import Any

from service.api.web.filters import plain
from trainer.jobspec import InvalidField, JobSpec, parse_yaml

Schema = dict[str, Any]
PREFIX = "spec."
SECTIONS = {
    "Model and data": ("model", "data"),
    "Workers and normalisation": (
        "norm", "num_workers", "sync_group_size", "data_partition", "use_gpu", "accelerator_type",
        "placement", "deterministic", "parallel",
    ),
    "Training": (
        "steps", "global_batch_size", "gradient_accumulation_steps", "optimizer", "lr_schedule",
        "max_grad_norm", "seed", "precision",
    ),
    "Evaluation and probes": ("eval_every", "evaluation", "early_stop", "probes"),
}  # fmt: skip
"""Order of the form; the fields that are not named follow in a section of their own."""
OTHERS = "Everything else"


@dataclass(frozen=True)
class Field:
    """Field of the form: a path into the spec, whose value is written as in YAML."""

    path: str
    value: str
    """Value of the draft; empty if it has none, so that the default holds."""
    default: str
    choices: tuple[str, ...]
    """All values of a field that is chosen from a list."""
    suggestions: tuple[str, ...]
    hint: str
    is_kind: bool
    """Whether the value decides which fields there are, as the name of a model does."""

    @property
    def name(self) -> str:
        """Name of the field in the form, and in errors."""
        return PREFIX + self.path


@cache
def schema_of_spec() -> Schema:
    """Return the JSON schema of a job spec."""
    return JobSpec.model_json_schema()


def sections(spec: Mapping[str, Any]) -> dict[str, list[Field]]:
    """Return the fields for a spec, by section."""
    properties = schema_of_spec()["properties"]
    named = {name for names in SECTIONS.values() for name in names}
    others = tuple(name for name in properties if name not in named)
    return {
        title: [
            field
            for name in names
            for field in _fields(name, properties[name], spec.get(name, ...), default=...)
        ]
        for title, names in {**SECTIONS, OTHERS: others}.items()
    }


def read_spec(values: Mapping[str, str]) -> dict[str, Any]:
    """Return the spec, without defaults, that the fields of the form stand for.

    Values of another kind of model, say, are dropped: only fields that the spec has now count.
    """
    given = {name.removeprefix(PREFIX): text for name, text in values.items() if name.startswith(PREFIX)}
    spec: dict[str, Any] = {}
    for path, text in given.items():  # names first, since they decide on the other fields
        if path.endswith(".name") and text.strip():
            _put(spec, path, text.strip())
    known = {field.path: field for fields in sections(spec).values() for field in fields}
    for path, text in given.items():
        field = known.get(path)
        if field is not None and not field.is_kind and text.strip() not in ("", field.default):
            _put(spec, path, read_value(field.name, text))
    return spec


def read_value(name: str, text: str) -> Any:
    """Parse a value that is written as in YAML. Raises InvalidField."""
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise InvalidField(name, text[:100], f"must be a value as in YAML: {error}") from error


def _fields(path: str, schema: Schema, value: Any, default: Any) -> Iterator[Field]:
    """Yield the fields of a property: itself, or those of the object that it is."""
    default = schema.get("default", default)
    alternatives: list[Schema] = schema.get("oneOf") or schema.get("anyOf") or [schema]
    members = [_resolved(each) for each in alternatives]
    objects = [each for each in members if "properties" in each]
    if not objects or len(objects) < len(members):  # an object that may be null is written as a whole
        yield _field(path, schema, members, value, default)
        return
    own = value if isinstance(value, Mapping) else {}
    defaults = default if isinstance(default, Mapping) else {}
    chosen = objects[0]
    if len(objects) > 1:
        name = own.get("name", defaults.get("name"))
        chosen = next((each for each in objects if _is_named(each, name)), chosen)
        yield _kind(f"{path}.name", objects, own.get("name", ...), defaults.get("name"))
        if name != defaults.get("name"):
            defaults = {}
    for name, property_ in chosen["properties"].items():
        if name != "name":
            yield from _fields(f"{path}.{name}", property_, own.get(name, ...), defaults.get(name, ...))


def _field(path: str, schema: Schema, members: list[Schema], value: Any, default: Any) -> Field:
    choices = tuple(plain(each) for member in members for each in member.get("enum", ()))
    is_chosen = bool(choices) and all("enum" in each or each.get("type") == "null" for each in members)
    if [each.get("type") for each in members] == ["boolean"]:
        choices, is_chosen = ("false", "true"), True
    return Field(
        path=path,
        value=_text(value),
        default=_text(default),
        choices=choices if is_chosen else (),
        suggestions=() if is_chosen else choices,
        hint=str(schema.get("description", "")),
        is_kind=False,
    )


def _kind(path: str, objects: list[Schema], value: Any, default: Any) -> Field:
    names = [each["properties"]["name"] for each in objects]
    # Such as `^(torchvision|timm):…$`, of which the part before the colon is shown.
    patterns = [
        each["pattern"].partition(":")[0].strip("^()").split("|") for each in names if "pattern" in each
    ]
    prefixes = [f"{prefix}:…" for each in patterns for prefix in each]
    return Field(
        path=path,
        value=_text(value),
        default=_text(default),
        choices=(),
        suggestions=tuple(each["const"] for each in names if "const" in each),
        hint=f"or {', '.join(prefixes)}" if prefixes else "",
        is_kind=True,
    )


def _is_named(schema: Schema, name: Any) -> bool:
    own = schema["properties"]["name"]
    if "const" in own:
        return bool(own["const"] == name)
    return isinstance(name, str) and fullmatch(own["pattern"], name) is not None


def _resolved(schema: Schema) -> Schema:
    if "$ref" not in schema:
        return schema
    found: Schema = schema_of_spec()["$defs"][schema["$ref"].rpartition("/")[2]]
    return found


def _text(value: Any) -> str:
    return "" if value is ... or value is None else plain(value)


def _put(content: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
    content[last] = value
