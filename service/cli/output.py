"""Output of commands: data on stdout, messages on stderr, exit codes."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters of terminals except newline and tab, and characters that change the direction of text.
"""


def visible(text: str) -> str:
    """Escape control characters.

    Text of jobs and users must not control a terminal.
    """
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class SafeConsole(Console):
    """Console that escapes control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make text of a string, before its width counts in a layout."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render to segments of visible text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


WIDTH_OF_FILES = 160
# A file or another program is as wide as it needs to be.
output = SafeConsole(
    highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH_OF_FILES
)
errors = SafeConsole(stderr=True, highlight=False)

Printable = BaseModel | Sequence[BaseModel] | dict[str, Any]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]


class ExitCode(IntEnum):
    """Exit codes of commands."""

    GOOD = 0
    FAILED = 1
    """The request was refused or failed."""
    USAGE = 2
    """An option, argument or file is invalid; nothing was sent."""
    ENDED_BADLY = 3
    """A job that the command waited for failed or was cancelled."""
    NO_ANSWER = 4
    """The service did not answer or reported a temporary error, also at the last retry."""
    INTERRUPTED = 130


def print_json(content: Printable) -> None:
    """Print data as JSON."""
    typer.echo(json.dumps(_plain(content), indent=2))


def print_result(content: Printable, view: Callable[[], RenderableType], *, as_json: bool) -> None:
    """Print data as JSON, or as a view shows it."""
    if as_json:
        print_json(content)
    else:
        output.print(view())


def print_error(message: str) -> None:
    """Print an error."""
    errors.print(f"[red]error:[/] {escape(message)}", soft_wrap=True)


def print_warnings(warnings: Iterable[str]) -> None:
    """Print warnings about a submission."""
    for warning in warnings:
        errors.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


@contextmanager
def interruptible(hint: str) -> Iterator[None]:
    """Let Ctrl-C end the waiting only; `hint` says how to continue it."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"\n{hint}", markup=False, soft_wrap=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _plain(content: Any) -> Any:
    if isinstance(content, BaseModel):
        return content.model_dump(mode="json")
    if isinstance(content, dict):
        return {name: _plain(value) for name, value in content.items()}
    return [_plain(each) for each in content] if isinstance(content, list | tuple) else content
