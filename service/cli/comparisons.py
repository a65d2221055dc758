"""Commands for comparisons: compare, comparisons, report and recipes."""

import time
from itertools import islice
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.live import Live

from service.api.report_files import Format
from service.api.schemas.names import MAX_PAGE_SIZE
from service.cli.connection import ServiceCommand
from service.cli.inputs import Preset, RecipeOrFile, find_file, read_comparison
from service.cli.inputs import recipes as all_recipes
from service.cli.options import (
    Key,
    MaxRunSeconds,
    Preemptible,
    Priority,
    QueueTimeoutSeconds,
    Retries,
    Secrets,
    Tags,
    make_options,
)
from service.cli.output import (
    AsJson,
    ExitCode,
    errors,
    interruptible,
    output,
    print_json,
    print_result,
    print_warnings,
)
from service.cli.progress import wait_for_comparison
from service.cli.report_tables import report_lines, save_plot, verdict_table, watched
from service.cli.tables import comparisons_table, recipes_table
from service.client import Client
from service.domain.jobs import JobState
from trainer.atomic import atomic_write

app = typer.Typer()


@app.command(cls=ServiceCommand)
def compare(
    context: typer.Context,
    file: RecipeOrFile,
    preset: Preset = "quick",
    tags: Tags = None,
    priority: Priority = None,
    preemptible: Preemptible = False,
    retries: Retries = None,
    queue_timeout_seconds: QueueTimeoutSeconds = None,
    max_run_seconds: MaxRunSeconds = None,
    secrets: Secrets = None,
    key: Key = None,
    wait: Annotated[bool, typer.Option(help="wait for the jobs and show the report")] = True,
    as_json: AsJson = False,
) -> None:
    """Submit a comparison: a recipe, or a file with name, spec and matrix.

    The file may also have baseline, metric and target.
    """
    client: Client = context.obj
    body = read_comparison(find_file(file), preset)
    options = make_options(
        tags, priority, preemptible, retries, queue_timeout_seconds, max_run_seconds, secrets
    )
    comparison = client.submit_comparison(body | options.model_dump(mode="json", exclude_unset=True), key=key)
    if not as_json:
        typer.echo(f"{comparison.id}: {len(comparison.jobs)} jobs")
        print_warnings(comparison.warnings or ())
    if not wait:
        if as_json:
            print_json({"comparison": comparison, "report": None, "verdict": None})
        return
    comparison = wait_for_comparison(client, comparison)
    report = client.report(comparison.id)
    verdict = None if comparison.recipe is None else client.verdict(comparison.id)
    if as_json:
        judgement = None if verdict is None else verdict.judgement
        print_json({"comparison": comparison, "report": report, "verdict": judgement})
    else:
        output.print(report_lines(report))
        if verdict is not None:
            output.print(verdict_table(comparison.name, verdict))
    if any(job.state in (JobState.FAILED, JobState.CANCELLED) for job in comparison.jobs):
        raise typer.Exit(ExitCode.ENDED_BADLY)


@app.command(cls=ServiceCommand)
def comparisons(
    context: typer.Context,
    owner: Annotated[str | None, typer.Option(help="of this owner; admins see all owners'")] = None,
    limit: Annotated[int, typer.Option(min=1, help="how many, newest first")] = 20,
    as_json: AsJson = False,
) -> None:
    """List comparisons, newest first."""
    client: Client = context.obj
    listing = client.comparisons(owner=owner, page_size=min(limit, MAX_PAGE_SIZE))
    found = list(islice(listing, limit + 1))
    if as_json:
        print_json(found[:limit])
        return
    output.print(comparisons_table(found[:limit]))
    if len(found) > limit:
        errors.print(f"There are more than these {limit}; --limit shows them.")


@app.command(cls=ServiceCommand)
def report(
    context: typer.Context,
    comparison_id: Annotated[str, typer.Argument(help="such as comparison-3f9c2b7a10de", show_default=False)],
    output_file: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="write the report into this file: .html, .md, .csv or .json"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw the curves into this PNG file")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the report of a comparison, also while its jobs run."""
    client: Client = context.obj
    if output_file is not None:
        _write_document(client, comparison_id, output_file)
        return
    found = client.report(comparison_id, curves=plot is not None)
    print_result(found, lambda: report_lines(found), as_json=as_json)
    if not as_json and client.comparison(comparison_id).recipe is not None:
        output.print(verdict_table(found.name, client.verdict(comparison_id)))
    if plot is not None:
        save_plot(found, plot)


def _write_document(client: Client, comparison_id: str, path: Path) -> None:
    suffix = path.suffix.removeprefix(".")
    if suffix not in get_args(Format):
        raise typer.BadParameter(
            f"must end in {', '.join(f'.{name}' for name in get_args(Format))} (got {path.name!r})",
            param_hint="--output",
        )
    atomic_write(path, client.document(comparison_id, suffix))
    errors.print(f"Report: {path}", markup=False)


@app.command(cls=ServiceCommand)
def watch(
    context: typer.Context,
    comparison_id: Annotated[str, typer.Argument(help="such as comparison-3f9c2b7a10de", show_default=False)],
    seconds: Annotated[float, typer.Option(min=0.5, max=600, help="time between two updates")] = 2,
) -> None:
    """Show the curves and the table of a comparison until its jobs have ended.

    Ctrl-C ends the watching, not the jobs.
    """
    client: Client = context.obj
    with interruptible(f"{comparison_id} continues."), Live(console=output, auto_refresh=False) as live:
        while True:
            report = client.report(comparison_id, curves=True)
            live.update(watched(report), refresh=True)
            if report.finished:
                break
            time.sleep(seconds)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes: ready comparisons that test one claim each."""
    found = all_recipes()
    print_result(found, lambda: recipes_table(found), as_json=as_json)
