"""Options of submissions."""

from typing import Annotated, Any

import typer
from pydantic import ValidationError

from service.cli.inputs import parse_pairs
from service.domain.submission import SubmitOptions

PANEL = "Submission"

Name = Annotated[str | None, typer.Option(help="default: the file's name")]
Tags = Annotated[
    list[str] | None, typer.Option("--tag", help="word to find it by; may be repeated", rich_help_panel=PANEL)
]
Priority = Annotated[
    int | None, typer.Option(help="-100 to 100; jobs of a higher one go first", rich_help_panel=PANEL)
]
Preemptible = Annotated[
    bool,
    typer.Option(
        "--preemptible",
        help="let jobs of a higher priority take its resources; it continues from a checkpoint later",
        rich_help_panel=PANEL,
    ),
]
Retries = Annotated[
    list[str] | None,
    typer.Option(
        "--retries",
        metavar="KIND=N",
        help="more attempts after failures of a kind: infrastructure, preempted, hang or unknown; may be "
        "repeated",
        rich_help_panel=PANEL,
    ),
]
QueueTimeoutSeconds = Annotated[
    float | None, typer.Option(help="how long to wait for the first attempt", rich_help_panel=PANEL)
]
MaxRunSeconds = Annotated[
    float | None, typer.Option(help="how long all attempts together may run", rich_help_panel=PANEL)
]
Secrets = Annotated[
    list[str] | None,
    typer.Option(
        "--secret",
        metavar="VARIABLE=NAME",
        help="environment variable of the workers, and the name of its secret; may be repeated",
        rich_help_panel=PANEL,
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key",
        help="under one key it is submitted once, however often the command is repeated; default: a new one",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]


def make_options(
    tags: list[str] | None,
    priority: int | None,
    preemptible: bool,
    retries: list[str] | None,
    queue_timeout_seconds: float | None,
    max_run_seconds: float | None,
    secrets: list[str] | None,
) -> SubmitOptions:
    """Return the submit options that were given. Raises BadParameter naming the field."""
    values: dict[str, Any] = {
        "tags": tags or None,
        "priority": priority,
        "preemptible": preemptible or None,
        "retries": {
            kind: _whole(kind, text) for kind, text in parse_pairs("--retries", retries or ()).items()
        }
        or None,
        "queue_timeout_seconds": queue_timeout_seconds,
        "max_run_seconds": max_run_seconds,
        "secrets": parse_pairs("--secret", secrets or ()) or None,
    }
    try:
        return SubmitOptions.model_validate(
            {name: value for name, value in values.items() if value is not None}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        # Neither a secret's value that was given in its name's place, nor anything else, is shown again.
        raise typer.BadParameter(f"{field}: {first['msg']}", param_hint="options") from None


def _whole(kind: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(
            f"{kind} must be a whole number (got {text})", param_hint="--retries"
        ) from None
