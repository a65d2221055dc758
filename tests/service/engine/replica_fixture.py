"""A dispatcher with all that it works on, on stand-ins for Ray and MLflow."""

from service.adapters.run_storage import RunFiles
from service.adapters.secret_files import JobSecrets
from service.api.prometheus import Metrics
from service.domain.scheduling import Policy
from service.engine.admission import Admission
from service.engine.dispatcher import Dispatcher
from service.engine.lease_holder import Replica
from service.engine.metric_alerts import Thresholds
from service.engine.submitter import Submitter
from service.store.comparisons import ComparisonStore
from service.store.credentials import CredentialStore
from service.store.jobs import JobStore
from service.store.leases import LeaseStore
from service.store.webhooks import WebhookStore
from tests.fakes import FakeMlflow, FakeRay
from tests.service.examples import make_job
from trainer.jobspec import Allowlist


class House:
    """One replica; `reopen` is what a restart of the service does."""

    grace_seconds = 0.0
    policy = Policy(most_active=8)

    def __init__(self, database, storage, *, name="one", ray=None, mlflow=None):
        self.database, self.files, self.name = database, RunFiles(storage), name
        self.jobs, self.comparisons = JobStore(database), ComparisonStore(database)
        self.ray, self.mlflow = ray or FakeRay(), mlflow or FakeMlflow()
        self.reopen()

    def reopen(self):
        self.replica = Replica(LeaseStore(self.database), self.name, 1_000)
        self.is_open = False
        self.metrics = Metrics(self.jobs, LeaseStore(self.database))
        attempts = Submitter(
            self.jobs, self.comparisons, self.ray, self.mlflow, self.files, self.metrics.dispatch_seconds,
            mlflow_url="http://mlflow", credentials=CredentialStore(self.database),
            permissions=Allowlist(), secrets=JobSecrets(None),
        )  # fmt: skip
        self.thresholds = Thresholds(WebhookStore(self.database), self.files)
        self.dispatcher = Dispatcher(
            self.replica, self.jobs, self.comparisons, self.ray, self.mlflow, self.files, attempts,
            Admission(self.jobs, self.ray, attempts, lambda: self.policy), self.thresholds,
            self.metrics.round_seconds,
            poll_seconds=0.01, grace_seconds=self.grace_seconds, silence_seconds=60, start_seconds=60,
        )  # fmt: skip

    async def start(self):
        """Take the leases."""
        if not self.is_open:
            await self.replica.start()
            self.is_open = True

    async def add(self, **changes):
        job = make_job(**changes)
        await self.jobs.add(job)
        return job

    async def round(self):
        await self.start()
        await self.dispatcher.round(60)

    async def state(self, job):
        return (await self.jobs.get(job.id)).state.value

    def write(self, job, name, content):
        folder = self.files.attempt_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content.model_dump_json())
