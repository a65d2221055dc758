"""The `syncbn` command."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from service.api.schemas import ComparisonView
from service.cli.client import ApiError, Client
from service.cli.local import Connection, LocalStack, StackError, read_connection, run_until_stopped
from service.cli.show import JobBars, jobs_table, report_table, save_plot, tokens_table, verdict_table
from service.domain.access import Scope
from service.domain.comparisons import without_seed
from service.domain.recipes import read_recipe
from service.domain.verdicts import Run, judge, metrics_of
from trainer.spec import read_yaml

app = typer.Typer(
    no_args_is_help=True, help="Train with synchronised batch normalisation, and compare it with BN and no BN."
)
token_app = typer.Typer(no_args_is_help=True, help="Make, list and revoke tokens; for admins.")
app.add_typer(token_app, name="token")
console = Console()

DataDir = Annotated[Path, typer.Option(help="folder of the stack's data", envvar="SYNCBN_DATA_DIR")]
Url = Annotated[
    str | None, typer.Option(help="address of the API; default: that of the stack in --data-dir", envvar="SYNCBN_URL")
]
Token = Annotated[str | None, typer.Option(help="token for --url", envvar="SYNCBN_TOKEN")]
AsJson = Annotated[bool, typer.Option("--json", help="print the API's answer as JSON")]
SpecFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="YAML file")]
DEFAULT_DATA_DIR = Path(".syncbn")


def main() -> None:
    """Run the command; an error that has an explanation is told without a traceback."""
    try:
        app()
    except (ApiError, StackError, OSError, ValueError, yaml.YAMLError) as error:
        Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def demo(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    keep: Annotated[bool, typer.Option("--keep", help="leave the servers up afterwards, until Ctrl-C")] = False,
) -> None:
    """Compare BN with no BN on real digits, on two workers, through the REST API."""
    from service.cli.demo import run_demo

    raise typer.Exit(run_demo(data_dir, console, keep=keep))


@app.command()
def up(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="port of the API; default: a free one")] = None,
) -> None:
    """Run Ray, MLflow and the API on this machine until told to stop."""
    console.print(f"Starting Ray, MLflow and the API in {data_dir} …")

    def tell(connection: Connection) -> None:
        console.print(f"API docs: {connection.url}/docs")
        console.print(f"MLflow:   {connection.mlflow_url}")
        console.print(f"Token:    in {data_dir / 'connection.json'}")
        console.print("Ctrl-C stops all of it.")

    reason = run_until_stopped(LocalStack(data_dir, port=port), tell)
    if reason is not None:
        raise StackError(f"the stack has stopped: {reason}")
    console.print("Stopped.")


@app.command()
def serve() -> None:
    """Run the API and the dispatcher alone; database, Ray and MLflow are given by SYNCBN_* settings."""
    from service.api.app import make_app
    from service.api.server import Server
    from service.engine.service_log import configure
    from service.settings import Settings

    try:
        settings = Settings()
    except ValidationError as error:
        names = [(str(item["loc"][0]).upper(), item["msg"]) for item in error.errors(include_url=False)]
        told = "; ".join(f"SYNCBN_{name.removeprefix('SYNCBN_')}: {message}" for name, message in names)
        raise typer.BadParameter(told, param_hint="settings") from None
    configure(settings.log_format)
    Server(make_app(settings, show_first_token=_show_first_token), settings).run()


@app.command()
def submit(
    spec: SpecFile,
    name: Annotated[str | None, typer.Option(help="default: the file's name")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Submit one job: a file with a JobSpec."""
    with _client(data_dir, url, token) as client:
        job = client.submit_job(name or spec.stem, _read_yaml(spec))
        _print(job.model_dump(mode="json") if as_json else f"{job.id}: {job.state}")


@app.command()
def compare(
    file: SpecFile,
    preset: Annotated[str, typer.Option(help="of a recipe: quick or paper")] = "quick",
    wait: Annotated[bool, typer.Option(help="wait for the jobs and show the report")] = True,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token: Token = None,
) -> None:
    """Submit a comparison: a recipe, or a file with name, spec, matrix and, if you like, baseline, metric and target."""
    content = _read_yaml(file)
    recipe = read_recipe(file) if "presets" in content else None
    with _client(data_dir, url, token) as client:
        comparison = client.submit_comparison(content if recipe is None else recipe.request(preset))
        console.print(f"{comparison.id}: {len(comparison.jobs)} jobs")
        if wait:
            with JobBars() as bars:
                comparison = client.wait(comparison.id, float("inf"), bars.show)
            console.print(report_table(client.report(comparison.id)))
            if recipe is not None:
                console.print(verdict_table(recipe, judge(recipe, _runs(client, comparison, metrics_of(recipe)))))


