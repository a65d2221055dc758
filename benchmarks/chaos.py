"""Consistency of jobs while the service and Ray's head are killed repeatedly.

    python benchmarks/chaos.py                       16 clients x 500 keys, 50 and 5 kills: 15 minutes
    python benchmarks/chaos.py --keys 2 --service-kills 2 --head-kills 1    short form, as in the tests

All parts are real: `syncbn serve`, SQLite or the PostgreSQL of --database-url, Ray, MLflow, SIGKILL. The
service is killed at any time, also while it starts; Ray's head is killed with or without the drivers and
workers on its node. A client sends each key until it is acknowledged, and repeats some of them afterwards.
As many jobs run as time permits; the rest is cancelled at the end. Exits with status 1 unless

- each key is one job, and each repetition got the first response;
- no acknowledged job is lost;
- no attempt was executed twice, no two attempts of a job at the same time, and MLflow holds each step of a
  job once;
- the service answers, and reports the end of each attempt that it had not reported before it was killed,
  within 10 s of its start.
"""

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from killable_stack import TIMEOUT_SECONDS, KillableStack
from mlflow import MlflowClient

from service.api.schemas.names import MAX_PAGE_SIZE
from trainer.jobspec import DRIVER_FILE, worker_log_file

MAX_SECONDS_TO_TRUTH = 10.0
REPEATED = 0.2
"""Share of requests that are repeated after their response."""
KILLED_AT_START = 0.3
"""Share of starts after which the service is killed before it is ready."""
SPEC: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [8]},
    "data": {"name": "digits"},
    "num_workers": 1,
    "steps": 200,
    "eval_every": 50,
    "checkpoint": {"every": 50},
    "log_model": False,
}
WORKER_BEGINS = "worker 0 of 1 on "
"""Log line of the trainer when it starts the worker of an attempt."""
STARTED_FILE = "failures/0/process-00000"
"""File that the worker creates when it starts."""


@dataclass
class Found:
    """Observations during the run."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    """Job of each acknowledged key."""
    requests: int = 0
    repetitions: int = 0
    answered_otherwise: list[str] = field(default_factory=list)
    """Keys whose repetition had a different response."""
    seconds_to_answer: list[float] = field(default_factory=list)
    """Seconds from the start of the service."""
    seconds_to_truth: list[float] = field(default_factory=list)
    """The same, for attempts whose end had not been reported."""
    progress: float = 0.0
    """Progress of the kills, from 0 to 1."""


def submit(stack: KillableStack, client: int, keys: int, found: Found) -> None:
    """Act as one client: send each key until it is acknowledged, in step with the kills."""
    chance = random.Random(client)
    with httpx.Client(base_url=stack.url, headers=stack.headers, timeout=5, trust_env=False) as http:
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
    """Send a key until the response is a job."""
    body = {"name": key, "spec": SPEC, "retries": {"infrastructure": 1_000}}
    deadline = time.monotonic() + TIMEOUT_SECONDS
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


def kill_again_and_again(stack: KillableStack, service_kills: int, head_kills: int, found: Found) -> None:
    """Kill the service at random times and, in another thread, Ray's head in between."""
    chance = random.Random(0)
    heads = (
        {round((number + 0.5) * service_kills / head_kills) for number in range(head_kills)}
        if head_kills
        else set()
    )

    def kill_head(with_jobs: bool) -> None:
        stack.kill_head(with_jobs=with_jobs)
        stack.start_head()
        stack.until_ready("ray")

    try:
        with ThreadPoolExecutor(1) as threads:
            killed: list[Future[None]] = []
            for number in range(service_kills):
                time.sleep(chance.uniform(0.2, 3.0))
                if number in heads:
                    killed.append(threads.submit(kill_head, len(killed) % 2 == 0))
                reported = stack.reported_ends()
                stack.kill_service()
                while chance.random() < KILLED_AT_START:
                    stack.start_service()
                    time.sleep(chance.uniform(0.0, 2.0))
                    stack.kill_service()
                unreported = stack.ends_in_files() - reported
                began = time.monotonic()
                stack.start_service()
                stack.until_alive()
                found.seconds_to_answer.append(time.monotonic() - began)
                if unreported:
                    until_reported(stack, unreported)
                    found.seconds_to_truth.append(time.monotonic() - began)
                found.progress = (number + 1) / service_kills
            for each in killed:
                each.result(TIMEOUT_SECONDS)
    finally:
        found.progress = 1.0


