"""Scale of one service: 1,000 nodes with 8 GPUs, 10,000 jobs a day, by simulation and measured costs.

Three parts. `scheduler` measures rounds of admission. `ray` measures how many calls a second a real Ray head
answers. `simulation` drives the service's own rules (`plan`, `decide`, `Job.apply`) through simulated days.
Then a table of each resource: the load at which it breaks, and the setting that moves the limit.

Assumed, not measured: Poisson arrivals with a daily rhythm, sizes and durations as in `SIZES` and
`--median-hours`, no failures, placement by whole GPUs (a worker uses one). docs/scale.md has the results.
"""

import argparse
import asyncio
import heapq
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil

from service.domain.jobs import Job, JobState, Transition
from service.domain.lifecycle import Advance, Observation, RayStatus, Submission, decide
from service.domain.resources import Cluster, Resources
from service.domain.scheduling import Policy, SchedulableJob, plan
from service.local.stack import LocalStack
from service.settings import Settings
from trainer.jobspec import JobSpec, Outcome

NODES, GPUS, CPUS = 1_000, 8, 64
SIZES = {1: 0.55, 2: 0.12, 4: 0.12, 8: 0.13, 16: 0.05, 32: 0.02, 64: 0.01}
"""Share of jobs by number of GPUs; most are small, as in traces of research clusters."""
SIGMA, LONGEST_HOURS = 1.2, 72.0
"""Of the lognormal durations."""
DAILY_SWING = 0.6
"""Amplitude of the arrival rate around its mean, over a day."""
OWNERS = 200
DAY = 86_400.0
HEAD_BASE_MB = 1_678  # as in docs/operations.md
JOB_MB = 880
"""Private memory of a job's processes on the head.

Ray's supervisor 74 MB, the driver with its launcher 410 MB, Ray Train's controller 397 MB: unique set size of
a job of two workers on one node, torch 2.14.1 and Ray 2.60.
"""
START_SECONDS = 25.0
"""From a submission to the first collective: 20 to 30 s."""
SUBMISSIONS_PER_SECOND = 100
"""Of the API, with a p99 of 28 ms."""
CONCURRENT_CALLS = 32
"""Of a replica to Ray (MAX_CONCURRENT_JOBS)."""
ROUND_SECONDS = 30.0
"""Simulated time between two rounds; those of the service follow each other in about a second."""
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
LIMITS = Settings().limits()
SPECS = {
    gpus: JobSpec.model_validate(
        {
            "data": {"name": "digits"},
            "steps": 1,
            "num_workers": gpus,
            "use_gpu": True,
            "global_batch_size": 8 * gpus,
        }
    )
    for gpus in SIZES
}


def at(seconds: float) -> datetime:
    return EPOCH + timedelta(seconds=seconds)


def queued(number: int, gpus: int, owner: int, priority: int, seconds: float) -> Job:
    arrived = at(seconds)
    return Job(
        id=f"job-{number:07d}", name="simulated", owner=f"owner-{owner}", priority=priority,
        reason="submitted", created_at=arrived, queued_at=arrived, spec=SPECS[gpus],
    )  # fmt: skip


@dataclass
class Load:
    """Arrivals: time, job and run time."""

    jobs_per_day: float
    mean_hours: float
    days: float
    seed: int = 0

    def arrivals(self) -> Iterator[tuple[float, Job, float]]:
        draw = random.Random(self.seed)
        owners = [1 / (1 + number) for number in range(OWNERS)]
        mu = math.log(self.mean_hours * 3_600) - SIGMA**2 / 2
        peak, now, number = self.jobs_per_day / DAY * (1 + DAILY_SWING), 0.0, 0
        while (now := now + draw.expovariate(peak)) < self.days * DAY:
            rate = 1 + DAILY_SWING * math.sin(2 * math.pi * now / DAY)
            if draw.random() * (1 + DAILY_SWING) > rate:
                continue
            (gpus,) = draw.choices(list(SIZES), list(SIZES.values()))
            (owner,) = draw.choices(range(OWNERS), owners)
            priority = 1 if draw.random() < 0.1 else 0
            number += 1
            run = min(draw.lognormvariate(mu, SIGMA), LONGEST_HOURS * 3_600)
            yield now, queued(number, gpus, owner, priority, now), run


