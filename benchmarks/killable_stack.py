"""Stack of service, Ray and MLflow as processes that `chaos.py` kills and restarts."""

import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from service.local import processes
from service.local.host import choose_ports, keep_secret, short_folder, tail
from service.local.supervisor import Plan, SupervisorHandle
from trainer.jobspec import OUTCOME_FILE

TIMEOUT_SECONDS = 300.0
"""Time limit of each wait."""
OF_JOBS = ("-m trainer", "ray::", "default_worker")
"""Command lines of drivers, workers and supervisors."""


class KillableStack:
    """Service, Ray and MLflow, each in separate processes that can be killed and restarted."""

    def __init__(self, data_dir: Path, database_url: str | None) -> None:
        free = choose_ports(4)
        self.storage = data_dir / "storage"
        for folder in (self.storage, data_dir / "logs", data_dir / "mlflow-artifacts"):
            folder.mkdir(parents=True)
        self.layout = processes.Layout(
            data_dir=data_dir,
            ray_dir=short_folder(data_dir),
            ray_token_path=data_dir / "ray-token",
            api_token=keep_secret(data_dir / "token"),
            mlflow_secret=keep_secret(data_dir / "mlflow-secret"),
            cpus=os.cpu_count() or 1,
            api_port=free[0],
            mlflow_port=free[1],
            ray_port=free[2],
            ray_client_port=free[3],
        )
        keep_secret(self.layout.ray_token_path)
        self._environment = processes.api_environment(self.layout) | {
            "SYNCBN_RATE_PER_SECOND": "100000",
            "SYNCBN_RATE_BURST": "100000",
            "SYNCBN_MAX_ACTIVE_JOBS": str(os.cpu_count() or 1),
        }
        if database_url:
            self._environment["SYNCBN_DATABASE_URL"] = database_url
        self.url = self.layout.api_url
        self.headers = {"Authorization": f"Bearer {self.layout.api_token}"}
        self._probes = httpx.Client(timeout=5, trust_env=False)
        self._mlflow: SupervisorHandle | None = None
        self._ray: psutil.Popen | None = None
        self._service: psutil.Popen | None = None

    def start(self) -> None:
        """Start all processes."""
        part = processes.mlflow_server(self.layout)
        plan = Plan(processes=[part], directory=str(self.layout.data_dir))
        self._mlflow = SupervisorHandle(plan, log=self.layout.log("keeper"))
        self.start_head()
        self.start_service()
        self.until_ready("mlflow", "ray", "api")

    def start_head(self) -> None:
        """Start Ray's head without waiting for it."""
        self.layout.ray_dir.mkdir(mode=0o700, exist_ok=True)
        part = processes.ray_head(self.layout)
        with self.layout.log("ray").open("ab") as log:
            self._ray = psutil.Popen(
                part.command,
                env=part.environment,
                cwd=self.layout.data_dir,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill_head(self, *, with_jobs: bool) -> None:
        """Kill Ray's head, with the drivers and workers on its node or without them."""
        assert self._ray is not None
        processes = [self._ray, *self._ray.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                if with_jobs or not any(words in " ".join(process.cmdline()) for words in OF_JOBS):
                    process.kill()
        self._ray.wait(10)

    def start_service(self) -> None:
        """Start the service without waiting for it."""
        with self.layout.log("api").open("ab") as log:
            command = [sys.executable, "-m", "service.cli.app", "serve"]
            self._service = psutil.Popen(
                command, env=self._environment, cwd=self.layout.data_dir, stdout=log, stderr=log
            )

    def kill_service(self) -> None:
        """Kill the service if it runs."""
        assert self._service is not None
        with suppress(psutil.NoSuchProcess):
            self._service.kill()
        self._service.wait(10)

    def stop(self) -> None:
        """Stop all processes, including those left behind."""
        if self._service is not None:
            self.kill_service()
        if self._ray is not None and self._ray.is_running():
            self.kill_head(with_jobs=True)
        if self._mlflow is not None:
            self._mlflow.stop()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.cwd() == str(self.layout.data_dir):
                    process.kill()
        shutil.rmtree(self.layout.ray_dir, ignore_errors=True)

    def until_alive(self) -> None:
        """Wait until the service answers."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                if self._probes.get(f"{self.url}/livez").is_success:
                    return
            time.sleep(0.05)
        raise TimeoutError(f"the service does not answer:\n{tail(self.layout.log('api'))}")

    def ends_in_files(self) -> set[tuple[str, int]]:
        """Return jobs and attempts whose files record their end."""
        found = self.storage.glob(f"*/attempt-*/{OUTCOME_FILE}")
        return {(path.parts[-3], int(path.parts[-2].removeprefix("attempt-"))) for path in found}

    def reported_ends(self) -> set[tuple[str, int]]:
        """Return the ended attempts that the service reports, of jobs with files.

        Empty if it does not answer.
        """
        reported = set()
        for folder in self.storage.glob("*"):
            with suppress(httpx.HTTPError):
                answer = self._probes.get(f"{self.url}/v1/jobs/{folder.name}", headers=self.headers)
                if answer.is_success:
                    job = answer.json()
                    last = job["attempt"] if job["ended_at"] else job["attempt"] - 1
                    reported |= {(folder.name, attempt) for attempt in range(1, last + 1)}
        return reported

    def until_ready(self, *names: str) -> None:
        """Wait until these processes are ready."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        probes = processes.probes(self.layout, self._probes)
        waiting = list(names)
        while waiting:
            for name in list(waiting):
                with suppress(httpx.HTTPError):
                    if probes[name]():
                        waiting.remove(name)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not ready: {', '.join(waiting)}")
            time.sleep(0.1)
