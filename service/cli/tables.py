"""Tables of jobs, tokens and the cluster."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from service.api.schemas import (
    Check,
    ComparisonSummaryView,
    EventView,
    JobSummaryView,
    JobView,
    Readiness,
    Validation,
)
from service.api.schemas.access import AuditView, TokenView
from service.api.schemas.cluster import ClusterView, UsageList
from service.cli.output import visible
from service.domain.comparisons import describe
from service.domain.recipes import Recipe
from service.domain.resources import Resources
from trainer.jobspec import JobSpec

COLOURS = {
    "queued": "dim",
    "submitted": "cyan",
    "running": "blue",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
}
NOTHING = "–"


def state_text(job: JobSummaryView) -> str:
    """Return the state of a job in colour, with the reason if it waits or failed."""
    text = _state(job.state)
    return f"{text}: {escape(job.reason)}" if job.state in ("queued", "failed") else text


def jobs_table(jobs: Sequence[JobSummaryView]) -> Table:
    """Table of jobs."""
    table = _table(
        "job", "name", "owner", "state", "attempt", "step", "reason", whole=("job", "state", "attempt")
    )
    for job in jobs:
        step = f"{job.progress.step}/{job.progress.total_steps}" if job.progress else NOTHING
        row = (
            job.id,
            escape(job.name),
            job.owner,
            _state(job.state),
            str(job.attempt),
            step,
            escape(job.reason),
        )
        table.add_row(*row)
    return table


def comparisons_table(comparisons: Sequence[ComparisonSummaryView]) -> Table:
    """Table of comparisons."""
    table = _table("comparison", "name", "owner", "jobs", "axes", "created", whole=("comparison", "created"))
    for each in comparisons:
        counts = ", ".join(f"{count} {state}" for state, count in each.jobs.items() if count)
        axes = " × ".join(f"{len(values)} {path}" for path, values in each.matrix.items())
        table.add_row(each.id, escape(each.name), each.owner, counts, escape(axes), _time(each.created_at))
    return table


def job_view(job: JobView, events: Sequence[EventView]) -> Group:
    """Job and its timeline."""
    progress = job.progress
    options = {
        "priority": job.priority or None,
        "preemptible": "yes" if job.preemptible else None,
        "tags": ", ".join(job.tags),
        "queue_timeout_seconds": job.queue_timeout_seconds,
        "max_run_seconds": job.max_run_seconds,
        "secrets": ", ".join(f"{variable}={name}" for variable, name in job.secrets.items()),
    }
    facts = {
        "job": f"{job.id} {job.name!r} of {job.owner}",
        "state": Text.from_markup(_state(job.state)) + Text(visible(f": {job.reason}")),
        "request": _request(job),
        "attempt": job.attempt,
        "failure kind": job.failure_kind,
        "failures": ", ".join(f"{count} {group}" for group, count in job.failures.items()),
        "step": progress
        and f"{progress.step}/{progress.total_steps}, {progress.samples_per_second:,.0f} samples/s",
        "comparison": job.comparison_id and f"{job.comparison_id}, {describe(job.variant)}",
        "resumed from": job.resumed_from,
        "cloned from": job.cloned_from,
        **options,
        "usage": f"{job.gpu_hours:.2f} GPU-hours, {job.cpu_hours:.2f} CPU-hours",
        "created": _time(job.created_at),
        "started": job.started_at and _time(job.started_at),
        "ended": job.ended_at and _time(job.ended_at),
        "MLflow": job.mlflow_url,
        "spec": _spec_text(job.spec),
    }
    timeline = _table("time", "attempt", "state", "by", "reason", whole=("time", "attempt", "state"))
    for event in events:
        row = (str(event.attempt), _state(event.state), escape(event.actor), escape(event.reason))
        timeline.add_row(_time(event.at), *row)
    return Group(_facts(facts), timeline)


def _request(job: JobView) -> str | None:
    if job.state.is_terminal:
        return None
    if job.cancel_requested:
        return "cancel"
    if job.pause_requested:
        return "pause"
    return f"preempted by {job.preempted_by}" if job.preempted_by else None


def needs_view(found: Validation) -> RenderableType:
    """Resources of a checked submission."""
    fits = {True: "yes", False: "no; it would wait in the queue", None: "Ray does not answer"}[found.fits]
    most = (
        "" if found.max_resources == found.min_resources else f", {_resources(found.max_resources)} at most"
    )
    return _facts(
        {
            "valid": f"{found.jobs} job{'s' if found.jobs > 1 else ''}",
            "each needs": _resources(found.min_resources) + most,
            "cluster is large enough": fits,
            "warnings": "\n".join(found.warnings),
        }
    )


def tokens_table(tokens: Sequence[TokenView]) -> Table:
    """Table of tokens without their secrets."""
    table = _table(
        "token", "owner", "scopes", "name", "expires", "last used", "revoked", whole=("token", "scopes")
    )
    for token in tokens:
        times = [
            _time(at) if at else NOTHING for at in (token.expires_at, token.last_used_at, token.revoked_at)
        ]
        table.add_row(token.id, token.owner, ", ".join(token.scopes), escape(token.name), *times)
    return table


def audit_table(records: Sequence[AuditView]) -> Table:
    """Table of audit records."""
    table = _table("time", "by", "action", "token", "what", whole=("time", "action", "token"))
    for record in records:
        table.add_row(_time(record.at), record.actor, record.action, record.subject, escape(record.detail))
    return table


def usage_table(found: UsageList) -> Table:
    """Table of usage."""
    table = _table("owner", "GPU-hours", "CPU-hours", whole=("owner",))
    for each in found.usage:
        table.add_row(each.owner, f"{each.gpu_hours:.2f}", f"{each.cpu_hours:.2f}")
    return table


def cluster_view(cluster: ClusterView, readiness: Readiness) -> RenderableType:
    """Cluster, queue and health checks."""
    counts = ", ".join(f"{count} {state}" for state, count in cluster.jobs.items() if count)
    checks = {
        "database": readiness.database,
        "Ray": readiness.ray,
        "MLflow": readiness.mlflow,
        "storage": readiness.storage,
        "dispatcher": readiness.dispatcher,
    }
    return _facts(
        {
            "cluster": _resources(cluster.total) if cluster.total else "Ray does not answer",
            "free": cluster.free and _resources(cluster.free),
            "jobs": counts or "none",
            "oldest in the queue": cluster.oldest_queued_at and f"since {_time(cluster.oldest_queued_at)}",
            **{name: _check(check) for name, check in checks.items()},
        }
    )


def recipes_table(recipes: Sequence[Recipe]) -> Table:
    """Table of recipes."""
    table = _table("recipe", "claim", "presets", whole=("recipe",))
    for recipe in recipes:
        table.add_row(recipe.name, escape(recipe.claim), ", ".join(recipe.presets))
    return table


def _facts(facts: Mapping[str, Any]) -> Table:
    """Table of facts without the missing ones."""
    table = Table.grid("", Column(overflow="fold"), padding=(0, 2))
    for name, value in facts.items():
        if value not in (None, ""):
            # Text instead of markup: values of users may contain brackets.
            table.add_row(f"[dim]{name}[/]", value if isinstance(value, Text) else Text(visible(str(value))))
    return table


def _spec_text(spec: JobSpec) -> str:
    """Return a spec as YAML without default values, except for compared fields."""
    changed = spec.model_dump(mode="json", exclude_defaults=True)
    named = {
        "norm": spec.norm.value,
        "model": {"name": spec.model.name} | changed.pop("model", {}),
        "data": {"name": spec.data.name} | changed.pop("data", {}),
    }
    return yaml.safe_dump(named | changed, sort_keys=False, default_flow_style=None, width=1_000).strip()


def _table(*headings: str, whole: Sequence[str]) -> Table:
    """Table whose `whole` columns are shortened last."""
    columns = (Column(heading, no_wrap=heading in whole, overflow="fold") for heading in headings)
    return Table(*columns, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)


def _state(state: str) -> str:
    return f"[{COLOURS[state]}]{state}[/]"


def _time(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M:%S}"


def _resources(amount: Resources) -> str:
    return f"{amount.cpus:g} CPUs" + (f" and {amount.gpus:g} GPUs" if amount.gpus else "")


def _check(check: Check) -> Text:
    return Text(check.detail, style="" if check.ok else "red")
