"""The `syncbn` command: demo, up, serve, and the commands of each noun."""

import io
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from service.cli import advice, browser, cluster, comparisons, jobs, logs, tokens
from service.cli.connection import DEFAULT_DATA_DIR
from service.cli.output import ExitCode, output, print_error
from service.client.retry import ApiError
from service.domain.mlflow_views import home_url
from service.local.stack import Connection, LocalStack, StackError, run_until_stopped

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train with synchronised batch normalisation, and compare it with BN and no BN.",
    epilog="Exit codes: 0 good, 1 refused or failed, 2 wrong use, 3 a job that was waited for failed or "
    "was cancelled, "
    "4 no answer from the service, 130 Ctrl-C.",
)
for module in (jobs, logs, advice, comparisons, cluster, browser):
    app.add_typer(module.app)
app.add_typer(tokens.app, name="token")

DataDir = Annotated[Path, typer.Option(help="folder of the stack's data", envvar="SYNCBN_DATA_DIR")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit; an expected error is printed without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a terminal may have an encoding without the characters of a name
            stream.reconfigure(errors="replace")
    try:
        app(args=arguments)
    except ApiError as error:
        print_error(str(error))
        sys.exit(ExitCode.NO_ANSWER if error.is_transient else ExitCode.FAILED)
    except (StackError, OSError, ValueError) as error:
        print_error(str(error))
        sys.exit(ExitCode.FAILED)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"syncbn {metadata.version('syncbn')}")
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[
        bool,
        typer.Option("--version", help="print the version and exit", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    """Train with synchronised batch normalisation, and compare it with BN and no BN."""


@app.command()
def demo(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    keep: Annotated[
        bool, typer.Option("--keep/--no-keep", help="leave the servers up afterwards, until Ctrl-C")
    ] = True,
) -> None:
    """Compare BN with no BN on real digits, on two workers, through the REST API."""
    from service.cli.demo import run_demo

    raise typer.Exit(run_demo(data_dir, output, keep=keep))


@app.command()
def up(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="port of the API; default: a free one")
    ] = None,
) -> None:
    """Run Ray, MLflow and the API on this machine until Ctrl-C."""
    output.print(f"Starting Ray, MLflow and the API in {data_dir} …")

    def show(connection: Connection) -> None:
        output.print(f"API docs: {connection.url}/docs")
        output.print(
            f"MLflow:   {home_url(connection.mlflow_url)} (`syncbn open` prints a link that signs in)",
            soft_wrap=True,
        )
        output.print(f"Token:    in {data_dir / 'connection.json'}")
        output.print("Ctrl-C stops all of it.")

    reason = run_until_stopped(LocalStack(data_dir, port=port), show)
    if reason is not None:
        raise StackError(f"the stack has stopped: {reason}")
    output.print("Stopped.")


@app.command()
def serve() -> None:
    """Run only the API and the dispatcher, configured by SYNCBN_* variables."""
    # Imported here, since the client's extra does not install them.
    from service.api.app import make_app
    from service.api.server import Server
    from service.api.web.assets import AssetsMissingError
    from service.logging import configure
    from service.settings import Settings

    try:
        settings = Settings()
    except ValidationError as error:
        names = [(str(item["loc"][0]).upper(), item["msg"]) for item in error.errors(include_url=False)]
        problems = "; ".join(f"SYNCBN_{name.removeprefix('SYNCBN_')}: {message}" for name, message in names)
        raise typer.BadParameter(problems, param_hint="settings") from None
    configure(settings.log_format)
    try:
        app = make_app(settings, show_first_token=_show_first_token)
    except AssetsMissingError as error:
        raise typer.BadParameter(str(error), param_hint="assets") from None
    server = Server(app, settings)
    server.run()
    if server.has_failed:
        raise typer.Exit(1)


def _show_first_token(secret: str) -> None:
    typer.echo(f"The first token, of the admin; it is shown this once:\n{secret}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
