"""Command that shows the service and its cluster."""

import typer

from service.cli.connection import with_client
from service.cli.output import AsJson, output, print_json
from service.cli.tables import cluster_view
from service.client import Client

app = typer.Typer()


@app.command()
@with_client
def cluster(client: Client, as_json: AsJson = False) -> None:
    """Show total and free resources, jobs by state, and health checks."""
    found, readiness = client.cluster(), client.ready()
    if as_json:
        print_json(found.model_dump(mode="json") | {"readiness": readiness})
    else:
        output.print(cluster_view(found, readiness))
