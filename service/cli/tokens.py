"""Commands for tokens and the audit."""

from itertools import islice
from typing import Annotated

import typer

from service.api.schemas.names import MAX_PAGE_SIZE
from service.cli.connection import with_client
from service.cli.output import AsJson, errors, output, print_json
from service.cli.tables import audit_table, tokens_table
from service.client import Client
from service.domain.access import Scope

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke tokens (scope admin); show the current one.")


@app.command()
@with_client
def create(
    client: Client,
    owner: Annotated[str, typer.Argument(help="whose jobs it is for")],
    scope: Annotated[list[Scope], typer.Option(help="may be given more than once")] = [Scope.SUBMIT],  # noqa: B006
    name: Annotated[str, typer.Option(help="what it is for")] = "token",
    expires_days: Annotated[int | None, typer.Option(min=1, max=3650, help="default: it does not expire")] = None,
    as_json: AsJson = False,
) -> None:
    """Create a token and print its secret, once."""
    made = client.create_token(owner, scope, name, expires_days * 86_400 if expires_days else None)
    if as_json:
        print_json(made)
        return
    errors.print(f"{made.id} of {made.owner}; the secret is shown this once:")
    typer.echo(made.token)


@app.command("list")
@with_client
def list_tokens(client: Client, as_json: AsJson = False) -> None:
    """List tokens, newest first."""
    found = list(client.tokens())
    if as_json:
        print_json(found)
    else:
        output.print(tokens_table(found))


@app.command()
@with_client
def revoke(client: Client, token_id: str, as_json: AsJson = False) -> None:
    """Revoke a token."""
    revoked = client.revoke_token(token_id)
    if as_json:
        print_json(revoked)
    else:
        typer.echo(f"{revoked.id}: revoked")


@app.command()
@with_client
def me(client: Client, as_json: AsJson = False) -> None:
    """Show the owner and scopes of the current token."""
    caller = client.me()
    if as_json:
        print_json(caller)
    else:
        typer.echo(f"{caller.token_id} of {caller.owner}: {', '.join(caller.scopes)}")


@app.command()
@with_client
def audit(
    client: Client,
    limit: Annotated[int, typer.Option(min=1, help="how many, newest first")] = 20,
    as_json: AsJson = False,
) -> None:
    """List created and revoked tokens and webhooks, newest first."""
    found = list(islice(client.audit(page_size=min(limit, MAX_PAGE_SIZE)), limit))
    if as_json:
        print_json(found)
    else:
        output.print(audit_table(found))
