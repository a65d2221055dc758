"""Service that `service_load.py` measures, with clients of it and of Ray."""

import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from sqlalchemy import make_url, text

from service.local.host import tail
from service.local.stack import LocalStack
from service.store.database import Database

SPEC: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [100, 100, 100]},
    "data": {"name": "digits"},
    "steps": 100,
    "num_workers": 2,
}
OF_JOBS = ("-m trainer", "ray::", "default_worker", "time.sleep")
"""Command lines of processes of jobs."""
TIMEOUT_SECONDS = 300.0


class Load:
    """One service on one database, with clients of it and of Ray."""

    def __init__(self, stack: LocalStack, database_url: str | None) -> None:
        self.environment = stack.api_environment | {
            "SYNCBN_QUOTA_JOBS": "0",
            "SYNCBN_RATE_PER_SECOND": "1000000",
            "SYNCBN_RATE_BURST": "1000000",
            "SYNCBN_STREAMS_PER_TOKEN": "1000",
        }
        self.environment |= {"SYNCBN_DATABASE_URL": database_url} if database_url else {}
        self.storage = Path(self.environment["SYNCBN_STORAGE"])
        self.url = f"http://127.0.0.1:{self.environment['SYNCBN_PORT']}"
        self.headers = {"Authorization": f"Bearer {self.environment['SYNCBN_TOKEN']}"}
        ray_token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
        self.ray_url, self.ray_headers = (
            self.environment["SYNCBN_RAY_ADDRESS"],
            {"Authorization": f"Bearer {ray_token}"},
        )
        self.log = stack.data_dir / "logs" / "serve.log"
        self.process: psutil.Popen | None = None
        self.ray = psutil.Process(stack.process_ids["ray"])

    async def empty(self) -> None:
        """Drop the content of the database."""
        address = make_url(url := self.environment["SYNCBN_DATABASE_URL"])
        if address.get_backend_name() == "postgresql":
            await empty(url)
        else:
            file = Path(address.database or "")
            for path in file.parent.glob(f"{file.name}*"):
                path.unlink()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[aiohttp.ClientSession]:
        """Run the service."""
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "service.cli.app", "serve"]
            self.process = psutil.Popen(command, env=self.environment, stdout=log, stderr=log)
        try:
            async with session_at(self.url, self.headers) as session:
                await self._until_ready(session)
                yield session
        finally:
            self.process.terminate()
            with suppress(psutil.TimeoutExpired):
                self.process.wait(20)
            with suppress(psutil.NoSuchProcess):
                self.process.kill()

    def ray_session(self) -> aiohttp.ClientSession:
        """Open a client of Ray's jobs API."""
        return session_at(self.ray_url, self.ray_headers)

    async def _until_ready(self, session: aiohttp.ClientSession) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            with suppress(aiohttp.ClientError):
                async with session.get("/readyz") as answer:
                    if answer.ok:
                        return
            await asyncio.sleep(0.1)
        raise TimeoutError(tail(self.log))

    def memory(self) -> float:
        """Return the memory of the service in MB."""
        assert self.process is not None
        return float(self.process.memory_info().rss) / 1e6

    def head_memory(self) -> float:
        """Return the memory of Ray's head in MB, without the processes of jobs."""
        total = 0
        for process in [self.ray, *self.ray.children(recursive=True)]:
            with suppress(psutil.Error):
                if not any(words in " ".join(process.cmdline()) for words in OF_JOBS):
                    total += process.memory_info().rss
        return total / 1e6


def session_at(url: str, headers: dict[str, str]) -> aiohttp.ClientSession:
    """Open a client with an unlimited number of connections."""
    connector, limit = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    return aiohttp.ClientSession(url, headers=headers, connector=connector, timeout=limit)


async def empty(url: str) -> None:
    """Drop all tables that a part has created."""
    database = Database(url, 60)
    async with database.write() as connection:
        await connection.execute(text("DROP SCHEMA public CASCADE"))
        await connection.execute(text("CREATE SCHEMA public"))
    await database.close()


async def until_ended(session: aiohttp.ClientSession, job_id: str) -> None:
    """Wait for the end of a job."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while await state_of(session, job_id) in ("queued", "submitted", "running"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{job_id} does not end")
        await asyncio.sleep(0.5)


async def state_of(session: aiohttp.ClientSession, job_id: str) -> str:
    """Return the state of a job."""
    async with session.get(f"/v1/jobs/{job_id}") as answer:
        return str((await answer.json())["state"])


async def submit(session: aiohttp.ClientSession, name: str, spec: dict[str, Any] = SPEC) -> str:
    """Submit a job and return its id."""
    async with session.post("/v1/jobs", json={"name": name, "spec": spec}) as answer:
        answer.raise_for_status()
        return str((await answer.json())["id"])


async def submit_bare(ray: aiohttp.ClientSession, entrypoint: str) -> str:
    """Submit a job to Ray directly and return its id."""
    async with ray.post("/api/jobs/", json={"entrypoint": entrypoint}) as answer:
        answer.raise_for_status()
        return str((await answer.json())["submission_id"])


def summary(seconds: Sequence[float]) -> str:
    """Format a distribution in milliseconds."""
    return (
        f"median {statistics.median(seconds) * 1e3:.1f} ms, p99 {p99(seconds) * 1e3:.1f} ms, most "
        f"{max(seconds) * 1e3:.1f} ms"
    )


def p99(seconds: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(seconds, n=100, method="inclusive")[98]
