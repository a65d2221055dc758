"""State machine test of the dispatcher against external events in any order.

Two replicas share a database and a fake of Ray that has the faults of the real one: lost responses, calls
that hang, ignored stops of pending submissions, live drivers reported as failed, dead ones reported as
running, and a head that loses all state. Replicas are killed at any external call, and continue with leases
that they have lost. Drivers follow the rules of `trainer.driver.heartbeat`.
"""

import asyncio
import os
import shutil
import tempfile
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from service.domain.errors import Conflict, UpstreamRejected, UpstreamUnavailable
from service.domain.jobs import JobState
from service.domain.lifecycle import RayStatus
from service.domain.resources import Cluster, Resources
from service.domain.retries import Retries
from service.store.database import Database
from service.store.leases import LeaseStore
from tests.fakes import FakeMlflow, FakeRay
from tests.service.engine.replica_fixture import ReplicaFixture
from tests.service.examples import make_job
from trainer.jobspec import (
    CLOSED_FILE,
    DRIVER_FILE,
    OUTCOME_FILE,
    STOP_FILE,
    JobSpec,
    Outcome,
    attempt_folder,
)

CPUS = 4
CAUSES = ("user_code", "worker_lost", "preempted", "hang")
WHICH = st.integers(0, 7)


def one_of(names, which):
    """Choose by a number whose range does not depend on the names, so that walks can be replayed."""
    return sorted(names)[which % len(names)]


class Killed(BaseException):
    """Kill of the replica's process."""


class World:
    """Counter of external calls that kills the caller at one of them."""

    def __init__(self):
        self.calls_left = None

    def call(self):
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise Killed


class Driver:
    """Driver that Ray has started or will start."""

    def __init__(self, task):
        self.job_id, self.attempt = task.context.job_id, task.context.attempt
        self.workers = task.spec.min_workers
        self.folder = attempt_folder(Path(task.context.folder), self.attempt)
        self.is_alive = False


class QuirkyRay(FakeRay):
    def __init__(self, world):
        super().__init__(total=Resources(cpus=CPUS))
        self.world = world
        self.drivers: dict[str, Driver] = {}
        self.fault: str | None = None
        self.ran: Counter[tuple[str, int]] = Counter()

    async def submit(self, submission_id, task_file):
        self._answer()
        if self.fault == "refuses":
            raise UpstreamRejected("500")
        if submission_id not in self.submissions:
            await super().submit(submission_id, task_file)
            self.drivers.setdefault(submission_id, Driver(self.tasks[submission_id][-1]))
        self.world.call()
        if self.fault == "answers are lost":
            raise UpstreamUnavailable("it hangs")

    async def find(self, submission_id):
        found = await super().find(submission_id)
        if found is not None and self.fault == "calls all failed" and not found.status.is_terminal:
            return type(found)(RayStatus.FAILED, "a passing error")
        return found

    async def cluster(self):
        self._answer()
        free = Resources(cpus=CPUS - sum(driver.workers for driver in self.alive()))
        return Cluster(
            self.total, free, frozenset(name for name, driver in self.drivers.items() if driver.is_alive)
        )

    def set(self, submission_id, status, message=""):
        super().set(submission_id, status, message)
        if status.is_terminal and submission_id in self.drivers:
            self.drivers[submission_id].is_alive = False

    def alive(self):
        return [driver for driver in self.drivers.values() if driver.is_alive]

    def _answer(self):
        self.world.call()
        if self.fault in ("down", "hangs"):
            raise UpstreamUnavailable("Ray did not answer")


class QuirkyMlflow(FakeMlflow):
    def __init__(self, world):
        super().__init__()
        self.world = world

    def _answer(self):
        self.world.call()
        super()._answer()


async def in_turn(*work, return_exceptions):
    """Replace `asyncio.gather` by sequential execution."""
    assert return_exceptions
    results = []
    for each in work:
        try:
            results.append(await each)
        except BaseException as error:
            results.append(error)
    return results


async def here(work, *arguments):
    """Replace `asyncio.to_thread` by a call in the same thread."""
    return work(*arguments)