@dataclass
class Result:
    """Figures of a simulation."""

    waits: list[float] = field(default_factory=list)
    gpu_seconds: float = 0
    active: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    """Seconds of computation of each round."""
    ended: int = 0


class Simulation:
    """Simulated time, the service's rules, and a cluster without failures."""

    def __init__(self, load: Load, max_active: int) -> None:
        self._load, self._policy = load, Policy(max_active=max_active)
        self._total = Resources(NODES * CPUS, NODES * GPUS)
        self._queue: dict[str, SchedulableJob] = {}
        self._jobs: dict[str, tuple[Job, float]] = {}
        self._active: dict[str, SchedulableJob] = {}
        self._events: list[tuple[float, str, RayStatus]] = []

    def run(self) -> Result:
        """Simulate; the second half of the days is measured."""
        result, arrivals, now = Result(), self._load.arrivals(), 0.0
        coming, from_ = next(arrivals, None), self._load.days * DAY / 2
        while now < self._load.days * DAY:
            now += ROUND_SECONDS
            while coming is not None and coming[0] <= now:
                _, job, seconds = coming
                self._jobs[job.id], self._queue[job.id] = (job, seconds), job.schedulable()
                coming = next(arrivals, None)
            while self._events and self._events[0][0] <= now:
                when, job_id, status = heapq.heappop(self._events)
                result.ended += self._observe(job_id, status, when) and when >= from_
            started = self._admit(now, result)
            if now >= from_:
                result.waits += started
                result.active.append(len(self._active))
                result.waiting.append(len(self._queue))
                held = sum(job.max_resources.gpus for job in self._active.values())
                result.gpu_seconds += held * ROUND_SECONDS
        return result

    def _observe(self, job_id: str, status: RayStatus, when: float) -> bool:
        """Apply what the service decides on a status of Ray; return whether the job has ended."""
        job, seconds = self._jobs[job_id]
        is_end = status.is_terminal
        outcome = Outcome(state="succeeded", reason="simulated") if is_end else None
        action = decide(job, Observation(Submission(status, ""), outcome, 0.0), LIMITS, at(when))
        assert isinstance(action, Advance), action
        job = job.apply(action.transition, at(when))
        if is_end:
            assert job.state == JobState.SUCCEEDED
            del self._active[job_id], self._jobs[job_id]
            return True
        self._jobs[job_id] = job, seconds
        self._active[job_id] = replace(self._active[job_id], has_workers=True)
        heapq.heappush(self._events, (when + seconds, job_id, RayStatus.SUCCEEDED))
        return False

    def _admit(self, now: float, result: Result) -> list[float]:
        """Admit jobs; return their waits in seconds."""
        if not self._queue or len(self._active) >= self._policy.max_active:
            return []  # the plan would only give reasons
        placed = [job.max_resources for job in self._active.values() if job.has_workers]
        used = Resources(sum(one.cpus for one in placed), sum(one.gpus for one in placed))
        cluster = Cluster(self._total, self._total - used)
        began = time.process_time()
        chosen = plan(self._queue.values(), list(self._active.values()), cluster, self._policy, at(now))
        result.rounds.append(time.process_time() - began)
        for candidate in chosen.admitted:
            del self._queue[candidate.id]
            job, seconds = self._jobs[candidate.id]
            self._jobs[candidate.id] = (
                job.apply(Transition(state=JobState.SUBMITTED, reason="admitted"), at(now)),
                seconds,
            )
            self._active[candidate.id] = candidate
            heapq.heappush(self._events, (now + START_SECONDS, candidate.id, RayStatus.RUNNING))
        return [(at(now) - candidate.queued_at).total_seconds() for candidate in chosen.admitted]


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else math.nan


def head_gigabytes(active: float) -> float:
    return (HEAD_BASE_MB + active * JOB_MB) / 1_000


