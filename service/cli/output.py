"""Output of commands: data on stdout, messages on stderr, exit codes."""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
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
"""Characters that steer a terminal, but for the line's end and the tab; also those that turn the direction of text around."""


def visible(text: str) -> str:
    """Escape control characters, so that text of jobs and users cannot control a terminal."""
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
output = SafeConsole(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH_OF_FILES)
errors = SafeConsole(stderr=True, highlight=False)

AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]


class ExitCode(IntEnum):
    """Exit codes of commands."""

    GOOD = 0
    FAILED = 1
    """The service refused it, or it could not be done."""
    USAGE = 2
    """An option, an argument or a file that cannot be taken; nothing was sent."""
    ENDED_BADLY = 3
    """A job that was waited for has failed or was cancelled."""
    NO_ANSWER = 4
    """The service did not answer, or was in trouble, at the last try too; the same may succeed later."""
    INTERRUPTED = 130


def print_json(content: BaseModel | Sequence[BaseModel] | dict[str, Any]) -> None:
    """Print data as JSON."""
    typer.echo(json.dumps(_plain(content), indent=2))


def tell_error(message: str) -> None:
    """Print an error."""
    errors.print(f"[red]error:[/] {escape(message)}", soft_wrap=True)


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
