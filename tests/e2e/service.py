"""`syncbn serve` in its own process, with a real Ray and MLflow."""

import subprocess
import sys
import time

import httpx

from service.client import Client

SPEC = {
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden": [32]},
    "optimizer": {"lr": 0.5},
    "num_workers": 2,
    "log_model": False,
}


class Service:
    """API and dispatcher that can be started, killed and restarted."""

    def __init__(self, environment, log):
        self.environment, self.log = environment, log
        self.url = f"http://127.0.0.1:{environment['SYNCBN_PORT']}"
        self.process = None

    def start(self):
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "service.cli.app", "serve"]
            self.process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.1)

    def kill(self):
        """Kill the process with SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def client(self):
        return Client(self.url, self.environment["SYNCBN_TOKEN"])

    def until(self, job_id, *states, seconds=120, progress=0):
        """Wait until a job is in one of `states` with at least `progress` steps."""
        deadline = time.monotonic() + seconds
        with self.client() as client:
            while True:
                job = client.job(job_id)
                if job.state in states and (not progress or (job.progress and job.progress.step >= progress)):
                    return job
                details = f"{job}\n{client.logs(job_id) if job.state.is_terminal else ''}"
                assert not job.state.is_terminal, details
                assert time.monotonic() < deadline, details
                time.sleep(0.2)