def mean_size() -> float:
    return sum(gpus * share for gpus, share in SIZES.items())


def measure_scheduler(rounds: int) -> dict[int, float]:
    """Print seconds of a round for queues of several lengths; return those without room."""
    print("Rounds of admission with 1,000 active jobs: processor seconds (median, max)")
    print("  waiting |  no room            |  room for 8 GPUs    |  room for 8,000 GPUs, jobs admitted")
    draw, found = random.Random(0), {}
    for length in (100, 1_000, 10_000):
        line = f"  {length:7,} "
        for room in (0, GPUS, NODES * GPUS):
            times, admitted = [], 0
            for _ in range(rounds):
                sizes = draw.choices(list(SIZES), list(SIZES.values()), k=length + 1_000)
                all_jobs = [
                    replace(
                        queued(number, gpus, draw.randrange(OWNERS), 0, draw.uniform(0, 3_600)).schedulable(),
                        has_workers=True,
                    )
                    for number, gpus in enumerate(sizes)
                ]
                waiting, active = all_jobs[:length], all_jobs[length:]
                used = sum(job.max_resources.gpus for job in active)
                cluster = Cluster(Resources(1e6, used + room), Resources(1e6 - used, room))
                began = time.process_time()
                chosen = plan(waiting, active, cluster, Policy(max_active=10**6), at(3_600))
                times.append(time.process_time() - began)
                admitted = len(chosen.admitted)
            if not room:
                found[length] = statistics.median(times)
            line += (
                f"| {statistics.median(times):7.3f} ({max(times):.3f})" + f" {admitted:4}" * (room > 8) + "  "
            )
        print(line)
    return found


def processor_seconds(root: psutil.Process) -> float:
    """Return the processor time of a process and all below it."""
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


async def call_costs(url: str, token: str, ray: psutil.Process, calls: int) -> dict[str, tuple[float, float]]:
    """Return calls a second, and Ray's processor seconds per call, of each kind."""
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
        body = {"entrypoint": "true", "submission_id": "scale-1"}
        (await client.post("/api/jobs/", json=body)).raise_for_status()
        await asyncio.sleep(10)  # the job ends meanwhile
        paths = {
            "status of a job": "/api/jobs/scale-1",
            "nodes": "/api/v0/nodes?detail=true&limit=10000",
            "placement groups": "/api/v0/placement_groups?limit=10000",
            "cluster status": "/api/cluster_status",
        }
        began, used = time.perf_counter(), processor_seconds(ray)
        await asyncio.sleep(10)
        idle = (processor_seconds(ray) - used) / (time.perf_counter() - began)
        costs = {}
        for name, path in paths.items():
            remaining = iter(range(calls))

            async def caller(path: str = path, remaining: Iterator[int] = remaining) -> None:
                for _ in remaining:
                    (await client.get(path)).raise_for_status()

            began, used = time.perf_counter(), processor_seconds(ray)
            await asyncio.gather(*[caller() for _ in range(CONCURRENT_CALLS)])
            took = time.perf_counter() - began
            costs[name] = (calls / took, (processor_seconds(ray) - used - idle * took) / calls)
        return costs


def measure_ray(calls: int) -> dict[str, tuple[float, float]]:
    """Print and return what calls cost a Ray head on this machine."""
    with tempfile.TemporaryDirectory() as folder, LocalStack(Path(folder) / "data", api=False) as stack:
        environment = stack.api_environment
        token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
        ray = psutil.Process(stack.process_ids["ray"])
        costs = asyncio.run(call_costs(environment["SYNCBN_RAY_ADDRESS"], token, ray, calls))
    print(f"\nCalls to a Ray head with one node, {CONCURRENT_CALLS} at the same time", end="; ")
    print(f"load of this machine {os.getloadavg()[0]:.0f}")
    for name, (rate, seconds) in costs.items():
        print(f"  {name:17} {rate:7.0f} a second, {1_000 * seconds:6.1f} ms of processor time each")
    return costs


