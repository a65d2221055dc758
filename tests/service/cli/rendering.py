"""Rendering of tables for tests."""

import io

from rich.console import Console


def render(content):
    file = io.StringIO()
    Console(file=file, width=300).print(content)
    return file.getvalue()
