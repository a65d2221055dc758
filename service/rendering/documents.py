"""Reports of comparisons as Markdown, CSV and a single HTML file."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from service.domain.mlflow_views import plain
from service.domain.reports import setup_of
from service.rendering import content as content_module
from service.rendering.content import ReportContent
from service.rendering.svg import STYLE_SHEET, legend
from service.rendering.tables import (
    Table,
    differences_table,
    findings_table,
    rates_table,
    variants_table,
)

TEMPLATES_OF_REPORTS = Path(__file__).parent / "templates"


def to_yaml(value: object) -> str:
    """Return plain data as YAML."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "setup_of": setup_of,
    "variants_table": variants_table,
    "differences_table": differences_table,
    "rates_table": rates_table,
    "findings_table": findings_table,
    "metric_bands": content_module.metric_bands,
    "metric_chart": content_module.metric_chart,
    "effects_chart": content_module.effects_chart,
    "percentile_charts": content_module.percentile_charts,
    "band_rows": content_module.band_rows,
    "legend": legend,
    "to_yaml": to_yaml,
}
"""Functions that the templates call."""


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES_OF_REPORTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= FUNCTIONS
    return made


def html_file(content: ReportContent) -> str:
    """Return the report as one HTML file, which needs no network and can be printed."""
    return _environment().get_template("report_file.html").render(content=content, style=STYLE_SHEET)


def markdown(content: ReportContent) -> str:
    """Return the report as Markdown, with text of users escaped."""
    report = content.report
    parts = [
        f"# {plain(report.comparison.name)}",
        f"**{plain(report.conclusion.sentence)}**",
        f"Setup: {plain(setup_of(report))}.",
        *(f"Warning: {plain(warning)}" for warning in report.warnings),
        f"Rule: {plain(report.conclusion.rule)}",
        _markdown_table(variants_table(report)),
    ]
    if report.usable_rates:
        parts += ["## Usable learning rates", _markdown_table(rates_table(report))]
    if content.claim is not None and content.verdict is not None:
        parts += [
            "## Claim",
            f"{plain(content.claim.claim)} ({plain(content.claim.source)})",
            f"**The claim: {content.verdict.judgement}.** Falsified if {plain(content.claim.falsified_if)}.",
            _markdown_table(findings_table(content.verdict)),
        ]
    parts += ["## Differences of the specs", _markdown_table(differences_table(report))]
    parts += ["## How to reproduce", *_reproduction(content)]
    return "\n\n".join(parts) + "\n"


def _reproduction(content: ReportContent) -> list[str]:
    found = ", ".join(f"{name} {plain(value)}" for name, value in content.environment.items())
    indented = "\n".join(f"    {line}" for line in to_yaml(dict(content.request)).splitlines())
    return [f"Environment: {found or 'unknown'}.", "`syncbn compare FILE` with this file:", indented]


def csv_file(content: ReportContent) -> str:
    """Return one row per run and step: variant, seed, job, state, step, metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seed", "job", "state", "step", content.report.comparison.metric])
    for result in content.report.variants:
        for run in result.runs:
            for step, value in run.metric:
                writer.writerow([_cell(result.label), run.job.seed, run.job.id, run.job.state, step, value])
    return text.getvalue()


def _cell(text: str) -> str:
    """Return text that spreadsheets do not take for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _markdown_table(table: Table) -> str:
    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(plain(cell) for cell in cells)} |"

    return "\n".join([row(table.headings), row(["---"] * len(table.headings)), *map(row, table.rows)])
