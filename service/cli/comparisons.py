"""Commands for comparisons: compare, report and recipes."""

from pathlib import Path
from typing import Annotated

import typer

from service.api.schemas import ComparisonView
from service.cli.connection import with_client
from service.cli.inputs import Preset, RecipeOrFile, find_file, read_comparison
from service.cli.inputs import recipes as all_recipes
from service.cli.options import Key, Priority, QueueSeconds, Retries, RunSeconds, Secrets, Tags, make_terms
from service.cli.output import AsJson, ExitCode, output, print_json
from service.cli.progress import wait_for_comparison
from service.cli.report_tables import report_table, save_plot, verdict_table
from service.cli.tables import recipes_table
from service.client import Client
from service.domain.comparisons import without_seed
from service.domain.jobs import JobState
from service.domain.recipes import Recipe
from service.domain.verdicts import RecipeVerdict, Run, judge, metrics_of

app = typer.Typer()


@app.command()
@with_client
def compare(
    client: Client,
    file: RecipeOrFile,
    preset: Preset = "quick",
    tags: Tags = None,
    priority: Priority = None,
    retries: Retries = None,
    queue_seconds: QueueSeconds = None,
    run_seconds: RunSeconds = None,
    secrets: Secrets = None,
    key: Key = None,
    wait: Annotated[bool, typer.Option(help="wait for the jobs and show the report")] = True,
    as_json: AsJson = False,
) -> None:
    """Submit a comparison: a recipe, or a file with name, spec and matrix.

    The file may also have baseline, metric and target.
    """
    body, recipe = read_comparison(find_file(file), preset)
    terms = make_terms(tags, priority, retries, queue_seconds, run_seconds, secrets)
    comparison = client.submit_comparison(body | terms.model_dump(mode="json", exclude_unset=True), key=key)
    if not as_json:
        typer.echo(f"{comparison.id}: {len(comparison.jobs)} jobs")
    if not wait:
        if as_json:
            print_json({"comparison": comparison, "report": None, "verdict": None})
        return
    comparison = wait_for_comparison(client, comparison)
    report = client.report(comparison.id)
    verdict = None if recipe is None else _verdict(client, recipe, comparison)
    if as_json:
        judgement = None if verdict is None else verdict.judgement
        print_json({"comparison": comparison, "report": report, "verdict": judgement})
    else:
        output.print(report_table(report))
        if recipe is not None and verdict is not None:
            output.print(verdict_table(recipe, verdict))
    if any(job.state in (JobState.FAILED, JobState.CANCELLED) for job in comparison.jobs):
        raise typer.Exit(ExitCode.ENDED_BADLY)


@app.command()
@with_client
def report(
    client: Client,
    comparison_id: Annotated[str, typer.Argument(help="such as comparison-3f9c2b7a10de", show_default=False)],
    plot: Annotated[Path | None, typer.Option(help="also draw the curves into this PNG file")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the report of a comparison, also while its jobs run."""
    found = client.report(comparison_id, curves=plot is not None)
    if as_json:
        print_json(found)
    else:
        output.print(report_table(found))
    if plot is not None:
        save_plot(found, plot)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes: ready comparisons that test one claim each."""
    found = all_recipes()
    if as_json:
        print_json(found)
    else:
        output.print(recipes_table(found))


def _verdict(client: Client, recipe: Recipe, comparison: ComparisonView) -> RecipeVerdict:
    """Collect the runs of a recipe and return its verdict."""
    curves = {metric: client.curves(comparison.id, metric) for metric in metrics_of(recipe)}
    points = {(metric, run.job_id): run.points for metric, found in curves.items() for run in found.runs}
    runs = [
        Run(
            variant=without_seed(job.variant),
            seed=job.seed,
            curves={metric: points[metric, job.id] for metric in curves},
            diverged=job.reason.startswith("diverged"),
        )
        for job in comparison.jobs
        if job.state == JobState.SUCCEEDED
    ]
    return judge(recipe, runs)
