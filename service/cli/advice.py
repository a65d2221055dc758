"""Command for advice on synchronised statistics."""

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from service.api.schemas.advice import AdviceView, SyncCostView
from service.cli.connection import ServiceCommand
from service.cli.jobs import JobId
from service.cli.output import AsJson, print_result
from service.client import Client

app = typer.Typer()
NOTHING = "–"


@app.command(cls=ServiceCommand)
def advice(context: typer.Context, job_id: JobId, as_json: AsJson = False) -> None:
    """Show whether synchronised statistics matter for a job, and what they cost."""
    client: Client = context.obj
    found = client.advice(job_id)
    print_result(found, lambda: advice_view(found), as_json=as_json)


def advice_view(found: AdviceView) -> RenderableType:
    """Decision, reason and cost, and a table of layers."""
    lines = [f"[bold]{found.decision}[/]: {escape(found.reason)}"]
    if found.sync_group_size is not None:
        lines.append(f"sync_group_size: {found.sync_group_size} of {found.workers} workers suffices")
    lines.append(f"cost: {_cost(found.cost)}")
    table = Table("layer", title="Differences between workers", title_justify="left")
    for heading in ("values", "effective values", "variance share", "discrepancy"):
        table.add_column(heading, justify="right")
    table.add_column("decision")
    for layer in found.layers:
        numbers = (layer.values, layer.effective_values, layer.variance_share, layer.discrepancy)
        table.add_row(escape(layer.layer), *map(_number, numbers), layer.decision)
    return Group("\n".join(lines), table) if found.layers else Group("\n".join(lines))


def _cost(cost: SyncCostView | None) -> str:
    if cost is None:
        return "not measured; the probe sync_cost measures it"
    text = f"{1_000 * cost.sync_seconds:.3g} ms of collectives per step"
    if cost.step_seconds is not None:
        text += f", of {1_000 * cost.step_seconds:.3g} ms"
    return text if cost.slowdown is None else f"{text}; slows a step down by {cost.slowdown:.0%}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"
