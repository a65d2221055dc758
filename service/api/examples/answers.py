"""Examples of answers."""

from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel

from service.api.examples.requests import SPEC
from service.api.schemas import (
    Check,
    ComparisonView,
    Curves,
    EventList,
    EventView,
    FieldError,
    JobList,
    JobSummaryView,
    JobView,
    Needs,
    Problem,
    Readiness,
    Report,
    RunCurve,
    SpreadView,
    Validation,
    VariantReport,
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
from service.api.schemas.cluster import ClusterView, Resources
from service.api.schemas.webhooks import DeliveryList, DeliveryView, MadeWebhook, WebhookList, WebhookView
from service.domain.access import Scope
from service.domain.jobs import JobState
from service.domain.retries import Retries
from service.domain.webhooks import Threshold
from trainer.jobspec import JobSpec, Progress


def _summary(job: JobView) -> JobSummaryView:
    return JobSummaryView(**job.model_dump(exclude={"spec"}))


AT = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)
MLFLOW = "http://127.0.0.1:8000/mlflow/#/experiments/1/runs/"
_SPEC = JobSpec.model_validate(SPEC)
QUEUED = JobView(
    id="job-3f9c2b7a10de",
    name="first try",
    owner="ann",
    tags=[],
    priority=0,
    retries=Retries(),
    secrets={},
    queue_seconds=None,
    run_seconds=None,
    state=JobState.QUEUED,
    reason="submitted by the user",
    attempt=1,
    failures={},
    cancel_requested=False,
    progress=None,
    mlflow_run_id=None,
    mlflow_url=None,
    comparison_id=None,
    variant={},
    resumed_from=None,
    cloned_from=None,
    created_at=AT,
    started_at=None,
    ended_at=None,
    norm=_SPEC.norm,
    seed=_SPEC.seed,
    steps=_SPEC.steps,
    spec=_SPEC,
)
RUNNING = QUEUED.model_copy(
    update={
        "state": JobState.RUNNING,
        "reason": "attempt 1 is running",
        "progress": Progress(step=800, total_steps=2000, samples_per_second=5200.0, eta_seconds=13.8),
        "mlflow_run_id": "0d3f5c1b9a7e4f62",
        "mlflow_url": f"{MLFLOW}0d3f5c1b9a7e4f62",
        "started_at": AT + timedelta(seconds=9),
    }
)
OF_COMPARISON = QUEUED.model_copy(
    update={
        "name": "norm=none seed=0",
        "comparison_id": "comparison-5b0e77c1d2aa",
        "variant": {"norm": "none", "seed": 0},
    }
)
COMPARISON = ComparisonView(
    id="comparison-5b0e77c1d2aa",
    name="does BN help",
    owner="ann",
    matrix={"norm": ["none", "sync"], "seed": [0, 1]},
    baseline={"norm": "none"},
    metric="accuracy",
    target=0.8,
    mlflow_url=f"{MLFLOW}9e1c03d4b5a64a7f",
    created_at=AT,
    jobs=[_summary(OF_COMPARISON)],
)
VALIDATION = Validation(
    jobs=1, spec=_SPEC, least=Needs(cpus=2, gpus=0), most=Needs(cpus=2, gpus=0), fits=True, warnings=[]
)
EVENTS = [
    EventView(sequence=sequence, at=AT + timedelta(seconds=seconds), state=state, reason=reason, actor=actor, attempt=1)
    for sequence, seconds, state, reason, actor in (
        (41, 0, JobState.QUEUED, "submitted by the user", "ann"),
        (42, 1, JobState.SUBMITTED, "attempt 1 goes to Ray", "dispatcher"),
        (43, 9, JobState.RUNNING, "attempt 1 is running", "dispatcher"),
    )
]
REPORT = Report(
    comparison_id=COMPARISON.id,
    name=COMPARISON.name,
    finished=True,
    metric="accuracy",
    direction="max",
    target=0.8,
    target_is_given=True,
    warnings=[],
    variants=[
        VariantReport(
            variant={"norm": "sync"},
            label="norm=sync",
            n=3,
            reached=3,
            failed=0,
            steps_to_target=SpreadView(median=100, low=100, high=100),
            best=SpreadView(median=0.93, low=0.93, high=0.93),
            final=SpreadView(median=0.93, low=0.93, high=0.93),
            ratio=SpreadView(median=9.25, low=9.0, high=9.5),
            ratio_is_at_least=False,
            verdict="faster",
            curves=None,
        )
    ],
)
TOKEN = TokenView(
    id="token-7c1d90ab34ef",
    owner="ann",
    name="laptop",
    scopes=[Scope.SUBMIT],
    created_at=AT,
    expires_at=AT + timedelta(days=90),
    revoked_at=None,
    last_used_at=None,
)
WEBHOOK = WebhookView(
    id="webhook-41d7c0aa9be2",
    owner="ann",
    url="https://example.org/hooks/training",
    states=[JobState.SUCCEEDED, JobState.FAILED],
    thresholds=[Threshold(metric="accuracy", relation="at_least", bound=0.9)],
    tag="nightly",
    created_at=AT,
)
DELIVERY = DeliveryView(
    id="message-90b3aa71cd52",
    job_id=QUEUED.id,
    about="succeeded",
    created_at=AT,
    due_at=AT,
    tries=1,
    ended_at=AT + timedelta(seconds=1),
    is_delivered=True,
    answer="204",
)
ANSWERS: dict[str, BaseModel] = {
    "submit_job": QUEUED,
    "clone_job": QUEUED.model_copy(update={"cloned_from": "job-10aa92be77c0"}),
    "resume_job": QUEUED.model_copy(update={"resumed_from": "job-10aa92be77c0"}),
    "show_job": RUNNING,
    "cancel_job": RUNNING.model_copy(update={"cancel_requested": True}),
    "list_jobs": JobList(jobs=[_summary(RUNNING)], next_page_token="NDE"),  # noqa: S106
    "list_events": EventList(events=EVENTS),
    "validate_job": VALIDATION,
    "validate_comparison": VALIDATION.model_copy(update={"jobs": 8}),
    "submit_comparison": COMPARISON,
    "show_comparison": COMPARISON,
    "report_comparison": REPORT,
    "show_curves": Curves(
        metric="accuracy",
        runs=[RunCurve(job_id=QUEUED.id, seed=0, state=JobState.SUCCEEDED, points=[(50, 0.71), (100, 0.81)])],
    ),
    "make_sign_in_link": SignInLink(
        url="http://127.0.0.1:8000/sign-in#code=syncbn_…&next=/mlflow/%23/experiments/1/runs/0d3f5c1b9a7e4f62"
    ),
    "make_token": MadeToken(token="syncbn_…", **TOKEN.model_dump()),  # noqa: S106
    "list_tokens": TokenList(tokens=[TOKEN], next_page_token=None),
    "revoke_token": TOKEN.model_copy(update={"revoked_at": AT + timedelta(days=1)}),
    "list_audit": AuditList(
        records=[
            AuditView(
                at=AT,
                actor="admin",
                token_id="token-b022d492890b",  # noqa: S106
                action="token.create",
                subject=TOKEN.id,
                detail="of ann, with submit",
            )
        ],
        next_page_token=None,
    ),
    "show_caller": CallerView(owner="ann", scopes=[Scope.SUBMIT], token_id=TOKEN.id),
    "make_webhook": MadeWebhook(secret="whsec_…", **WEBHOOK.model_dump()),  # noqa: S106
    "show_webhook": WEBHOOK,
    "list_webhooks": WebhookList(webhooks=[WEBHOOK], next_page_token=None),
    "list_deliveries": DeliveryList(deliveries=[DELIVERY], next_page_token=None),
    "show_cluster": ClusterView(
        total=Resources(cpus=16, gpus=8),
        free=Resources(cpus=4, gpus=2),
        jobs={
            JobState.QUEUED: 3,
            JobState.SUBMITTED: 0,
            JobState.RUNNING: 2,
            JobState.SUCCEEDED: 41,
            JobState.FAILED: 1,
            JobState.CANCELLED: 0,
        },
        oldest_queued_at=AT,
    ),
    "ready": Readiness(
        **dict.fromkeys(("database", "ray", "mlflow", "storage", "dispatcher"), Check(ok=True, detail="answers")),
        ready=True,
    ),
}
"""By operation: what it answers if all is well."""


