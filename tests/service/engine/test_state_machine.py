"""The dispatcher against everything that can happen around it, in any order.

Two replicas share a database and a stand-in for Ray that has the real one's quirks: answers that are lost, calls that hang, a
stop that is ignored while a submission pends, living drivers called failed, dead ones called running for ever, and a head that
forgets all. Replicas are killed at any external call, and go on with leases that they have lost. Drivers keep to the rules of
`trainer.driver.heartbeat`.
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

from service.domain.errors import UpstreamRejected, UpstreamUnavailable
from service.domain.lifecycle import RayStatus
from service.domain.retries import Retries
from service.domain.scheduling import Capacity, Cluster
from service.store.database import Database
from service.store.leases import LeaseStore
from tests.fakes import FakeMlflow, FakeRay
from tests.service.engine.replica_fixture import House
from tests.service.examples import make_job
from trainer.jobspec import CLOSED_FILE, DRIVER_FILE, OUTCOME_FILE, JobSpec, Outcome, attempt_folder

CPUS = 4
CAUSES = ("user_code", "worker_lost", "preempted", "hang")
WHICH = st.integers(0, 7)


def one_of(names, which):
    """What is drawn may not depend on how many there are: Hypothesis repeats a walk by what was drawn in it."""
    return sorted(names)[which % len(names)]


class Killed(BaseException):
    """The replica's process is no more."""


class World:
    """What the replicas call: counts their calls, and kills the caller at one of them."""

    def __init__(self):
        self.calls_left = None

    def call(self):
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise Killed


class Driver:
    """A driver that Ray has started, or will start."""

    def __init__(self, task):
        self.job_id, self.attempt = task.context.job_id, task.context.attempt
        self.workers = task.spec.min_workers
        self.folder = attempt_folder(Path(task.context.folder), self.attempt)
        self.is_alive = False


class QuirkyRay(FakeRay):
    def __init__(self, world):
        super().__init__(total=Capacity(cpus=CPUS))
        self.world = world
        self.drivers: dict[str, Driver] = {}
        self.trouble: str | None = None
        self.ran: Counter[tuple[str, int]] = Counter()

    async def submit(self, submission_id, task_file):
        self._answer()
        if self.trouble == "refuses":
            raise UpstreamRejected("500")
        if submission_id not in self.submissions:
            await super().submit(submission_id, task_file)
            self.drivers.setdefault(submission_id, Driver(self.tasks[submission_id][-1]))
        self.world.call()
        if self.trouble == "answers are lost":
            raise UpstreamUnavailable("it hangs")

    async def find(self, submission_id):
        found = await super().find(submission_id)
        if found is not None and self.trouble == "calls all failed" and not found.status.is_terminal:
            return type(found)(RayStatus.FAILED, "a passing error")
        return found

    async def cluster(self):
        self._answer()
        free = Capacity(cpus=CPUS - sum(driver.workers for driver in self.alive()))
        return Cluster(self.total, free, frozenset(name for name, driver in self.drivers.items() if driver.is_alive))

    def set(self, submission_id, status, message=""):
        super().set(submission_id, status, message)
        if status.is_terminal and submission_id in self.drivers:
            self.drivers[submission_id].is_alive = False

    def alive(self):
        return [driver for driver in self.drivers.values() if driver.is_alive]

    def _answer(self):
        self.world.call()
        if self.trouble in ("down", "hangs"):
            raise UpstreamUnavailable("Ray did not answer")


class QuirkyMlflow(FakeMlflow):
    def __init__(self, world):
        super().__init__()
        self.world = world

    def _answer(self):
        self.world.call()
        super()._answer()


async def in_turn(*work, return_exceptions):
    """Do what `asyncio.gather` does, one after the other."""
    assert return_exceptions
    results = []
    for each in work:
        try:
            results.append(await each)
        except BaseException as error:
            results.append(error)
    return results


async def here(work, *arguments):
    """Do what `asyncio.to_thread` does, in no other thread."""
    return work(*arguments)