def until_reported(stack: KillableStack, ended: set[tuple[str, int]]) -> None:
    """Wait until the service reports the end of each of these attempts."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while missing := ended - stack.reported_ends():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the service does not report the end of {missing}")
        time.sleep(0.05)


def all_jobs(http: httpx.Client) -> Iterator[dict[str, Any]]:
    """Yield all jobs."""
    token = None
    while True:
        query = {"page_size": MAX_PAGE_SIZE} | ({"page_token": token} if token else {})
        page = http.get("/v1/jobs", params=query).raise_for_status().json()
        yield from page["jobs"]
        if (token := page["next_page_token"]) is None:
            return


def end_all(http: httpx.Client, least_succeeded: int) -> list[dict[str, Any]]:
    """Wait until some jobs have succeeded, cancel the rest, and return all jobs after their end."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while sum(job["state"] == "succeeded" for job in all_jobs(http)) < least_succeeded:
        if time.monotonic() > deadline:
            raise TimeoutError(f"fewer than {least_succeeded} jobs have succeeded")
        time.sleep(1)
    for job in all_jobs(http):
        if job["ended_at"] is None:
            answer = http.post(f"/v1/jobs/{job['id']}:cancel")
            if answer.status_code != httpx.codes.CONFLICT:  # it has ended meanwhile
                answer.raise_for_status()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(job["ended_at"] is None for job in all_jobs(http)):
        if time.monotonic() > deadline:
            raise TimeoutError("cancelled jobs do not end")
        time.sleep(0.5)
    return list(all_jobs(http))


def judge(stack: KillableStack, jobs: list[dict[str, Any]], found: Found, keys: int) -> list[str]:
    """Print the results; return violations."""
    wrong = [f"{key}: a repetition got another answer" for key in found.answered_otherwise]
    of_key = Counter(job["name"] for job in jobs)
    wrong += [f"{key} is {count} jobs" for key, count in of_key.items() if count > 1]
    stored = {job["id"] for job in jobs}
    lost = {key: job_id for key, job_id in found.acknowledged.items() if job_id not in stored}
    wrong += [f"{key}: {job_id} was acknowledged and is lost" for key, job_id in lost.items()]
    if len(found.acknowledged) != keys:
        wrong.append(f"{keys} keys, and {len(found.acknowledged)} answers")
    executed = 0
    for log in stack.storage.glob(f"*/attempt-*/{worker_log_file(0)}"):
        text = log.read_text(errors="replace")
        begun = text.count(WORKER_BEGINS)
        executed += begun
        if begun > 1:
            wrong.append(f"{log.parent}: executed {begun} times")
        number = int(log.parent.name.removeprefix("attempt-"))
        before = log.parent.with_name(f"attempt-{number - 1}") / DRIVER_FILE
        if before.exists() and (log.parent / STARTED_FILE).stat().st_mtime < before.stat().st_mtime:
            wrong.append(f"{log.parent}: began before the attempt before it had ended")
    states = Counter(job["state"] for job in jobs)
    os.environ["MLFLOW_TRACKING_TOKEN"] = stack.layout.mlflow_secret
    mlflow = MlflowClient(stack.layout.mlflow_url)
    for job in jobs:
        if job["state"] == "failed":
            wrong.append(f"{job['id']} failed: {job['reason']}")
        if job["state"] == "succeeded":
            steps = sorted(
                point.step for point in mlflow.get_metric_history(job["mlflow_run_id"], "accuracy")
            )
            if steps != list(range(0, SPEC["steps"] + 1, SPEC["eval_every"])):
                wrong.append(f"{job['id']}: MLflow holds steps {steps}")
    attempts = sum(job["attempt"] for job in jobs if job["state"] == "succeeded")
    if executed < states["succeeded"]:
        wrong.append(
            f"{states['succeeded']} jobs have succeeded, and {executed} attempts reported their start"
        )
    requests = f"{found.requests} requests, {found.repetitions} repetitions"
    print(f"{len(found.acknowledged)} keys in {requests}: {len(jobs)} jobs")
    print(
        f"ended: {dict(states)}; {executed} attempts ran; those jobs that succeeded took {attempts} attempts"
    )
    for what, seconds in (("answer", found.seconds_to_answer), ("truth", found.seconds_to_truth)):
        if seconds:
            median, most = statistics.median(seconds), max(seconds)
            print(
                f"from the service's start to its {what}: {median:.1f} s, at most {most:.1f}; "
                f"{len(seconds)} times"
            )
            if most > MAX_SECONDS_TO_TRUTH:
                wrong.append(f"the {what} took {most:.1f} s, more than {MAX_SECONDS_TO_TRUTH:g}")
    return wrong


def main() -> int:
    """Parse the command line, run the kills, and judge the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        stack, found = KillableStack(Path(folder) / "data", options.database_url), Found()
        try:
            stack.start()
            with ThreadPoolExecutor(options.clients + 1) as threads:
                work = [
                    threads.submit(submit, stack, number, options.keys, found)
                    for number in range(options.clients)
                ]
                kills = (options.service_kills, options.head_kills)
                work.append(threads.submit(kill_again_and_again, stack, *kills, found))
                for each in work:
                    each.result()
            stack.until_alive()
            with httpx.Client(base_url=stack.url, headers=stack.headers, timeout=60, trust_env=False) as http:
                jobs = end_all(http, options.succeeded)
            wrong = judge(stack, jobs, found, options.clients * options.keys)
        finally:
            stack.stop()
    print(
        "\n".join(wrong)
        if wrong
        else "each key is one job; nothing acknowledged is lost; no attempt ran twice"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
