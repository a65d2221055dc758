"""Commands for tokens and the audit."""

from itertools import islice
from typing import Annotated

import typer

from service.api.schemas.names import MAX_PAGE_SIZE
from service.cli.connection import ServiceCommand
from service.cli.output import AsJson, errors, print_json, print_result
from service.cli.tables import audit_table, tokens_table
from service.client import Client
from service.domain.access import Scope

app = typer.Typer(
    no_args_is_help=True, help="Make, list and revoke tokens (scope admin); show the current one."
)


@app.command(cls=ServiceCommand)
def create(
    context: typer.Context,
    owner: Annotated[str, typer.Argument(help="whose jobs it is for")],
    scope: Annotated[list[Scope], typer.Option(help="may be repeated")] = [Scope.SUBMIT],  # noqa: B006
    name: Annotated[str, typer.Option(help="what it is for")] = "token",
    expires_days: Annotated[
        int | None, typer.Option(min=1, max=3650, help="default: it does not expire")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a token and print its secret, once."""
    client: Client = context.obj
    made = client.create_token(owner, scope, name, expires_days * 86_400 if expires_days else None)
    if as_json:
        print_json(made)
        return
    errors.print(f"{made.id} of {made.owner}; the secret is shown this once:")
    typer.echo(made.token)


@app.command("list", cls=ServiceCommand)
def list_tokens(context: typer.Context, as_json: AsJson = False) -> None:
    """List tokens, newest first."""
    client: Client = context.obj
    found = list(client.tokens())
    print_result(found, lambda: tokens_table(found), as_json=as_json)


@app.command(cls=ServiceCommand)
def revoke(context: typer.Context, token_id: str, as_json: AsJson = False) -> None:
    """Revoke a token."""
    client: Client = context.obj
    revoked = client.revoke_token(token_id)
    if as_json:
        print_json(revoked)
    else:
        typer.echo(f"{revoked.id}: revoked")


@app.command(cls=ServiceCommand)
def me(context: typer.Context, as_json: AsJson = False) -> None:
    """Show the owner and scopes of the current token."""
    client: Client = context.obj
    caller = client.me()
    if as_json:
        print_json(caller)
    else:
        typer.echo(f"{caller.token_id} of {caller.owner}: {', '.join(caller.scopes)}")


@app.command(cls=ServiceCommand)
def audit(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, help="how many, newest first")] = 20,
    as_json: AsJson = False,
) -> None:
    """List created and revoked tokens and webhooks, newest first."""
    client: Client = context.obj
    found = list(islice(client.audit(page_size=min(limit, MAX_PAGE_SIZE)), limit))
    print_result(found, lambda: audit_table(found), as_json=as_json)
