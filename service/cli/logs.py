"""Command that prints and follows the log of a job."""

import json
import shutil
import sys
from typing import Annotated

import typer

from service.cli.connection import ServiceCommand
from service.cli.jobs import JobId
from service.cli.output import AsJson, errors, interruptible, print_json, visible
from service.client import Client
from service.client.calls import Level
from service.client.sse import Ended, LogLine, UnfinishedLine

CLEAR_LINE = "\r\x1b[K"

app = typer.Typer()


@app.command(cls=ServiceCommand)
def logs(
    context: typer.Context,
    job_id: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="print lines as they are written, until the job has ended")
    ] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="lines of this worker alone")] = None,
    level: Annotated[Level | None, typer.Option(help="lines of this level or a more serious one")] = None,
    attempt: Annotated[
        int | None, typer.Option(min=1, help="default: the last one; with -f all, or those from this one on")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="print control characters, such as colours, as they are, instead of as escapes"
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the log of a job; lines of workers begin with their rank."""
    client: Client = context.obj
    shown = str if raw else visible
    colour = True if raw else None  # else escape sequences are taken out where the output is no terminal
    if not follow:
        text = client.logs(job_id, attempt=attempt, rank=rank, level=level)
        if as_json:
            print_json({"lines": text.splitlines()})
        else:
            typer.echo(shown(text), nl=False, color=colour)
        return
    is_live = sys.stdout.isatty() and not as_json
    events = client.follow_logs(job_id, attempt=attempt, rank=rank, level=level, unfinished=is_live)
    with interruptible(f"{job_id} continues; `syncbn cancel {job_id}` ends it."):
        for event in events:
            if as_json:
                typer.echo(json.dumps(event.model_dump(mode="json")))
                continue
            if is_live:
                typer.echo(CLEAR_LINE, nl=False)
            if isinstance(event, Ended):
                errors.print(f"{job_id}: {event.state}", markup=False)
            elif isinstance(event, UnfinishedLine):
                width = (
                    shutil.get_terminal_size().columns - 1
                )  # a longer one would leave its first part on the screen
                typer.echo(visible(_with_rank(event))[:width], nl=False)
            else:
                typer.echo(shown(_with_rank(event)), color=colour)


def _with_rank(line: LogLine) -> str:
    return line.text if line.rank is None else f"[{line.rank}] {line.text}"
