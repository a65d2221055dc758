"""Kills the service and Ray's head again and again while clients submit jobs under keys, and then counts what came of them.

    python benchmarks/chaos.py                                              16 clients x 500 keys, 50 and 5 kills: half an hour
    python benchmarks/chaos.py --keys 4 --service-kills 3 --head-kills 1    a short form, which the tests run

All of it is real: `syncbn serve`, SQLite or the PostgreSQL of --database-url, Ray, MLflow, SIGKILL. A client sends each key until
it is answered, some of them again afterwards. Of the jobs as many run as there is time for; what is left at the end is cancelled.
Exits with 1 unless

- each key is one job, and each repetition got the first answer;
- no job is lost that was acknowledged;
- no attempt was executed twice: it had one driver, and MLflow holds each step of a job once;
- no more than 10 s after the service was started again it tells how each attempt ended whose end was in its files.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from mlflow import MlflowClient

from service.cli import parts
from service.cli.keeper import Kept, Plan
from service.cli.machine import choose_ports, keep_secret, short_folder, tail
from trainer.spec import LOG_FILE, OUTCOME_FILE

MOST_SECONDS_TO_TRUTH = 10.0
MOST_SECONDS = 300.0
"""For one thing that is waited for."""
REPEATED = 0.2
"""Share of the requests that are sent again after they were answered."""
SPEC: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [8]},
    "data": {"name": "digits"},
    "num_workers": 1,
    "steps": 200,
    "eval_every": 50,
    "checkpoint": {"every": 50},
    "log_model": False,
}
DRIVER_BEGINS = "Connecting to existing Ray cluster"


class House:
    """The service, Ray and MLflow, each in processes of its own that can be killed and started again."""

    def __init__(self, data_dir: Path, database_url: str | None) -> None:
        free = choose_ports(4)
        self.storage = data_dir / "storage"
        for folder in (self.storage, data_dir / "logs", data_dir / "mlflow-artifacts"):
            folder.mkdir(parents=True)
        self.layout = parts.Layout(
            data_dir=data_dir,
            ray_dir=short_folder(data_dir),
            ray_token_path=data_dir / "ray-token",
            api_token=keep_secret(data_dir / "token"),
            cpus=os.cpu_count() or 1,
            api_port=free[0],
            mlflow_port=free[1],
            ray_port=free[2],
            ray_client_port=free[3],
        )
        keep_secret(self.layout.ray_token_path)
        self._environment = parts.api_environment(self.layout) | {
            "SYNCBN_RATE_PER_SECOND": "100000",
            "SYNCBN_RATE_BURST": "100000",
            "SYNCBN_MAX_ACTIVE_JOBS": str(os.cpu_count() or 1),
        }
        if database_url:
            self._environment["SYNCBN_DATABASE_URL"] = database_url
        self.url = self.layout.api_url
        self.headers = {"Authorization": f"Bearer {self.layout.api_token}"}
        self._probes = httpx.Client(timeout=5, trust_env=False)
        self._kept: dict[str, Kept] = {}
        self._service: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start all of it."""
        self._keep(parts.mlflow_server(self.layout))
        self.start_head()
        self.start_service()
        self._until_ready("mlflow", "ray", "api")

    def start_head(self) -> None:
        """Start Ray's head, without waiting for it."""
        self.layout.ray_dir.mkdir(mode=0o700, exist_ok=True)
        self._keep(parts.ray_head(self.layout))

    def kill_head(self) -> None:
        """Kill Ray's head, and wait until its node has ended, with the drivers and workers on it."""
        deadline = time.monotonic() + MOST_SECONDS
        while not (heads := [each for each in self._descendants("ray") if each.name() == "gcs_server"]):
            if time.monotonic() > deadline:
                raise TimeoutError("Ray has no head")
            time.sleep(0.2)
        heads[0].kill()
        self._kept.pop("ray").stop()

    def start_service(self) -> None:
        """Start the service, without waiting for it."""
        with self.layout.log("api").open("ab") as log:
            command = [sys.executable, "-m", "service.cli.app", "serve"]
            self._service = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def kill_service(self) -> None:
        """Kill the service."""
        assert self._service is not None
        self._service.kill()
        self._service.wait(10)

    def stop(self) -> None:
        """End all of it."""
        if self._service is not None and self._service.poll() is None:
            self._service.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._service.wait(20)
            self.kill_service()
        for kept in self._kept.values():
            kept.stop()

    def until_alive(self) -> None:
        """Wait until the service answers."""
        deadline = time.monotonic() + MOST_SECONDS
        while time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                if self._probes.get(f"{self.url}/livez").is_success:
                    return
            time.sleep(0.05)
        raise TimeoutError(f"the service does not answer:\n{tail(self.layout.log('api'))}")

    def ends_in_files(self) -> set[tuple[str, int]]:
        """Jobs and attempts whose end is in their files."""
        found = self.storage.glob(f"*/attempt-*/{OUTCOME_FILE}")
        return {(path.parts[-3], int(path.parts[-2].removeprefix("attempt-"))) for path in found}

    def _keep(self, part: parts.Part) -> None:
        plan = Plan(parts=[part], directory=str(self.layout.data_dir), remove=[])
        self._kept[part.name] = Kept(plan, log=self.layout.data_dir / "logs" / f"{part.name}-keeper.log")

    def _descendants(self, part: str) -> list[psutil.Process]:
        with suppress(psutil.Error, KeyError):
            return psutil.Process(self._kept[part].process_ids[part]).children(recursive=True)
        return []

    def _until_ready(self, *names: str) -> None:
        deadline = time.monotonic() + MOST_SECONDS
        probes = parts.probes(self.layout, self._probes)
        waiting = list(names)
        while waiting:
            for name in list(waiting):
                with suppress(httpx.HTTPError):
                    if probes[name]():
                        waiting.remove(name)
            if time.monotonic() > deadline:
                raise TimeoutError(f"not ready: {', '.join(waiting)}")
            time.sleep(0.1)


