"""Address and token of the service that a command calls.

Sources in order: options, environment variables, config file, the stack on this machine.
"""

import inspect
import os
import stat
import tomllib
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec

import typer
from pydantic import BaseModel, ConfigDict, ValidationError

from service.cli.output import errors
from service.client import Client
from service.local.stack import read_connection

Given = ParamSpec("Given")
DEFAULT_DATA_DIR = Path(".syncbn")
PANEL = "Which service"


class ServiceTarget(BaseModel):
    """Service given by one source; `url` takes precedence over `data_dir`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = None
    token: str | None = None
    data_dir: Path | None = None

    @property
    def names_one(self) -> bool:
        """Return whether it names a service."""
        return self.url is not None or self.data_dir is not None


def find_service(
    options: ServiceTarget, environment: Mapping[str, str], config_path: Path | None = None
) -> tuple[str, str]:
    """Return address and token by options, environment, config file or stack, in this order.

    A token of an option or a variable goes to whichever service was chosen; that of the config file to its own alone, so that
    no address that is tried out gets it. Raises BadParameter, StackError and OSError.
    """
    variables = {
        name: value
        for name in ServiceTarget.model_fields
        if (value := environment.get(f"SYNCBN_{name.upper()}", "").strip())
    }
    given = ServiceTarget(**variables)
    # What says less is not read where it would not count, so that a faulty config file is in nobody's way.
    place = next((source for source in (options, given) if source.names_one), None) or _config(environment, config_path)
    url, own = place.url, place.token
    if url is None:
        connection = read_connection(place.data_dir or DEFAULT_DATA_DIR)
        url, own = connection.url, connection.token
    # A stack that was asked for by an option has a token of its own, which a variable for another service does not replace.
    token = options.token or (own if place is options else None) or given.token or own
    if token is None:
        raise typer.BadParameter(f"{url} needs a token: --token, or SYNCBN_TOKEN", param_hint="--token")
    return url, token


def default_config_path() -> Path:
    """Return the path of the config file: `~/.config/syncbn/config.toml` on Linux."""
    return Path(typer.get_app_dir("syncbn")) / "config.toml"


def read_config(path: Path) -> ServiceTarget:
    """Read a config file. Raises BadParameter naming the field, and OSError."""

    def refuse(message: str) -> typer.BadParameter:
        return typer.BadParameter(message, param_hint=str(path))

    with path.open("rb") as file:
        may_be_read_by_others = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077
        try:
            place = ServiceTarget(**tomllib.load(file))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise refuse(f"holds no TOML: {error}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field, takes = first["loc"][0], f"must be one of {', '.join(ServiceTarget.model_fields)}"
            raise refuse(f"{field}: {takes if first['type'] == 'extra_forbidden' else first['msg']}") from None
    if place.token is not None and place.url is None:
        raise refuse("token: must be used with the url of its service")
    if place.token is not None and may_be_read_by_others:
        raise refuse(f"holds a token and may be read by others; `chmod 600 {path}` keeps it to you")
    return place


def _config(environment: Mapping[str, str], path: Path | None) -> ServiceTarget:
    named = path or (Path(found) if (found := environment.get("SYNCBN_CONFIG")) else None)
    if named is None and not default_config_path().exists():
        return ServiceTarget()
    return read_config(named or default_config_path())


OPTIONS: dict[str, Any] = {
    "url": Annotated[
        str | None, typer.Option(help="address of the API; or SYNCBN_URL", rich_help_panel=PANEL, show_default=False)
    ],
    "token": Annotated[
        str | None, typer.Option(help="your token; or SYNCBN_TOKEN", rich_help_panel=PANEL, show_default=False)
    ],
    "data_dir": Annotated[
        Path | None,
        typer.Option(
            help="folder of a stack on this machine, by default .syncbn; or SYNCBN_DATA_DIR",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ],
    "config": Annotated[
        Path | None,
        typer.Option(help="file with url and token; or SYNCBN_CONFIG", rich_help_panel=PANEL, show_default=False),
    ],
}


def with_client(command: Callable[Concatenate[Client, Given], None]) -> Callable[..., None]:
    """Decorate a command: add the service options, and pass a client as first argument."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        place = ServiceTarget(**{name: options.pop(name) for name in ServiceTarget.model_fields})
        url, token = find_service(place, os.environ, options.pop("config"))
        try:
            client = Client(
                url, token, on_retry=lambda message: errors.print(message, style="dim", markup=False, soft_wrap=True)
            )
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="service") from None
        with client:
            command(client, *arguments, **options)

    own = inspect.signature(command)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=None)
        for name, kind in OPTIONS.items()
    ]
    run.__signature__ = own.replace(parameters=[*list(own.parameters.values())[1:], *more])  # type: ignore[attr-defined]
    return run
