"""Bounds on MLflow queries: rows, runs, conditions.

MLflow itself answers `metrics/get-history` without a page size with all points of a run, takes 100 runs of
2,500 points in one request, and checks none of it for GraphQL. Page sizes are lowered, for its clients and
pages follow `next_page_token`; what cannot be lowered without another meaning is refused.
"""

import json
from typing import Any

from graphql import FieldNode, GraphQLError, OperationDefinitionNode, VariableNode, parse

from service.domain.mlflow_access import read_object
from trainer.jobspec import InvalidField

Pairs = list[tuple[str, str]]

MAX_QUERY_BYTES = 100_000
"""Maximum body of a query; a page of MLflow's UI that names 100 runs sends 4,000."""
MAX_RESULTS = {
    "experiments/search": 1_000,
    "runs/search": 1_000,
    "logged-models/search": 1_000,
    "registered-models/search": 1_000,
    "model-versions/search": 1_000,
    "traces/search": 500,
    "metrics/get-history": 25_000,
    "metrics/get-history-bulk": 25_000,
    "metrics/get-history-bulk-interval": 2_500,
}
"""Maximum page sizes; MLflow's UI requests at most 1,000, and 25,000 points of a history."""
WITHOUT_DEFAULT = ("metrics/get-history", "model-versions/search")
"""Routes whose default page size exceeds the maximum."""
PER_RUN = "metrics/get-history-bulk-interval"
"""Route whose page size counts the points of each run."""
MAX_POINTS = 50_000
"""Maximum number of points of all runs in one such request; the UI requests 320 points of at most 100 runs.
"""
MAX_RUNS, MAX_ITEMS, MAX_ORDER_BY = 100, 1_000, 20
MAX_CONDITIONS = 50
"""Maximum number of conditions of a filter, each of which is a join. "and" is counted, also in names."""
CAMEL_CASE = {
    "max_results": "maxResults",
    "order_by": "orderBy",
    "experiment_ids": "experimentIds",
    "run_ids": "runIds",
}
"""Field names in camel case: alternatives in protobuf's JSON, and the only names in GraphQL."""
GRAPHQL = "/graphql"
GRAPHQL_FIELDS = {
    "mlflowGetExperiment": "",
    "mlflowGetRun": "",
    "mlflowListArtifacts": "",
    "mlflowSearchDatasets": "",
    "mlflowSearchRuns": "runs/search",
    "mlflowSearchModelVersions": "model-versions/search",
    "mlflowGetMetricHistoryBulkInterval": PER_RUN,
}
"""Fields of MLflow's GraphQL schema, with the equivalent routes."""
MAX_TOKENS = 1_000
"""Maximum number of tokens of a GraphQL document; the longest of MLflow's UI has 150."""


def bounded(path: str, query: Pairs, body: bytes | None) -> tuple[Pairs, bytes | None]:
    """Return the bounded query string and body of a reader's request.

    Raises InvalidField.
    """
    route = path.rpartition("mlflow/")[2]
    if body is None:
        return _bounded_query(route, query), None
    content = read_object(body)
    if path != GRAPHQL:
        return query, json.dumps(_bounded_fields(route, content)).encode()
    route, arguments = _graphql_arguments(content)
    arguments |= {
        CAMEL_CASE.get(name, name): value for name, value in _bounded_fields(route, arguments).items()
    }
    # MLflow reads the number of points of this one field from the address instead of from the field's
    # argument.
    points = [("max_results", str(arguments["maxResults"]))] if route == PER_RUN else []
    return points, json.dumps(content).encode()


def _bounded_query(route: str, query: Pairs) -> Pairs:
    if route not in MAX_RESULTS:
        return query
    given: dict[str, Any] = {}
    for name, value in query:
        if name in ("run_id", "run_ids", "experiment_ids", "order_by"):
            given.setdefault("run_ids" if name == "run_id" else name, []).append(value)
        else:
            given.setdefault(name, value)  # as MLflow does, which reads the first
    max_results = _bounded_fields(route, given).get("max_results")
    rest = [(name, value) for name, value in query if name != "max_results"]
    return rest if max_results is None else [*rest, ("max_results", str(max_results))]


def _bounded_fields(route: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the fields in canonical spelling with a bounded page size.

    Raises InvalidField.
    """
    content = dict(given)
    for name, second in CAMEL_CASE.items():
        if second in content:
            content[name] = content.pop(second)
    for name, value in content.items():
        limit = {"run_ids": MAX_RUNS, "order_by": MAX_ORDER_BY}.get(name, MAX_ITEMS)
        if isinstance(value, list) and len(value) > limit:
            raise InvalidField(name, f"{len(value)} items", f"must have at most {limit:,} items")
    if str(content.get("filter", "")).lower().count("and") > MAX_CONDITIONS:
        raise InvalidField("filter", content["filter"], f"must have at most {MAX_CONDITIONS} conditions")
    if route in MAX_RESULTS:
        limit = MAX_RESULTS[route]
        if route == PER_RUN:
            limit = min(limit, MAX_POINTS // max(1, len(content.get("run_ids") or ())))
        if (asked := content.get("max_results")) is not None:
            content["max_results"] = min(_positive(asked), limit)
        elif route in WITHOUT_DEFAULT or route == PER_RUN:
            content["max_results"] = limit
    return content


def _positive(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = 0
    if number < 1:  # SQLite reads a negative limit as none
        raise InvalidField("max_results", value, "must be a positive whole number")
    return number


def _graphql_arguments(content: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the route and arguments of a GraphQL request. Raises InvalidField."""
    query, variables = content.get("query"), content.get("variables")
    try:
        field, variable = _root_field(str(query))
        route = GRAPHQL_FIELDS[field]
    except (GraphQLError, LookupError, RecursionError, ValueError):
        rule = "must be one known field without aliases or fragments, with a variable as its input"
        raise InvalidField("query", query, rule) from None
    arguments = variables.get(variable) if isinstance(variables, dict) else None
    if not isinstance(arguments, dict):
        raise InvalidField(f"variables.{variable}", arguments, "must be an object")
    return route, arguments


def _root_field(query: str) -> tuple[str, str]:
    """Return the only field of a GraphQL document and its input variable.

    Aliases, fragments, literals and defaults, by which a request could be multiplied, raise ValueError.
    """
    definitions = parse(query, no_location=True, max_tokens=MAX_TOKENS).definitions
    operation = definitions[0]
    if len(definitions) > 1 or not isinstance(operation, OperationDefinitionNode):
        raise ValueError("must be one operation")
    if any(variable.default_value is not None for variable in operation.variable_definitions):
        raise ValueError("must not have defaults")
    fields = [node for node in operation.selection_set.selections if not _is_typename(node)]
    if len(fields) != 1 or not isinstance(fields[0], FieldNode) or not _is_plain(fields[0]):
        raise ValueError("must be one field")
    (argument,) = fields[0].arguments
    if not isinstance(argument.value, VariableNode):
        raise ValueError("must have a variable as its input")
    return fields[0].name.value, argument.value.name.value


def _is_typename(node: object) -> bool:
    return isinstance(node, FieldNode) and node.name.value == "__typename" and node.alias is None


def _is_plain(field: FieldNode) -> bool:
    """Return whether a field has no aliases, and its subfields no arguments."""
    below = field.selection_set.selections if field.selection_set else ()
    return field.alias is None and all(
        isinstance(node, FieldNode) and not node.arguments and _is_plain(node) for node in below
    )
