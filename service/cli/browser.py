"""Command that opens MLflow's pages in a browser."""

import webbrowser
from typing import Annotated
from urllib.parse import urlsplit

import typer

from service.cli.connection import with_client
from service.cli.output import AsJson, output, print_json
from service.client import Client
from service.domain.access import HOME

app = typer.Typer()


@app.command("open")
@with_client
def open_pages(
    client: Client,
    of: Annotated[str | None, typer.Argument(help="a job or comparison; default: all experiments")] = None,
    browser: Annotated[bool, typer.Option("--browser", help="open the link in this machine's browser")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a link to MLflow's pages that signs a browser in once within ten minutes."""
    link = sign_in_link(client, _page_of(client, of) if of else None)
    if as_json:
        print_json({"url": link})
    else:
        output.print(link, markup=False, highlight=False, soft_wrap=True)
    if browser and not webbrowser.open(link):
        raise typer.BadParameter("there is no browser on this machine; open the link above", param_hint="--browser")


def sign_in_link(client: Client, page_url: str | None) -> str:
    """Return a link that signs in once and leads to a page, by default MLflow's home page."""
    address = urlsplit(page_url or HOME)
    return client.create_sign_in_link(address.path + (f"#{address.fragment}" if address.fragment else "")).url


def _page_of(client: Client, identifier: str) -> str:
    found = client.comparison(identifier) if identifier.startswith("comparison-") else client.job(identifier)
    if found.mlflow_url is None:
        raise typer.BadParameter(f"{identifier} has no run in MLflow yet", param_hint="OF")
    return found.mlflow_url
