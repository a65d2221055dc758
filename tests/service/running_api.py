"""API on a port of this machine, in a thread, with fakes of Ray and, without its address, of MLflow.

Jobs change state by `move`.
"""

import asyncio
import threading
import time

from service.api.app import make_app
from service.api.server import Server
from service.client import Client
from service.domain.jobs import JobState, Transition
from service.local.host import choose_ports
from service.settings import Settings
from tests.fakes import FakeMlflow, FakeRay
from trainer.jobspec import LOG_FILE, LOG_INDEX_FILE, Progress

TOKEN = "0123456789abcdef-test"
SPEC = {"model": {"name": "mlp", "hidden": [8]}, "data": {"name": "digits"}, "steps": 10, "num_workers": 1}


class RunningApi:
    def __init__(self, folder, ray=None, **settings):
        self.folder, self.ray = folder, ray or FakeRay(is_down=True)
        self.mlflow = None if "mlflow_url" in settings else FakeMlflow()
        self.settings = Settings(
            token=TOKEN,
            port=choose_ports(1)[0],
            database_url=f"sqlite+aiosqlite:///{folder}/test.db",
            storage=folder / "storage",
            **({"poll_seconds": 0.02} | settings),
        )
        self.url = f"http://127.0.0.1:{self.settings.port}"

    def start(self):
        self.app = make_app(self.settings, self.ray, self.mlflow)
        self.server = Server(self.app, self.settings)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    async def _serve(self):
        self.loop = asyncio.get_running_loop()
        await self.server.serve()

    def client(self, **options):
        return Client(self.url, TOKEN, **options)

    def submit(self, **changes):
        with self.client() as client:
            return client.submit_job("mine", SPEC | changes).id

    def wait_for_jobs(self, tag, count=1, limit_seconds=30):
        """Return the jobs with this tag once there are `count` of them."""
        deadline = time.monotonic() + limit_seconds
        with self.client() as client:
            while len(jobs := list(client.jobs(tag=tag))) < count:
                assert time.monotonic() < deadline, f"{len(jobs)} of {count} jobs have the tag {tag}"
                time.sleep(0.02)
        return jobs

    def move(self, job_id, *states, reason="test"):
        """Move a job through these states."""
        for state in states:
            self._run(self._move(job_id, state, reason))

    def set_run(self, job_id):
        """Give a job its run in MLflow, whose curves tests set."""

        async def store():
            jobs = self.app.state.components.jobs
            run = {"mlflow_run_id": f"run-of-{job_id}", "mlflow_experiment_id": "1"}
            while await jobs.update_fields(await jobs.get(job_id), **run) is None:
                pass

        self._run(store())

    def progress(self, job_id, step):
        async def note():
            jobs = self.app.state.components.jobs
            progress = Progress(step=step, total_steps=10, samples_per_second=9, eta_seconds=1)
            while await jobs.update_fields(await jobs.get(job_id), progress=progress) is None:
                pass

        self._run(note())

    def write(self, job_id, text, name=LOG_FILE):
        """Append to the log of a job's newest attempt."""
        job = self._run(self.app.state.components.jobs.get(job_id))
        folder = self.app.state.components.files.attempt_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a") as file:
            file.write(text)
        end_of_lines = (folder / name).read_bytes().rfind(b"\n") + 1  # like the trainer
        with (folder / LOG_INDEX_FILE).open("a") as index:
            index.write(f"{name} {end_of_lines}\n")

    def stored_comparison(self, comparison_id):
        return self._run(self.app.state.components.comparisons.get(comparison_id))

    async def _move(self, job_id, state, reason):
        jobs = self.app.state.components.jobs
        step = Transition(state=JobState(state), reason=reason)
        while await jobs.advance(await jobs.get(job_id), step, "test") is None:
            pass

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)