@app.command()
def jobs(
    limit: Annotated[int, typer.Option(min=1, help="how many, newest first")] = 20,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List jobs."""
    with _client(data_dir, url, token) as client:
        found = list(islice(client.jobs(), limit))
    _print([job.model_dump(mode="json") for job in found] if as_json else jobs_table(found))


@app.command()
def show(job_id: str, data_dir: DataDir = DEFAULT_DATA_DIR, url: Url = None, token: Token = None) -> None:
    """Show one job, and its timeline."""
    with _client(data_dir, url, token) as client:
        content = client.job(job_id).model_dump(mode="json")
        console.print_json(json.dumps(content | {"events": client.events(job_id).model_dump(mode="json")["events"]}))


@app.command()
def logs(job_id: str, data_dir: DataDir = DEFAULT_DATA_DIR, url: Url = None, token: Token = None) -> None:
    """Print the log of a job's last attempt."""
    with _client(data_dir, url, token) as client:
        typer.echo(client.logs(job_id), nl=False)


@app.command()
def cancel(job_id: str, data_dir: DataDir = DEFAULT_DATA_DIR, url: Url = None, token: Token = None) -> None:
    """Ask for a job to be cancelled."""
    with _client(data_dir, url, token) as client:
        job = client.cancel(job_id)
        console.print(f"{job.id}: {job.state}" + ("" if job.state.is_terminal else ", cancel requested"))


@app.command()
def report(
    comparison_id: str,
    plot: Annotated[Path | None, typer.Option(help="also draw the curves into this PNG file")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show a comparison's table."""
    with _client(data_dir, url, token) as client:
        found = client.report(comparison_id, curves=plot is not None)
    _print(found.model_dump(mode="json") if as_json else report_table(found))
    if plot is not None:
        save_plot(found, plot)


@token_app.command("create")
def create_token(
    owner: Annotated[str, typer.Argument(help="whose jobs it is for")],
    scope: Annotated[list[Scope], typer.Option(help="may be given more than once")] = [Scope.SUBMIT],  # noqa: B006
    name: Annotated[str, typer.Option(help="what it is for")] = "token",
    expires_days: Annotated[int | None, typer.Option(min=1, max=3650, help="default: it does not expire")] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Make a token. Its secret is printed this once."""
    with _client(data_dir, url, token) as client:
        made = client.create_token(owner, scope, name, expires_days * 86_400 if expires_days else None)
    if as_json:
        _print(made.model_dump(mode="json"))
        return
    Console(stderr=True).print(f"{made.id} of {made.owner}; the secret is shown this once:", highlight=False)
    typer.echo(made.token)


@token_app.command("list")
def list_tokens(
    data_dir: DataDir = DEFAULT_DATA_DIR, url: Url = None, token: Token = None, as_json: AsJson = False
) -> None:
    """List tokens, newest first."""
    with _client(data_dir, url, token) as client:
        found = list(client.tokens())
    _print([each.model_dump(mode="json") for each in found] if as_json else tokens_table(found))


@token_app.command("revoke")
def revoke_token(token_id: str, data_dir: DataDir = DEFAULT_DATA_DIR, url: Url = None, token: Token = None) -> None:
    """Let a token open nothing from now on."""
    with _client(data_dir, url, token) as client:
        console.print(f"{client.revoke_token(token_id).id}: revoked", highlight=False)


def _show_first_token(secret: str) -> None:
    typer.echo(f"The first token, of the admin; it is shown this once:\n{secret}")
    sys.stdout.flush()


def _runs(client: Client, comparison: ComparisonView, metrics: set[str]) -> list[Run]:
    """Collect what a verdict is made of."""
    curves = {metric: client.curves(comparison.id, metric) for metric in metrics}
    points = {(metric, run.job_id): run.points for metric, found in curves.items() for run in found.runs}
    return [
        Run(
            variant=without_seed(job.variant),
            seed=job.spec.seed,
            curves={metric: points[metric, job.id] for metric in metrics},
            diverged=job.reason.startswith("diverged"),
        )
        for job in comparison.jobs
        if job.state == "succeeded"
    ]


@contextmanager
def _client(data_dir: Path, url: str | None, token: str | None) -> Iterator[Client]:
    if url is None:
        connection = read_connection(data_dir)
        url, token = connection.url, connection.token
    elif token is None:
        raise typer.BadParameter("--url needs --token as well", param_hint="--token")
    with Client(url, token) as client:
        yield client


def _read_yaml(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path} holds no mapping", param_hint="file")
    return content


def _print(content: Any) -> None:
    """Print lists and mappings as JSON, for programs; all else for people."""
    if isinstance(content, list | dict):
        typer.echo(json.dumps(content, indent=2))
    else:
        console.print(content)


if __name__ == "__main__":
    main()
