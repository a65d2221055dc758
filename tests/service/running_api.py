"""The API on a port of this machine, in a thread, with stand-ins for Ray and MLflow; jobs go on when a test says so."""

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
    def __init__(self, folder):
        self.folder, self.ray, self.mlflow = folder, FakeRay(is_down=True), FakeMlflow()
        self.settings = Settings(
            token=TOKEN,
            port=choose_ports(1)[0],
            database_url=f"sqlite+aiosqlite:///{folder}/test.db",
            storage=folder / "storage",
            poll_seconds=0.02,
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

    def move(self, job_id, *states, reason="test"):
        """Take a job through these states."""
        for state in states:
            self._run(self._move(job_id, state, reason))

    def progress(self, job_id, step):
        async def note():
            jobs = self.app.state.components.jobs
            progress = Progress(step=step, total_steps=10, samples_per_second=9, eta_seconds=1)
            while await jobs.note(await jobs.get(job_id), progress=progress) is None:
                pass

        self._run(note())

    def write(self, job_id, text, name=LOG_FILE):
        """Append to the log of a job's newest attempt."""
        job = self._run(self.app.state.components.jobs.get(job_id))
        folder = self.app.state.components.files.attempt_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a") as file:
            file.write(text)
        end_of_lines = (folder / name).read_bytes().rfind(b"\n") + 1  # as the trainer does
        with (folder / LOG_INDEX_FILE).open("a") as index:
            index.write(f"{name} {end_of_lines}\n")

    async def _move(self, job_id, state, reason):
        jobs = self.app.state.components.jobs
        step = Transition(state=JobState(state), reason=reason)
        while await jobs.advance(await jobs.get(job_id), step, "test") is None:
            pass

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)
