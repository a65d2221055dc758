"""Reports of comparisons as files: HTML, Markdown, CSV and JSON."""

from collections.abc import Callable
from typing import Literal

from fastapi import Response

from service.api.schemas import Report
from service.rendering.content import ReportContent
from service.rendering.documents import csv_file, html_file, markdown

Format = Literal["html", "md", "csv", "json"]
MEDIA_TYPES: dict[Format, str] = {
    "html": "text/html; charset=utf-8",
    "md": "text/markdown; charset=utf-8",
    "csv": "text/csv; charset=utf-8",
    "json": "application/json",
}
TEXTS = [media_type.partition(";")[0] for media_type in MEDIA_TYPES.values() if "text/" in media_type]
"""Media types other than JSON, without parameters."""


def _json(content: ReportContent) -> str:
    return Report.of(content.report, with_curves=True).model_dump_json(indent=2)


WRITERS: dict[str, Callable[[ReportContent], str]] = {
    "html": html_file,
    "md": markdown,
    "csv": csv_file,
    "json": _json,
}


def report_file(content: ReportContent, suffix: Format) -> Response:
    """Return a report as a response that browsers store as a file."""
    name = f"{content.report.comparison.id}.{suffix}"
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store"}
    return Response(WRITERS[suffix](content), media_type=MEDIA_TYPES[suffix], headers=headers)
