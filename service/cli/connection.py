"""Address and token of the service that a command calls.

Sources in order: options, environment variables, config file, the stack on this machine.
"""

import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, ValidationError
from typer.core import TyperCommand

from service.cli.output import errors
from service.client import Client
from service.local.stack import read_connection

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
    """Return address and token of the service.

    Their sources are options, environment, config file and stack, in this order. A token of an option or a
    variable goes to the service that was chosen; that of the config file only to its own service, so that no
    other address gets it. Raises BadParameter, StackError and OSError.
    """
    variables = {
        name: value
        for name in ServiceTarget.model_fields
        if (value := environment.get(f"SYNCBN_{name.upper()}", "").strip())
    }
    given = ServiceTarget(**variables)
    # What says less is not read where it would not count, so that a faulty config file is in nobody's way.
    place = next((source for source in (options, given) if source.names_one), None) or _config(
        environment, config_path
    )
    url, own = place.url, place.token
    if url is None:
        connection = read_connection(place.data_dir or DEFAULT_DATA_DIR)
        url, own = connection.url, connection.token
    # A stack that was asked for by an option has its own token, which a variable for another service
    # does not replace.
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
            field, rule = first["loc"][0], f"must be one of {', '.join(ServiceTarget.model_fields)}"
            raise refuse(f"{field}: {rule if first['type'] == 'extra_forbidden' else first['msg']}") from None
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


def make_client(
    url: Annotated[
        str | None,
        typer.Option(help="address of the API; or SYNCBN_URL", rich_help_panel=PANEL, show_default=False),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="your token; or SYNCBN_TOKEN", rich_help_panel=PANEL, show_default=False),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="folder of a stack on this machine, by default .syncbn; or SYNCBN_DATA_DIR",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="file with url and token; or SYNCBN_CONFIG", rich_help_panel=PANEL, show_default=False
        ),
    ] = None,
) -> Client:
    """Return a client of the service that the options choose.

    Raises BadParameter, StackError and OSError.
    """
    found = find_service(ServiceTarget(url=url, token=token, data_dir=data_dir), os.environ, config)
    try:
        return Client(
            *found,
            on_retry=lambda message: errors.print(message, style="dim", markup=False, soft_wrap=True),
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="service") from None


_service = typer.Typer(add_completion=False)
_service.command()(make_client)
OPTIONS = typer.main.get_command(_service).params


class ServiceCommand(TyperCommand):
    """Command with the options of `make_client`; the client is its context's `obj`."""

    def __init__(self, *args: Any, params: list[Any], **settings: Any) -> None:
        super().__init__(*args, params=[*params, *OPTIONS], **settings)

    def invoke(self, ctx: Any) -> Any:
        """Run the command with a client that is closed afterwards."""
        chosen = {str(option.name): ctx.params.pop(str(option.name)) for option in OPTIONS}
        ctx.obj = ctx.with_resource(make_client(**chosen))
        return super().invoke(ctx)
