"""Commands that show the service, its cluster, and usage."""

from datetime import datetime
from typing import Annotated

import typer

from service.cli.connection import ServiceCommand
from service.cli.output import AsJson, print_result
from service.cli.tables import cluster_view, usage_table
from service.client import Client

app = typer.Typer()


@app.command(cls=ServiceCommand)
def cluster(context: typer.Context, as_json: AsJson = False) -> None:
    """Show total and free resources, jobs by state, and health checks."""
    client: Client = context.obj
    found, readiness = client.cluster(), client.ready()
    content = found.model_dump(mode="json") | {"readiness": readiness}
    print_result(content, lambda: cluster_view(found, readiness), as_json=as_json)


@app.command(cls=ServiceCommand)
def usage(
    context: typer.Context,
    since: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="first day, of UTC; default: no limit")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option(formats=["%Y-%m-%d"], help="first day after the last one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show GPU- and CPU-hours by owner, including those of deleted jobs."""
    client: Client = context.obj
    found = client.usage(since=since and since.date(), until=until and until.date())
    print_result(found, lambda: usage_table(found), as_json=as_json)