@dataclass
class Found:
    """What was seen on the way."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    """Keys, and the job that each was answered with."""
    requests: int = 0
    repetitions: int = 0
    answered_otherwise: list[str] = field(default_factory=list)
    """Keys of which a repetition got another answer."""
    seconds_to_truth: list[float] = field(default_factory=list)
    progress: float = 0.0
    """Of the killing, from 0 to 1."""


def submit(house: House, client: int, keys: int, found: Found) -> None:
    """Be one client: send each key until it is answered, and keep step with the killing."""
    chance = random.Random(client)
    with httpx.Client(base_url=house.url, headers=house.headers, timeout=5, trust_env=False) as http:
        for number in range(keys):
            while found.progress < number / keys:
                time.sleep(0.05)
            key = f"key-{client}-{number}"
            job_id = send(http, key, found)
            found.acknowledged[key] = job_id
            if chance.random() < REPEATED:
                found.repetitions += 1
                if send(http, key, found) != job_id:
                    found.answered_otherwise.append(key)


def send(http: httpx.Client, key: str, found: Found) -> str:
    """Send a key until it is answered with a job."""
    body = {"name": key, "spec": SPEC, "retries": {"infrastructure": 1_000}}
    deadline = time.monotonic() + MOST_SECONDS
    while time.monotonic() < deadline:
        found.requests += 1
        with suppress(httpx.HTTPError):
            answer = http.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})
            if answer.status_code == httpx.codes.ACCEPTED:
                return str(answer.json()["id"])
            if answer.is_client_error and answer.status_code != httpx.codes.CONFLICT:
                raise RuntimeError(f"{key}: {answer.status_code} {answer.text}")
        time.sleep(0.1)
    raise TimeoutError(f"{key} was not answered in time")


def kill_again_and_again(house: House, service_kills: int, head_kills: int, found: Found) -> None:
    """Kill the service at random times, and Ray's head, in a thread of its own, at times spread among them."""
    chance = random.Random(0)
    heads = (
        {round((number + 0.5) * service_kills / head_kills) for number in range(head_kills)} if head_kills else set()
    )

    def kill_head() -> None:
        house.kill_head()
        house.start_head()

    try:
        with ThreadPoolExecutor(1) as beside:
            killed = []
            for number in range(service_kills):
                time.sleep(chance.uniform(0.2, 3.0))
                if number in heads:
                    killed.append(beside.submit(kill_head))
                house.kill_service()
                ended = house.ends_in_files()
                began = time.monotonic()
                house.start_service()
                house.until_alive()
                with httpx.Client(base_url=house.url, headers=house.headers, timeout=10, trust_env=False) as http:
                    until_told(http, ended)
                found.seconds_to_truth.append(time.monotonic() - began)
                found.progress = (number + 1) / service_kills
            for each in killed:
                each.result(MOST_SECONDS)
    finally:
        found.progress = 1.0


def until_told(http: httpx.Client, ended: set[tuple[str, int]]) -> None:
    """Wait until the service tells of each of these attempts that it has ended."""
    deadline = time.monotonic() + MOST_SECONDS
    waiting = set(ended)
    while waiting:
        for job_id, attempt in list(waiting):
            job = http.get(f"/v1/jobs/{job_id}").raise_for_status().json()
            if job["attempt"] > attempt or job["ended_at"] is not None:
                waiting.remove((job_id, attempt))
        if time.monotonic() > deadline:
            raise TimeoutError(f"the service does not tell that these ended: {waiting}")
        time.sleep(0.05)


