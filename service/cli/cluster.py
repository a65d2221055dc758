"""Command that shows the service and its cluster."""

import typer

from service.cli.connection import ServiceCommand
from service.cli.output import AsJson, print_result
from service.cli.tables import cluster_view
from service.client import Client

app = typer.Typer()


@app.command(cls=ServiceCommand)
def cluster(context: typer.Context, as_json: AsJson = False) -> None:
    """Show total and free resources, jobs by state, and health checks."""
    client: Client = context.obj
    found, readiness = client.cluster(), client.ready()
    content = found.model_dump(mode="json") | {"readiness": readiness}
    print_result(content, lambda: cluster_view(found, readiness), as_json=as_json)
