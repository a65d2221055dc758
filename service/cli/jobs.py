"""Commands for jobs, from their submission to their end."""

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from service.api.schemas import JobView
from service.api.schemas.names import MAX_PAGE_SIZE
from service.cli.connection import ServiceCommand
from service.cli.inputs import (
    Preset,
    RecipeOrFile,
    Set,
    find_file,
    name_of,
    override,
    parse_overrides,
    read_comparison,
    read_mapping,
)
from service.cli.options import (
    Key,
    MaxRunSeconds,
    Name,
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
    output,
    print_json,
    print_result,
    print_warnings,
    visible,
)
from service.cli.progress import wait_for_job
from service.cli.tables import job_view, jobs_table, needs_view
from service.client import Client
from service.domain.jobs import JobState
from trainer.jobspec import Norm

app = typer.Typer()
JobId = Annotated[str, typer.Argument(help="such as job-3f9c2b7a10de", show_default=False)]
SpecFile = Annotated[
    Path,
    typer.Argument(help="YAML file with a spec, or `-` for standard input", show_default=False),
]
OtherName = Annotated[str | None, typer.Option("--name", help="default: that of the other job")]
Wait = Annotated[bool, typer.Option("--wait", help="wait for its end, with a progress bar")]


@app.command(cls=ServiceCommand)
def submit(
    context: typer.Context,
    spec: SpecFile,
    name: Name = None,
    overrides: Set = None,
    tags: Tags = None,
    priority: Priority = None,
    preemptible: Preemptible = False,
    retries: Retries = None,
    queue_timeout_seconds: QueueTimeoutSeconds = None,
    max_run_seconds: MaxRunSeconds = None,
    secrets: Secrets = None,
    key: Key = None,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Submit one job from a file with its spec."""
    client: Client = context.obj
    content = read_mapping(spec)
    override(content, parse_overrides(overrides))
    options = make_options(
        tags, priority, preemptible, retries, queue_timeout_seconds, max_run_seconds, secrets
    )
    _submitted(
        client,
        client.submit_job(name or name_of(spec), content, options, key=key),
        wait=wait,
        as_json=as_json,
    )


@app.command(cls=ServiceCommand)
def validate(
    context: typer.Context,
    file: RecipeOrFile,
    preset: Preset = "quick",
    overrides: Set = None,
    as_json: AsJson = False,
) -> None:
    """Check a job or comparison without storing it, and show the resources it needs."""
    client: Client = context.obj
    path, changes = find_file(file), parse_overrides(overrides)
    content = read_mapping(path)
    if {"spec", "presets"} & content.keys():
        body = read_comparison(path, preset)
        override(body, {f"spec.{field}": value for field, value in changes.items()})
        found = client.validate_comparison(body)
    else:
        override(content, changes)
        found = client.validate_job(name_of(path), content)
    print_result(found, lambda: needs_view(found), as_json=as_json)


@app.command(cls=ServiceCommand)
def jobs(
    context: typer.Context,
    state: Annotated[JobState | None, typer.Option(help="in this state")] = None,
    owner: Annotated[str | None, typer.Option(help="of this owner; admins see all owners'")] = None,
    comparison: Annotated[str | None, typer.Option(help="of this comparison")] = None,
    norm: Annotated[Norm | None, typer.Option(help="with this norm")] = None,
    tag: Annotated[str | None, typer.Option(help="with this tag")] = None,
    limit: Annotated[int, typer.Option(min=1, help="how many, newest first")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs that match all filters, newest first."""
    client: Client = context.obj
    listing = client.jobs(
        state=state,
        owner=owner,
        comparison=comparison,
        norm=norm,
        tag=tag,
        page_size=min(limit, MAX_PAGE_SIZE),
    )
    found = list(islice(listing, limit + 1))
    if as_json:
        print_json(found[:limit])
        return
    output.print(jobs_table(found[:limit]))
    if len(found) > limit:
        errors.print(f"There are more than these {limit}; --limit shows them.")


@app.command(cls=ServiceCommand)
def show(context: typer.Context, job_id: JobId, as_json: AsJson = False) -> None:
    """Show a job and its timeline."""
    client: Client = context.obj
    job, events = client.job(job_id), client.events(job_id).events
    content = job.model_dump(mode="json") | {"events": events}
    print_result(content, lambda: job_view(job, events), as_json=as_json)


@app.command(cls=ServiceCommand)
def cancel(
    context: typer.Context,
    ids: Annotated[
        list[str], typer.Argument(metavar="ID...", help="jobs, or comparisons with all their jobs")
    ],
    as_json: AsJson = False,
) -> None:
    """Cancel jobs; their checkpoints are kept."""
    client: Client = context.obj
    asked: list[JobView] = []
    for each in ids:
        if each.startswith("comparison-"):
            jobs = client.comparison(each).jobs
            asked += [client.cancel(job.id) for job in jobs if not job.state.is_terminal]
        else:
            asked.append(client.cancel(each))
    if as_json:
        print_json(asked)
        return
    for job in asked:
        typer.echo(f"{job.id}: {job.state}" + ("" if job.state.is_terminal else ", cancel requested"))


@app.command(cls=ServiceCommand)
def pause(
    context: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="jobs")],
    as_json: AsJson = False,
) -> None:
    """Pause jobs: running ones save a checkpoint and free their resources."""
    client: Client = context.obj
    asked = [client.pause(each) for each in ids]
    if as_json:
        print_json(asked)
        return
    for job in asked:
        typer.echo(
            f"{job.id}: " + ("paused" if job.state == JobState.QUEUED else f"{job.state}, pause requested")
        )


@app.command(cls=ServiceCommand)
def resume(
    context: typer.Context,
    job_id: JobId,
    name: OtherName = None,
    overrides: Set = None,
    key: Key = None,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Continue a paused job, or from the checkpoints of an ended one as a new job."""
    client: Client = context.obj
    job = client.resume(job_id, name=name, overrides=parse_overrides(overrides), key=key)
    _submitted(client, job, wait=wait, as_json=as_json)


@app.command(cls=ServiceCommand)
def clone(
    context: typer.Context,
    job_id: JobId,
    name: OtherName = None,
    overrides: Set = None,
    key: Key = None,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Submit a new job with the spec of another one, from step 0."""
    client: Client = context.obj
    job = client.clone(job_id, name=name, overrides=parse_overrides(overrides), key=key)
    _submitted(client, job, wait=wait, as_json=as_json)


def _submitted(client: Client, job: JobView, *, wait: bool, as_json: bool) -> None:
    if not as_json:
        typer.echo(f"{job.id}: {job.state}")
        print_warnings(job.warnings)
    if wait:
        job = wait_for_job(client, job)
    if as_json:
        print_json(job)
    elif wait:
        typer.echo(visible(f"{job.id}: {job.state}, {job.reason}"))
    if job.state in (JobState.FAILED, JobState.CANCELLED):
        raise typer.Exit(ExitCode.ENDED_BADLY)