def all_jobs(http: httpx.Client) -> Iterator[dict[str, Any]]:
    """Go through all jobs."""
    token = None
    while True:
        query = {"page_size": 1_000} | ({"page_token": token} if token else {})
        page = http.get("/v1/jobs", params=query).raise_for_status().json()
        yield from page["jobs"]
        if (token := page["next_page_token"]) is None:
            return


def end_all(http: httpx.Client, least_succeeded: int) -> list[dict[str, Any]]:
    """Wait until some jobs have succeeded, cancel what is left, and return all jobs once they have ended."""
    deadline = time.monotonic() + MOST_SECONDS
    while sum(job["state"] == "succeeded" for job in all_jobs(http)) < least_succeeded:
        if time.monotonic() > deadline:
            raise TimeoutError(f"fewer than {least_succeeded} jobs have succeeded")
        time.sleep(1)
    for job in all_jobs(http):
        if job["ended_at"] is None:
            http.post(f"/v1/jobs/{job['id']}:cancel")
    deadline = time.monotonic() + MOST_SECONDS
    while any(job["ended_at"] is None for job in all_jobs(http)):
        if time.monotonic() > deadline:
            raise TimeoutError("cancelled jobs do not end")
        time.sleep(0.5)
    return list(all_jobs(http))


def judge(house: House, jobs: list[dict[str, Any]], found: Found, keys: int) -> list[str]:
    """Print what came of the keys; return what is wrong."""
    wrong = [f"{key}: a repetition got another answer" for key in found.answered_otherwise]
    of_key = Counter(job["name"] for job in jobs)
    wrong += [f"{key} is {count} jobs" for key, count in of_key.items() if count > 1]
    stored = {job["id"] for job in jobs}
    lost = {key: job_id for key, job_id in found.acknowledged.items() if job_id not in stored}
    wrong += [f"{key}: {job_id} was acknowledged and is lost" for key, job_id in lost.items()]
    if len(found.acknowledged) != keys:
        wrong.append(f"{keys} keys, and {len(found.acknowledged)} answers")
    executed = 0
    for log in house.storage.glob(f"*/attempt-*/{LOG_FILE}"):
        drivers = log.read_text(errors="replace").count(DRIVER_BEGINS)
        executed += drivers
        if drivers > 1:
            wrong.append(f"{log.parent}: executed {drivers} times")
    states = Counter(job["state"] for job in jobs)
    mlflow = MlflowClient(house.layout.mlflow_url)
    for job in jobs:
        if job["state"] == "failed":
            wrong.append(f"{job['id']} failed: {job['reason']}")
        if job["state"] == "succeeded":
            steps = sorted(point.step for point in mlflow.get_metric_history(job["mlflow_run_id"], "accuracy"))
            if steps != list(range(0, SPEC["steps"] + 1, SPEC["eval_every"])):
                wrong.append(f"{job['id']}: MLflow holds steps {steps}")
    attempts = sum(job["attempt"] for job in jobs if job["state"] == "succeeded")
    requests = f"{found.requests} requests, {found.repetitions} repetitions"
    print(f"{len(found.acknowledged)} keys in {requests}: {len(jobs)} jobs")
    print(f"ended: {dict(states)}; {executed} attempts had a driver; those that succeeded took {attempts} attempts")
    if seconds := found.seconds_to_truth:
        median, most = statistics.median(seconds), max(seconds)
        print(f"from the service's start to the truth: {median:.1f} s, at most {most:.1f}; {len(seconds)} kills")
        if max(seconds) > MOST_SECONDS_TO_TRUTH:
            wrong.append(f"the truth took {max(seconds):.1f} s, more than {MOST_SECONDS_TO_TRUTH:g}")
    return wrong


def main() -> int:
    """Read the command line, kill, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--keys", type=int, default=500, help="of each client")
    parser.add_argument("--service-kills", type=int, default=50)
    parser.add_argument("--head-kills", type=int, default=5)
    parser.add_argument(
        "--succeeded", type=int, default=10, help="jobs that have to succeed before the others are cancelled"
    )
    parser.add_argument("--database-url", help="default: a SQLite file")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        house, found = House(Path(folder) / "data", options.database_url), Found()
        try:
            house.start()
            with ThreadPoolExecutor(options.clients + 1) as threads:
                work = [threads.submit(submit, house, number, options.keys, found) for number in range(options.clients)]
                kills = (options.service_kills, options.head_kills)
                work.append(threads.submit(kill_again_and_again, house, *kills, found))
                for each in work:
                    each.result()
            house.until_alive()
            with httpx.Client(base_url=house.url, headers=house.headers, timeout=60, trust_env=False) as http:
                jobs = end_all(http, options.succeeded)
            wrong = judge(house, jobs, found, options.clients * options.keys)
        finally:
            house.stop()
    print("\n".join(wrong) if wrong else "each key is one job; nothing acknowledged is lost; no attempt ran twice")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