def _field(field: str, value: Any, takes: str) -> tuple[str, list[FieldError]]:
    return f"{field}: {takes}", [FieldError(field=field, value=value, takes=takes)]


PROBLEMS: dict[HTTPStatus, Problem] = {
    status: Problem(title=status.phrase, status=status, detail=detail, errors=errors)
    for status, (detail, errors) in {
        HTTPStatus.BAD_REQUEST: _field("body", None, "must be JSON in UTF-8 within the size limits"),
        HTTPStatus.UNAUTHORIZED: (
            "this call needs the header `Authorization: Bearer <token>` with a valid token",
            [],
        ),
        HTTPStatus.FORBIDDEN: ("this call needs a token with scope submit; this one has read", []),
        HTTPStatus.NOT_FOUND: ("there is no job 'job-3f9c2b7a10de'", []),
        HTTPStatus.CONFLICT: ("Idempotency-Key: the first request with this key has not been answered yet", []),
        HTTPStatus.PRECONDITION_FAILED: (
            "job job-3f9c2b7a10de has changed since: it is running, attempt 1 is running",
            [],
        ),
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: ("the body must have at most 256,000 bytes", []),
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE: _field("Content-Type", "text/plain", "must be application/json"),
        HTTPStatus.UNPROCESSABLE_ENTITY: _field(
            "spec.global_batch_size", 1, "2 workers with norm 'sync' on 'mnist5k' take 2 to 4000 samples"
        ),
        HTTPStatus.TOO_MANY_REQUESTS: ("too many requests; try again in 1 s", []),
        HTTPStatus.INTERNAL_SERVER_ERROR: ("an error of the service; its log says more", []),
        HTTPStatus.BAD_GATEWAY: ("MLflow refused: INVALID_PARAMETER_VALUE", []),
        HTTPStatus.SERVICE_UNAVAILABLE: ("Ray did not answer", []),
        HTTPStatus.INSUFFICIENT_STORAGE: ("the storage has no space left: No space left on device", []),
    }.items()
}