class Machine(RuleBasedStateMachine):
    template: Path
    steps = 0
    """Over all walks."""

    @initialize()
    def open(self):
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        shutil.copy(self.template, self.folder / "test.db")
        self.clock = 0.0
        self.patches = [
            mock.patch("service.engine.reconciler.time", SimpleNamespace(monotonic=lambda: self.clock)),
            mock.patch("service.engine.lease_holder.time", SimpleNamespace(monotonic=lambda: 0.0)),
            mock.patch("service.domain.lifecycle.pause", return_value=timedelta()),
            # Threads would decide the order of concurrent calls, and walks could not be reproduced.
            mock.patch("service.engine.dispatcher.MAX_CONCURRENT_JOBS", 1),
            mock.patch("service.engine.admission.asyncio", SimpleNamespace(gather=in_turn, to_thread=here)),
        ]
        for patch in self.patches:
            patch.start()
        self.world = World()
        self.ray, self.mlflow = QuirkyRay(self.world), QuirkyMlflow(self.world)
        self.database = Database(f"sqlite+aiosqlite:///{self.folder}/test.db", 5)
        ReplicaFixture.outcome_grace_seconds = 5.0
        self.replicas = [
            ReplicaFixture(
                self.database, self.folder / "storage", name=name, ray=self.ray, mlflow=self.mlflow
            )
            for name in ("one", "two")
        ]
        self.jobs, self.ended, self.succeeded = {}, {}, set()
        for replica in self.replicas * 2:
            self.runner.run(replica.lease_holder.renew() if replica.is_open else replica.start())

    def teardown(self):
        if not hasattr(self, "runner"):
            return
        try:
            self.heal()
        finally:
            for patch in self.patches:
                patch.stop()
            ReplicaFixture.outcome_grace_seconds = 0.0
            self.runner.run(self.database.close())
            self.runner.close()
            shutil.rmtree(self.folder)

    # Actions of users.

    @rule(
        workers=st.integers(1, CPUS + 1),
        priority=st.integers(0, 2),
        preemptible=st.booleans(),
        retries=st.integers(0, 2),
    )
    def submit(self, workers, priority, preemptible, retries):
        limits = Retries(infrastructure=retries, preempted=retries, hang=retries)
        spec = JobSpec(steps=1, num_workers=workers)
        # Jobs are ordered by submission, so that walks are reproducible.
        job = make_job(
            id=f"job-{len(self.jobs):012}",
            spec=spec,
            priority=priority,
            preemptible=preemptible,
            retries=limits,
        )
        self.runner.run(self.replicas[0].jobs.add(job))
        self.jobs[job.id] = job

    @precondition(lambda self: self.jobs)
    @rule(which=WHICH)
    def cancel(self, which):
        job_id = one_of(self.jobs, which)
        if job_id not in self.ended:
            self.runner.run(self.replicas[0].jobs.request_cancel(job_id, "ann"))

    @precondition(lambda self: self.jobs)
    @rule(which=WHICH)
    def pause(self, which):
        job_id = one_of(self.jobs, which)
        with suppress(Conflict):  # it has ended, or is being cancelled
            self.runner.run(self.replicas[0].jobs.request_pause(job_id, "ann"))

    @precondition(lambda self: self.jobs)
    @rule(which=WHICH)
    def unpause(self, which):
        with suppress(Conflict):  # it is not paused
            self.runner.run(self.replicas[0].jobs.request_unpause(one_of(self.jobs, which), "ann"))

    # Actions of the service.

    @rule(which=st.integers(0, 1))
    def round(self, which):
        with suppress(UpstreamUnavailable):
            self.runner.run(self.replicas[which].dispatcher.tick(60))

    @rule(which=st.integers(0, 1), calls=st.integers(0, 12))
    def killed_in_a_round(self, which, calls):
        replica, self.world.calls_left = self.replicas[which], calls
        with suppress(UpstreamUnavailable, Killed):
            self.runner.run(replica.dispatcher.tick(60))
        self.world.calls_left = None
        replica.reopen()
        self.runner.run(replica.start())

    @rule(which=st.integers(0, 1))
    def freezes_and_goes_on_with_leases_that_were_taken(self, which):
        """Move its leases to the other replica without its knowledge."""
        self.runner.run(LeaseStore(self.database).release(self.replicas[which].name))
        self.runner.run(self.replicas[1 - which].lease_holder.renew())

    @rule(which=st.integers(0, 1))
    def renews(self, which):
        self.runner.run(self.replicas[which].lease_holder.renew())

    # Events on the cluster.

    @rule(
        fault=st.sampled_from(
            [None, None, "down", "hangs", "answers are lost", "refuses", "calls all failed"]
        )
    )
    def ray_has_a_fault(self, fault):
        self.ray.fault = fault

    @rule(is_down=st.booleans())
    def mlflow_is_down(self, is_down):
        self.mlflow.is_down = is_down

    @rule(forgets=st.booleans())
    def the_head_is_lost(self, forgets):
        """Kill all drivers; Ray forgets them or reports them as running."""
        for driver in self.ray.alive():
            driver.is_alive = False
        self.ray.drivers.clear()
        if forgets:
            self.ray.lose_everything()

    @rule(which=WHICH)
    def a_driver_starts(self, which):
        if pending := self.pending():
            self.start_driver(one_of(pending, which))

    def pending(self):
        submissions = sorted(self.ray.submissions.items())
        return [
            name
            for name, found in submissions
            if found.status == RayStatus.PENDING and name in self.ray.drivers
        ]

    def start_driver(self, name):
        driver = self.ray.drivers[name]
        self.ray.set(name, RayStatus.RUNNING)
        driver.folder.mkdir(parents=True, exist_ok=True)
        if any(other.is_alive and other.job_id == driver.job_id for other in self.ray.drivers.values()):
            self.ray.set(name, RayStatus.PENDING)  # it waits for the previous driver
        elif (driver.folder / CLOSED_FILE).exists() or (driver.folder / DRIVER_FILE).exists():
            self.ray.set(name, RayStatus.FAILED, "not to be started")
        else:
            (driver.folder / DRIVER_FILE).touch()
            driver.is_alive = True
            self.ray.ran[driver.job_id, driver.attempt] += 1

    @rule(end=st.sampled_from(["succeeds", "succeeds unseen", "dies", *CAUSES]), which=WHICH)
    def a_driver_ends(self, end, which):
        if alive := [name for name, driver in self.ray.drivers.items() if driver.is_alive]:
            self.end_driver(one_of(alive, which), end)

    def end_driver(self, name, end):
        driver = self.ray.drivers[name]
        if end.startswith("succeeds"):
            outcome = Outcome(state="succeeded", reason="done")
            self.succeeded.add(driver.job_id)
        elif end != "dies":
            outcome = Outcome(state="failed", reason="no", cause=end)
        if end != "dies":
            (driver.folder / OUTCOME_FILE).write_text(outcome.model_dump_json())
        if end == "succeeds unseen":  # and Ray, whose head was lost before, reports it as running
            driver.is_alive = False
        else:
            self.ray.set(name, RayStatus.SUCCEEDED if end == "succeeds" else RayStatus.FAILED)

    @rule(seconds=st.sampled_from([1.0, 6.0, 61.0]))
    def time_passes(self, seconds):
        """Live drivers write heartbeats, and end after their attempt was closed or asked to stop."""
        self.clock += seconds
        for name, driver in list(self.ray.drivers.items()):
            if driver.is_alive and (driver.folder / CLOSED_FILE).exists():
                self.ray.set(name, RayStatus.FAILED, "interrupted")
            elif driver.is_alive and (driver.folder / STOP_FILE).exists():
                self.end_driver(name, "preempted")
            elif driver.is_alive:
                file = driver.folder / DRIVER_FILE
                file.write_text("")
                # The clock of live processes, which advances at every read.
                time = file.stat().st_mtime + self.clock
                os.utime(file, (time, time))

    # Invariants.

    @invariant()
    def is_counted(self):
        Machine.steps += 1

    @invariant()
    def each_attempt_runs_once_and_no_job_twice_at_a_time(self):
        if hasattr(self, "ray"):
            assert all(count == 1 for count in self.ray.ran.values()), self.ray.ran
            alive = Counter(driver.job_id for driver in self.ray.alive())
            assert all(count == 1 for count in alive.values()), alive

    @invariant()
    def no_more_runs_than_there_is_room_for(self):
        if hasattr(self, "ray"):
            assert sum(driver.workers for driver in self.ray.alive()) <= CPUS

    @invariant()
    def only_preemptible_jobs_are_preempted(self):
        if hasattr(self, "jobs") and self.jobs:
            for job in self.runner.run(self.replicas[0].jobs.open_jobs(range(8))):
                if job.preempted_by is not None:
                    assert job.preemptible
                    assert job.priority < self.jobs[job.preempted_by].priority

    @invariant()
    def an_end_is_for_ever(self):
        if hasattr(self, "jobs") and self.jobs:
            for job_id, snapshot in self.runner.run(self.replicas[0].jobs.snapshots(list(self.jobs))).items():
                before = self.ended.get(job_id)
                assert before is None or before == snapshot.state
                if snapshot.state.is_terminal:
                    self.ended[job_id] = snapshot.state

    def heal(self):
        """Run without faults: every job that can run ends, and MLflow has its end."""
        self.ray.fault, self.mlflow.is_down = None, False
        for replica in self.replicas * 2:
            self.runner.run(replica.lease_holder.renew())
        store = self.replicas[0].jobs
        for job_id in self.jobs:
            with suppress(Conflict):
                self.runner.run(store.request_unpause(job_id, "ann"))
        for _ in range(200):
            self.time_passes(6.0)
            for name in self.pending():
                self.start_driver(name)
            self.each_attempt_runs_once_and_no_job_twice_at_a_time()
            self.no_more_runs_than_there_is_room_for()
            self.an_end_is_for_ever()
            for replica in self.replicas:
                self.runner.run(replica.dispatcher.tick(60))
            for name, driver in sorted(self.ray.drivers.items()):
                if driver.is_alive:
                    self.end_driver(name, "succeeds")
            if not self.runner.run(store.open_jobs(range(8))) and not self._waiting(store):
                break
        else:
            raise AssertionError(f"still waiting: {self._waiting(store)}")
        for job in [self.runner.run(store.get(job_id)) for job_id in self.jobs]:
            assert job.state.is_terminal or job.spec.min_workers > CPUS, job
            assert sum(job.failures.counts.values()) <= 3 * job.retries.infrastructure
            assert not job.pause_requested

    def _waiting(self, store):
        waiting = self.runner.run(store.queue()).waiting
        return [job for job in waiting.values() if job.min_resources.cpus <= CPUS]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "test.db"

    async def make():
        database = Database(f"sqlite+aiosqlite:///{path}", 5)
        await database.migrate()
        await database.close()

    asyncio.run(make())
    return path


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("walks", "least_steps"), [(15, 1_200), pytest.param(125, 10_000, marks=pytest.mark.slow)]
)
def test_nothing_is_lost_and_nothing_runs_twice(template, walks, least_steps):
    """Walks of up to 100 steps, followed by recovery."""
    Machine.template, Machine.steps = template, 0
    rules = settings(
        max_examples=walks,
        stateful_step_count=100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=rules)
    assert Machine.steps >= least_steps


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("request_", ["preempt", "pause", "pause and resume"])
def test_a_kill_at_any_call_of_a_preemption_or_pause_loses_nothing(template, request_, starts):
    """The next process continues from what is stored; recovery checks the ends of both jobs."""
    Machine.template = template
    for calls in range(10):
        machine = Machine()
        machine.open()
        try:
            machine.submit(workers=CPUS, priority=0, preemptible=True, retries=0)
            machine.round(0)
            if starts:
                machine.a_driver_starts(0)
                machine.round(0)
            if request_ == "preempt":
                machine.submit(workers=1, priority=1, preemptible=False, retries=0)
            else:
                machine.pause(0)
            for _ in range(2):
                machine.killed_in_a_round(0, calls)
                machine.killed_in_a_round(1, calls)
                machine.time_passes(1.0)
                machine.only_preemptible_jobs_are_preempted()
            for _ in range(4):  # both replicas hold leases
                machine.round(0)
                machine.round(1)
                machine.time_passes(1.0)
            store = machine.replicas[0].jobs
            job = machine.runner.run(store.get("job-000000000000"))
            assert (job.state, job.attempt, job.failures.counts) == (JobState.QUEUED, 2, {})
            assert job.pause_requested == (request_ != "preempt")
            assert job.failure_kind == ("preempted" if request_ == "preempt" else None)
            if request_ == "preempt":
                urgent = machine.runner.run(store.get("job-000000000001"))
                assert urgent.state == JobState.SUBMITTED
            elif request_ == "pause and resume":
                machine.unpause(0)
                machine.round(0)
                machine.round(1)
                resumed = machine.runner.run(store.get(job.id))
                assert (resumed.state, resumed.attempt) == (JobState.SUBMITTED, 2)
        finally:
            machine.teardown()