def simulate(options: argparse.Namespace) -> None:
    """Print simulated days for several settings and loads."""
    print(f"\nSimulated: {NODES:,} nodes with {GPUS} GPUs; {options.days:g} days, or one where active jobs")
    print("are limited, of which the second half is measured;")
    print(f"jobs of {mean_size():.2f} GPUs and {options.mean_hours:g} hours on average")
    print(
        "  jobs a day | max. active | GPUs in use | wait p50     p99       | waiting at end"
        " | active mean   max | head memory | longest round"
    )
    # Overloaded services need no second day to show it.
    runs = [(options.jobs_per_day, most, 1.0) for most in (8, 140)]
    runs += [(options.jobs_per_day * factor, 100_000, options.days) for factor in (0.6, 1, 1.2, 1.4)]
    for jobs_per_day, most, days in runs:
        result = Simulation(Load(jobs_per_day, options.mean_hours, days), most).run()
        share = result.gpu_seconds / (NODES * GPUS * days / 2 * DAY)
        print(
            f"  {jobs_per_day:10,.0f} | {most:11,} | {share:10.1%}  | {quantile(result.waits, 0.5):8,.0f} s "
            f"{quantile(result.waits, 0.99):8,.0f} s | {result.waiting[-1]:14,} |"
            f" {statistics.mean(result.active):8,.0f} {max(result.active):6,}  |"
            f" {head_gigabytes(max(result.active)):8,.0f} GB | {max(result.rounds):6.3f} s",
            flush=True,
        )


def limits(
    options: argparse.Namespace, rounds: dict[int, float], costs: dict[str, tuple[float, float]]
) -> None:
    """Print the load at which each resource breaks, smallest first."""
    per_active = DAY / (options.mean_hours * 3_600 + START_SECONDS)
    heads = math.floor((options.head_gigabytes * 1_000 - HEAD_BASE_MB) / JOB_MB)
    rows = [
        ("active jobs, by default", 8 * per_active, "SYNCBN_MAX_ACTIVE_JOBS"),
        (
            f"memory of one head, {options.head_gigabytes:g} GB: {heads} active jobs",
            heads * per_active,
            "memory of the head, then several clusters",
        ),
        (
            "GPUs",
            NODES * GPUS * DAY / (mean_size() * options.mean_hours * 3_600),
            "nodes; who waits: quotas, priorities, SYNCBN_BACKFILL_SECONDS",
        ),
        ("submissions, 100 a second", SUBMISSIONS_PER_SECOND * DAY, "replicas"),
    ]
    if costs:
        # The dashboard is one process, so that a core of the head is its limit.
        statuses = 1 / costs["status of a job"][1]
        rows += [
            (
                f"a core of the head: {statuses:.0f} active jobs, each asked for every {seconds:g} s",
                seconds * statuses * per_active,
                "SYNCBN_POLL_SECONDS, then several clusters",
            )
            for seconds in (1, 20)
        ]
    print(f"\nLimits, for jobs of {options.mean_hours:g} hours; smallest first")
    print("  jobs a day | resource                                                     | setting")
    for name, jobs, setting in sorted(rows, key=lambda row: row[1]):
        print(f"  {jobs:10,.0f} | {name:60} | {setting}")
    if rounds:
        length = 10_000 / rounds[10_000]
        print(
            f"  A round of admission takes a second with {length:,.0f} waiting jobs (linear in their number)."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=["scheduler", "ray", "simulation"])
    parser.add_argument("--jobs-per-day", type=float, default=10_000)
    parser.add_argument("--mean-hours", type=float, default=3.5)
    parser.add_argument("--days", type=float, default=2)
    parser.add_argument("--head-gigabytes", type=float, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=500, help="of each kind to Ray")
    options = parser.parse_args()
    rounds = measure_scheduler(options.rounds) if "scheduler" in options.parts else {}
    costs = measure_ray(options.calls) if "ray" in options.parts else {}
    if "simulation" in options.parts:
        simulate(options)
    limits(options, rounds, costs)


if __name__ == "__main__":
    main()
