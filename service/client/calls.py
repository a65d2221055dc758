"""Descriptions of all API calls, shared by both clients."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Literal, NamedTuple

from pydantic import BaseModel

from service.api.schemas import (
    ComparisonList,
    ComparisonSummaryView,
    ComparisonView,
    Curves,
    EventList,
    JobList,
    JobSummaryView,
    JobView,
    Readiness,
    Report,
    SubmitComparison,
    Validation,
    VerdictView,
)
from service.api.schemas.access import (
    AuditList,
    AuditView,
    CallerView,
    MadeToken,
    SignInLink,
    TokenList,
    TokenView,
)
from service.api.schemas.advice import AdviceView
from service.api.schemas.cluster import ClusterView, UsageList
from service.api.schemas.webhooks import (
    DeliveryList,
    DeliveryView,
    MadeWebhook,
    MakeWebhook,
    WebhookList,
    WebhookView,
)
from service.client.call import Call, Content, Listing, get, given, post, read_text
from service.domain.access import HOME, Scope
from service.domain.jobs import JobState
from service.domain.submission import SubmitOptions
from trainer.jobspec import JobSpec, Norm

Level = Literal["debug", "info", "warning", "error"]


class JobWithTag(NamedTuple):
    """Job and its `ETag`."""

    job: JobView
    etag: str


def submit_job(
    name: str, spec: JobSpec | Content, options: SubmitOptions | None = None, *, key: str | None = None
) -> Call[JobView]:
    """Submit one job, once per `key` (default: a new key)."""
    return post(JobView, "/v1/jobs", _submission(name, spec, options), key=key)


def validate_job(
    name: str, spec: JobSpec | Content, options: SubmitOptions | None = None
) -> Call[Validation]:
    """Check a job without storing it."""
    return post(Validation, "/v1/jobs:validate", _submission(name, spec, options))


def job(job_id: str) -> Call[JobView]:
    """Show one job."""
    return get(JobView, "/v1/jobs/{job_id}", job_id=job_id)


def job_with_etag(job_id: str) -> Call[JobWithTag]:
    """Show one job with its `ETag`, for `cancel`."""
    return Call(
        method="GET",
        route="/v1/jobs/{job_id}",
        path={"job_id": job_id},
        read=lambda answer: JobWithTag(
            JobView.model_validate_json(answer.content), answer.headers.get("ETag", "")
        ),
    )


def jobs(
    *,
    owner: str | None = None,
    state: JobState | None = None,
    comparison: str | None = None,
    norm: Norm | None = None,
    tag: str | None = None,
    page_size: int = 100,
) -> Listing[JobList, JobSummaryView]:
    """List the jobs that match all filters, newest first."""
    query = {"owner": owner, "state": state, "comparison": comparison, "norm": norm, "tag": tag}
    return Listing(get(JobList, "/v1/jobs", query | {"page_size": page_size}), lambda page: page.jobs)


def cancel(job_id: str, *, if_match: str | None = None) -> Call[JobView]:
    """Cancel a job; with `if_match`, an `ETag`, only if it is unchanged."""
    return _guarded("/v1/jobs/{job_id}:cancel", job_id, if_match)


def pause(job_id: str, *, if_match: str | None = None) -> Call[JobView]:
    """Pause a job; with `if_match`, an `ETag`, only if it is unchanged."""
    return _guarded("/v1/jobs/{job_id}:pause", job_id, if_match)


def _guarded(route: str, job_id: str, if_match: str | None) -> Call[JobView]:
    headers = {"If-Match": if_match} if if_match else {}
    return post(JobView, route, headers=headers, job_id=job_id)


def resume(
    job_id: str, *, name: str | None = None, overrides: Content | None = None, key: str | None = None
) -> Call[JobView]:
    """Continue a paused job, or an ended one as a new job.

    `overrides` are paths into the spec of the new job.
    """
    return post(JobView, "/v1/jobs/{job_id}:resume", _change(name, overrides), key=key, job_id=job_id)


def clone(
    job_id: str, *, name: str | None = None, overrides: Content | None = None, key: str | None = None
) -> Call[JobView]:
    """Submit a new job with the spec of another one, from step 0.

    `overrides` are paths into its spec.
    """
    return post(JobView, "/v1/jobs/{job_id}:clone", _change(name, overrides), key=key, job_id=job_id)


def events(job_id: str) -> Call[EventList]:
    """List the state changes of a job."""
    return get(EventList, "/v1/jobs/{job_id}/events", job_id=job_id)


def logs(
    job_id: str, *, attempt: int | None = None, rank: int | None = None, level: Level | None = None
) -> Call[str]:
    """Read the log of an attempt, by default the last.

    Filters: `rank` of a worker, and minimum `level`.
    """
    query = {"attempt": attempt, "rank": rank, "level": level}
    return Call(
        method="GET", route="/v1/jobs/{job_id}/logs", path={"job_id": job_id}, query=query, read=read_text
    )


def advice(job_id: str) -> Call[AdviceView]:
    """Return whether synchronised statistics matter for a job, and their cost."""
    return get(AdviceView, "/v1/jobs/{job_id}/advice", job_id=job_id)


def submit_comparison(body: SubmitComparison | Content, *, key: str | None = None) -> Call[ComparisonView]:
    """Submit a comparison, once per `key` (default: a new key)."""
    return post(ComparisonView, "/v1/comparisons", _content(body), key=key)


def validate_comparison(body: SubmitComparison | Content) -> Call[Validation]:
    """Check a comparison without storing it."""
    return post(Validation, "/v1/comparisons:validate", _content(body))


def comparisons(
    *, owner: str | None = None, page_size: int = 100
) -> Listing[ComparisonList, ComparisonSummaryView]:
    """List comparisons, newest first."""
    query = {"owner": owner, "page_size": page_size}
    return Listing(get(ComparisonList, "/v1/comparisons", query), lambda page: page.comparisons)


def comparison(comparison_id: str) -> Call[ComparisonView]:
    """Show a comparison and its jobs."""
    return get(ComparisonView, "/v1/comparisons/{comparison_id}", comparison_id=comparison_id)


def report(comparison_id: str, *, curves: bool = False) -> Call[Report]:
    """Return the report of a comparison, optionally with the curves of its runs."""
    return get(
        Report, "/v1/comparisons/{comparison_id}/report", {"curves": curves}, comparison_id=comparison_id
    )


def document(comparison_id: str, format: str = "html") -> Call[str]:  # noqa: A002
    """Return the report as a file: html, md, csv or json."""
    return Call(
        method="GET",
        route="/v1/comparisons/{comparison_id}/document",
        path={"comparison_id": comparison_id},
        query={"format": format},
        read=read_text,
    )


def verdict(comparison_id: str) -> Call[VerdictView]:
    """Judge the claim of a comparison that was made from a recipe."""
    return get(VerdictView, "/v1/comparisons/{comparison_id}/verdict", comparison_id=comparison_id)


def curves(comparison_id: str, metric: str) -> Call[Curves]:
    """Return one metric of all runs of a comparison."""
    return get(
        Curves, "/v1/comparisons/{comparison_id}/curves", {"metric": metric}, comparison_id=comparison_id
    )


def me() -> Call[CallerView]:
    """Return the owner and scopes of the current token."""
    return get(CallerView, "/v1/me")


def create_sign_in_link(next: str = HOME) -> Call[SignInLink]:  # noqa: A002 - as the API calls it
    """Create a link that signs a browser in once and leads to the path `next`."""
    return post(SignInLink, "/v1/sign-in-links", {"next": next})


def create_token(
    owner: str, scopes: Sequence[Scope | str], name: str = "token", expires_in_seconds: int | None = None
) -> Call[MadeToken]:
    """Create a token; its secret is only in this answer.

    If the answer is lost, ApiError names the token to revoke.
    """
    body = {"owner": owner, "scopes": list(scopes), "name": name, "expires_in_seconds": expires_in_seconds}
    return post(MadeToken, "/v1/tokens", body)


def tokens(*, page_size: int = 100) -> Listing[TokenList, TokenView]:
    """List all tokens, newest first."""
    return Listing(get(TokenList, "/v1/tokens", {"page_size": page_size}), lambda page: page.tokens)


def revoke_token(token_id: str) -> Call[TokenView]:
    """Revoke a token."""
    return post(TokenView, "/v1/tokens/{token_id}:revoke", token_id=token_id)


def audit(*, page_size: int = 100) -> Listing[AuditList, AuditView]:
    """List the audit records, newest first."""
    return Listing(get(AuditList, "/v1/audit", {"page_size": page_size}), lambda page: page.records)


def create_webhook(body: MakeWebhook | Content, *, key: str | None = None) -> Call[MadeWebhook]:
    """Create a webhook; its signing secret is only in this answer."""
    return post(MadeWebhook, "/v1/webhooks", _content(body), key=key)


def webhooks(*, page_size: int = 100) -> Listing[WebhookList, WebhookView]:
    """List the webhooks, newest first."""
    return Listing(get(WebhookList, "/v1/webhooks", {"page_size": page_size}), lambda page: page.webhooks)


def webhook(webhook_id: str) -> Call[WebhookView]:
    """Show a webhook."""
    return get(WebhookView, "/v1/webhooks/{webhook_id}", webhook_id=webhook_id)


def delete_webhook(webhook_id: str) -> Call[None]:
    """Delete a webhook. If the answer is lost, the retry raises ApiError with 404."""
    return Call(
        method="DELETE",
        route="/v1/webhooks/{webhook_id}",
        path={"webhook_id": webhook_id},
        read=lambda _: None,
    )


def deliveries(webhook_id: str, *, page_size: int = 100) -> Listing[DeliveryList, DeliveryView]:
    """List the messages of a webhook and their results, newest first."""
    first = get(
        DeliveryList, "/v1/webhooks/{webhook_id}/deliveries", {"page_size": page_size}, webhook_id=webhook_id
    )
    return Listing(first, lambda page: page.deliveries)


def usage(*, since: date | None = None, until: date | None = None) -> Call[UsageList]:
    """List the usage of the caller, or for admins of all owners, in days of UTC."""
    return get(UsageList, "/v1/usage", {"since": since, "until": until})


def cluster() -> Call[ClusterView]:
    """Return the resources of Ray and the numbers of jobs."""
    return get(ClusterView, "/v1/cluster")


def ready() -> Call[Readiness]:
    """Return the health checks, also when some of them fail."""
    return replace(get(Readiness, "/readyz"), ok_statuses=(503,))


def alive() -> Call[None]:
    """Check that the service answers."""
    return Call(method="GET", route="/livez", read=lambda _: None)


def metrics() -> Call[str]:
    """Return the metrics for Prometheus."""
    return Call(method="GET", route="/metrics", read=read_text)


def _content(body: BaseModel | Content) -> Content:
    return body.model_dump(mode="json", exclude_unset=True) if isinstance(body, BaseModel) else body


def _submission(name: str, spec: JobSpec | Content, options: SubmitOptions | None) -> Content:
    return {"name": name, "spec": _content(spec), **_content(options or {})}


def _change(name: str | None, overrides: Content | None) -> Content:
    return given({"name": name, "overrides": overrides})
