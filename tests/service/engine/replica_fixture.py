"""Dispatcher with its dependencies, on fakes of Ray and MLflow."""

from service.adapters.run_storage import RunFiles
from service.adapters.secret_files import JobSecrets
from service.api.prometheus import Metrics
from service.api.report_files import WRITERS
from service.domain.lifecycle import Limits, RayStatus
from service.domain.scheduling import Policy
from service.engine.admission import Admission
from service.engine.comparison_reports import ComparisonReports
from service.engine.dispatcher import Dispatcher
from service.engine.lease_holder import LeaseHolder
from service.engine.metric_alerts import MetricAlerts
from service.engine.reconciler import Reconciler
from service.engine.report_publisher import ReportPublisher
from service.engine.run_finisher import RunFinisher
from service.engine.submitter import AttemptSettings, Submitter, Upstreams
from service.store.comparisons import ComparisonStore
from service.store.credentials import CredentialStore
from service.store.jobs import JobStore
from service.store.leases import LeaseStore
from service.store.webhooks import WebhookStore
from tests.fakes import FakeMlflow, FakeRay
from tests.service.examples import make_job
from trainer.jobspec import Allowlist


class ReplicaFixture:
    """One replica; `reopen` acts like a restart of the service."""

    outcome_grace_seconds = 0.0
    stop_grace_seconds = 60.0
    policy = Policy(max_active=8)

    def __init__(self, database, storage, *, name="one", ray=None, mlflow=None):
        self.database, self.files, self.name = database, RunFiles(storage), name
        self.jobs, self.comparisons = JobStore(database), ComparisonStore(database)
        self.ray, self.mlflow = ray or FakeRay(), mlflow or FakeMlflow()
        self.reopen()

    def reopen(self):
        self.lease_holder = LeaseHolder(LeaseStore(self.database), self.name, 1_000)
        self.is_open = False
        self.metrics = Metrics(self.jobs, LeaseStore(self.database))
        upstreams = Upstreams(self.ray, self.mlflow, self.files)
        self.submitter = submitter = Submitter(
            self.jobs,
            self.comparisons,
            CredentialStore(self.database),
            upstreams,
            AttemptSettings("http://mlflow", Allowlist(), JobSecrets(None)),
            self.metrics.dispatch_seconds,
        )
        self.publisher = ReportPublisher(
            ComparisonReports(self.jobs, self.mlflow), self.mlflow, WRITERS, "http://syncbn.example"
        )
        finisher = RunFinisher(self.jobs, self.comparisons, upstreams, self.publisher)
        self.alerts = MetricAlerts(WebhookStore(self.database), self.files)
        limits = Limits(
            outcome_grace_seconds=self.outcome_grace_seconds,
            heartbeat_timeout_seconds=60,
            start_timeout_seconds=60,
            stop_grace_seconds=self.stop_grace_seconds,
        )
        self.dispatcher = Dispatcher(
            self.lease_holder,
            self.jobs,
            Reconciler(self.jobs, upstreams, submitter, finisher, self.alerts, limits),
            Admission(self.jobs, self.ray, submitter, lambda: self.policy),
            finisher,
            self.metrics.tick_seconds,
            0.01,
        )

    async def start(self):
        """Acquire the leases."""
        if not self.is_open:
            await self.lease_holder.start()
            self.is_open = True

    async def add(self, **changes):
        job = make_job(**changes)
        await self.jobs.add(job)
        return job

    async def add_running(self, **changes):
        job = await self.add(**changes)
        await self.tick()
        self.ray.set(job.submission_id, RayStatus.RUNNING)
        await self.tick()
        return job

    async def tick(self):
        await self.start()
        await self.dispatcher.tick(60)

    async def state(self, job):
        return (await self.jobs.get(job.id)).state.value

    def write(self, job, name, content):
        folder = self.files.attempt_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content.model_dump_json())
