"""Command that opens pages in a browser."""

import webbrowser
from typing import Annotated
from urllib.parse import urlsplit

import typer

from service.cli.connection import ServiceCommand
from service.cli.output import AsJson, output, print_json
from service.client import Client
from service.domain.mlflow_views import home_url

app = typer.Typer()


@app.command("open", cls=ServiceCommand)
def open_pages(
    context: typer.Context,
    of: Annotated[str | None, typer.Argument(help="a job or comparison; default: the overview")] = None,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="open the page in MLflow instead")] = False,
    browser: Annotated[
        bool, typer.Option("--browser", help="open the link in this machine's browser")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a link to a page that signs a browser in once within ten minutes."""
    client: Client = context.obj
    link = sign_in_link(client, _mlflow_page(client, of) if mlflow else _page_of(client, of))
    if as_json:
        print_json({"url": link})
    else:
        output.print(link, markup=False, highlight=False, soft_wrap=True)
    if browser and not webbrowser.open(link):
        raise typer.BadParameter(
            "there is no browser on this machine; open the link above", param_hint="--browser"
        )


def sign_in_link(client: Client, page_url: str) -> str:
    """Return a link that signs in once and opens a page."""
    address = urlsplit(page_url)
    return client.create_sign_in_link(address.path + (f"#{address.fragment}" if address.fragment else "")).url


def comparison_page(comparison_id: str) -> str:
    """Return the path of a comparison's page."""
    return f"/comparisons/{comparison_id}"


def _page_of(client: Client, identifier: str | None) -> str:
    if identifier is None:
        return "/"
    if identifier.startswith("comparison-"):
        return comparison_page(client.comparison(identifier).id)
    return f"/jobs/{client.job(identifier).id}"


def _mlflow_page(client: Client, identifier: str | None) -> str:
    if identifier is None:
        return home_url("/mlflow")
    found = client.comparison(identifier) if identifier.startswith("comparison-") else client.job(identifier)
    if found.mlflow_url is None:
        raise typer.BadParameter(f"{identifier} has no run in MLflow yet", param_hint="OF")
    return found.mlflow_url