class Machine(RuleBasedStateMachine):
    template: Path

    @initialize()
    def open(self):
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        shutil.copy(self.template, self.folder / "test.db")
        self.clock = 0.0
        self.patches = [
            mock.patch("service.engine.dispatcher.time", SimpleNamespace(monotonic=lambda: self.clock)),
            mock.patch("service.engine.lease_holder.time", SimpleNamespace(monotonic=lambda: 0.0)),
            mock.patch("service.domain.lifecycle.pause", return_value=timedelta()),
            # Which of several calls comes first would be decided by threads, and a walk not be the same twice.
            mock.patch("service.engine.dispatcher.MOST_AT_ONCE", 1),
            mock.patch("service.engine.admission.asyncio", SimpleNamespace(gather=in_turn, to_thread=here)),
        ]
        for patch in self.patches:
            patch.start()
        self.world = World()
        self.ray, self.mlflow = QuirkyRay(self.world), QuirkyMlflow(self.world)
        self.database = Database(f"sqlite+aiosqlite:///{self.folder}/test.db", 5)
        House.grace_seconds = 5.0
        self.houses = [
            House(self.database, self.folder / "storage", name=name, ray=self.ray, mlflow=self.mlflow)
            for name in ("one", "two")
        ]
        self.jobs, self.ended, self.succeeded = {}, {}, set()
        for house in self.houses * 2:
            self.runner.run(house.replica.renew() if house.is_open else house.start())

    def teardown(self):
        if not hasattr(self, "runner"):
            return
        try:
            self.heal()
        finally:
            for patch in self.patches:
                patch.stop()
            House.grace_seconds = 0.0
            self.runner.run(self.database.close())
            self.runner.close()
            shutil.rmtree(self.folder)

    # What users do.

    @rule(workers=st.integers(1, CPUS + 1), priority=st.integers(0, 1), retries=st.integers(0, 2))
    def submit(self, workers, priority, retries):
        limits = Retries(infrastructure=retries, preempted=retries, hang=retries)
        spec = JobSpec(steps=1, num_workers=workers)
        # Their order is that of their submission, so that a walk is the same each time.
        job = make_job(id=f"job-{len(self.jobs):012}", spec=spec, priority=priority, retries=limits)
        self.runner.run(self.houses[0].jobs.add(job))
        self.jobs[job.id] = job

    @precondition(lambda self: self.jobs)
    @rule(which=WHICH)
    def cancel(self, which):
        job_id = one_of(self.jobs, which)
        if job_id not in self.ended:
            self.runner.run(self.houses[0].jobs.request_cancel(job_id, "ann"))

    # What the service does.

    @rule(which=st.integers(0, 1))
    def round(self, which):
        with suppress(UpstreamUnavailable):
            self.runner.run(self.houses[which].dispatcher.round(60))

    @rule(which=st.integers(0, 1), calls=st.integers(0, 12))
    def killed_in_a_round(self, which, calls):
        house, self.world.calls_left = self.houses[which], calls
        with suppress(UpstreamUnavailable, Killed):
            self.runner.run(house.dispatcher.round(60))
        self.world.calls_left = None
        house.reopen()
        self.runner.run(house.start())

    @rule(which=st.integers(0, 1))
    def freezes_and_goes_on_with_leases_that_were_taken(self, which):
        """From now on its leases are the other's, which it does not know."""
        self.runner.run(LeaseStore(self.database).release(self.houses[which].name))
        self.runner.run(self.houses[1 - which].replica.renew())

    @rule(which=st.integers(0, 1))
    def renews(self, which):
        self.runner.run(self.houses[which].replica.renew())

    # What happens on the cluster.

    @rule(trouble=st.sampled_from([None, None, "down", "hangs", "answers are lost", "refuses", "calls all failed"]))
    def ray_has_trouble(self, trouble):
        self.ray.trouble = trouble

    @rule(is_down=st.booleans())
    def mlflow_is_down(self, is_down):
        self.mlflow.is_down = is_down

    @rule(forgets=st.booleans())
    def the_head_is_lost(self, forgets):
        """All drivers die; Ray forgets them, or calls them running for ever."""
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
        return [name for name, found in submissions if found.status == RayStatus.PENDING and name in self.ray.drivers]

    def start_driver(self, name):
        driver = self.ray.drivers[name]
        self.ray.set(name, RayStatus.RUNNING)
        driver.folder.mkdir(parents=True, exist_ok=True)
        if any(other.is_alive and other.job_id == driver.job_id for other in self.ray.drivers.values()):
            self.ray.set(name, RayStatus.PENDING)  # it waits for the one before
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
        if end == "succeeds unseen":  # and Ray, whose head was lost before it knew, calls it running for ever
            driver.is_alive = False
        else:
            self.ray.set(name, RayStatus.SUCCEEDED if end == "succeeds" else RayStatus.FAILED)

    @rule(seconds=st.sampled_from([1.0, 6.0, 61.0]))
    def time_passes(self, seconds):
        """Living drivers show that they live, and end once their attempt has been closed."""
        self.clock += seconds
        for name, driver in list(self.ray.drivers.items()):
            if driver.is_alive and (driver.folder / CLOSED_FILE).exists():
                self.ray.set(name, RayStatus.FAILED, "interrupted")
            elif driver.is_alive:
                file = driver.folder / DRIVER_FILE
                file.write_text("")
                # The clock of whoever lives, which goes on with every look at it.
                time = file.stat().st_mtime + self.clock
                os.utime(file, (time, time))

    # What must hold.

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
    def an_end_is_for_ever(self):
        if hasattr(self, "jobs") and self.jobs:
            for pulse_id, pulse in self.runner.run(self.houses[0].jobs.snapshots(list(self.jobs))).items():
                before = self.ended.get(pulse_id)
                assert before is None or before == pulse.state
                if pulse.state.is_terminal:
                    self.ended[pulse_id] = pulse.state

    def heal(self):
        """Without further trouble every job that can run comes to its end, and MLflow learns of it."""
        self.ray.trouble, self.mlflow.is_down = None, False
        for house in self.houses * 2:
            self.runner.run(house.replica.renew())
        store = self.houses[0].jobs
        for _ in range(200):
            self.time_passes(6.0)
            for name in self.pending():
                self.start_driver(name)
            self.each_attempt_runs_once_and_no_job_twice_at_a_time()
            self.no_more_runs_than_there_is_room_for()
            self.an_end_is_for_ever()
            for house in self.houses:
                self.runner.run(house.dispatcher.round(60))
            for name, driver in sorted(self.ray.drivers.items()):
                if driver.is_alive:
                    self.end_driver(name, "succeeds")
            if not self.runner.run(store.open_jobs(range(8))) and not self._waiting(store):
                break
        else:
            raise AssertionError(f"still waiting: {self._waiting(store)}")
        for job in [self.runner.run(store.get(job_id)) for job_id in self.jobs]:
            assert job.state.is_terminal or job.spec.min_workers > CPUS, job
            assert job.attempt <= 1 + 3 * job.retries.infrastructure

    def _waiting(self, store):
        waiting = self.runner.run(store.queue()).waiting
        return [job for job in waiting.values() if job.least.cpus <= CPUS]


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
def test_nothing_is_lost_and_nothing_runs_twice(template):
    """100 walks of up to 100 steps, besides the healing after each of them."""
    Machine.template = template
    rules = settings(
        max_examples=100,
        stateful_step_count=100,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=rules)
