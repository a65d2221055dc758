"""Construction of the service's components from its settings."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from service.adapters.mlflow import MlflowRuns, MlflowRunsOverHttp
from service.adapters.mlflow_http import MlflowHttp
from service.adapters.ray import RayJobs, RayJobsOverHttp
from service.adapters.run_storage import RunFiles
from service.adapters.secret_files import JobSecrets
from service.adapters.spec_checker import SpecChecker
from service.adapters.webhook_http import WebhookHttp
from service.api.dependencies import Components
from service.api.prometheus import Metrics
from service.api.report_files import WRITERS
from service.api.submission_checks import SubmissionChecks
from service.api.subscriptions import JobFeed
from service.domain.access import RateLimit
from service.engine.admission import Admission
from service.engine.comparison_reports import ComparisonReports
from service.engine.dispatcher import Dispatcher
from service.engine.lease_holder import LeaseHolder
from service.engine.metric_alerts import MetricAlerts
from service.engine.reconciler import Reconciler
from service.engine.report_publisher import ReportPublisher
from service.engine.retention import Retention
from service.engine.run_finisher import RunFinisher
from service.engine.submitter import AttemptSettings, Submitter, Upstreams
from service.engine.webhook_sender import WebhookSender
from service.settings import Settings
from service.store.audit import AuditStore
from service.store.comparisons import ComparisonStore
from service.store.credentials import CredentialStore
from service.store.database import Database
from service.store.idempotency import IdempotencyStore
from service.store.jobs import JobStore
from service.store.leases import LeaseStore
from service.store.retention import RetentionStore
from service.store.tokens import TokenStore
from service.store.webhooks import WebhookStore

PROXY_SECONDS = 60.0
"""Timeout between two chunks of a request or response that is forwarded to MLflow."""
FAILURES_PER_SECOND, MAX_FAILURES = 1, 20
"""Rate and burst of requests without a valid token per address."""


@asynccontextmanager
async def open_components(
    settings: Settings, ray: RayJobs | None, mlflow: MlflowRuns | None
) -> AsyncIterator[Components]:
    """Open all components, and close them at exit.

    `ray` and `mlflow` replace those of the settings.
    """
    seconds = settings.call_timeout_seconds
    secret = settings.mlflow_secret.get_secret_value() if settings.mlflow_secret else None
    async with AsyncExitStack() as stack:
        database = Database(settings.database_url, seconds)
        stack.push_async_callback(database.close)
        # Before anything else uses the database; replicas that start together wait for each other.
        await database.migrate()
        if ray is None:
            ray = cluster = RayJobsOverHttp(settings.ray_address, settings.ray_token(), seconds)
            stack.push_async_callback(cluster.close)
        mlflow = mlflow or MlflowRunsOverHttp(settings.mlflow_url, seconds, secret)
        mlflow_http = MlflowHttp(settings.mlflow_url, secret, PROXY_SECONDS)
        stack.push_async_callback(mlflow_http.close)
        checker = SpecChecker(settings.check_seconds, settings.checker_address())
        stack.push_async_callback(checker.close)
        permissions = settings.permissions()
        jobs = JobStore(database, settings.quota_stored_bytes)
        comparisons = ComparisonStore(database, settings.quota_stored_bytes)
        files = RunFiles(settings.storage)
        reports = ComparisonReports(jobs, mlflow)
        stack.push_async_callback(reports.close)
        leases, keys, tokens = LeaseStore(database), IdempotencyStore(database), TokenStore(database)
        credentials = CredentialStore(database)
        metrics = Metrics(jobs, leases)
        replica = LeaseHolder(leases, settings.replica_name(), settings.lease_seconds)
        secrets = JobSecrets(settings.secrets_folder)
        upstreams = Upstreams(ray, mlflow, files)
        attempt_settings = AttemptSettings(f"{settings.nodes_url()}/mlflow", permissions, secrets)
        submitter = Submitter(
            jobs, comparisons, credentials, upstreams, attempt_settings, metrics.dispatch_seconds
        )
        publisher = ReportPublisher(reports, mlflow, WRITERS, settings.browser_url())
        finisher = RunFinisher(jobs, comparisons, upstreams, publisher)
        webhooks = WebhookStore(database)
        outgoing = WebhookHttp(settings.networks(), seconds)
        stack.push_async_callback(outgoing.close)
        dispatcher = Dispatcher(
            replica,
            jobs,
            Reconciler(
                jobs, upstreams, submitter, finisher, MetricAlerts(webhooks, files), settings.limits()
            ),
            Admission(jobs, ray, submitter, settings.policy),
            finisher,
            metrics.tick_seconds,
            settings.poll_seconds,
        )
        yield Components(
            database=database,
            jobs=jobs,
            comparisons=comparisons,
            tokens=tokens,
            credentials=credentials,
            audit=AuditStore(database),
            webhooks=webhooks,
            outgoing=outgoing,
            idempotency=keys,
            ray=ray,
            mlflow=mlflow,
            mlflow_http=mlflow_http,
            files=files,
            reports=reports,
            replica=replica,
            dispatcher=dispatcher,
            sender=WebhookSender(
                webhooks,
                outgoing,
                metrics.webhook_messages,
                poll_seconds=settings.poll_seconds,
                send_seconds=seconds,
            ),
            retention=Retention(
                replica, RetentionStore(database), webhooks, keys, credentials, files, settings.retention()
            ),
            feed=JobFeed(jobs, tokens, settings.poll_seconds, settings.streams_per_token),
            metrics=metrics,
            checks=SubmissionChecks(permissions, secrets, files, checker, ray, settings.policy()),
            rates=RateLimit(settings.rate_per_second, settings.rate_burst),
            failures=RateLimit(FAILURES_PER_SECOND, MAX_FAILURES),
            policy=settings.policy,
            public_url=settings.browser_url(),
        )
