"""Tests on a real Ray and on its fake."""

import asyncio
import time
from pathlib import Path

import psutil
import pytest

from service.adapters.ray import RayJobsOverHttp
from service.adapters.run_storage import RunFiles
from service.domain.errors import UpstreamUnavailable
from service.domain.jobs import new_id
from service.domain.lifecycle import RayStatus
from service.domain.resources import Cluster, Node, Resources
from tests.fakes import FakeRay
from trainer.jobspec import (
    LOG_FILE,
    OUTCOME_FILE,
    AttemptContext,
    AttemptTask,
    DigitsSpec,
    JobSpec,
    MlpSpec,
    Outcome,
    attempt_folder,
    worker_log_file,
)


class Real:
    """A real cluster: submissions change state by themselves."""

    def __init__(self, stack):
        token = (stack.data_dir / "ray-token").read_text()
        self.ray = RayJobsOverHttp(stack.connection.ray_address, token, 20)

    async def reach(self, submission_id, status, seconds=120):
        deadline = time.monotonic() + seconds
        while (found := await self.ray.find(submission_id)) is None or found.status != status:
            assert time.monotonic() < deadline, f"{submission_id} is {found} and not {status}"
            assert found is None or not found.status.is_terminal, f"{submission_id} ended as {found}"
            await asyncio.sleep(0.2)


class Fake:
    """The fake: submissions change state by `set`."""

    def __init__(self):
        self.ray = FakeRay()

    async def reach(self, submission_id, status, seconds=0):
        if self.ray.submissions[submission_id].status != status:
            self.ray.set(submission_id, status)


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.ray)])
async def cluster(request):
    if request.param == "fake":
        yield Fake()
    else:
        real = Real(request.getfixturevalue("stack"))
        yield real
        await real.ray.close()


def make_task(folder: Path, **changes) -> Path:
    spec = JobSpec(**({"data": DigitsSpec(), "model": MlpSpec(hidden=[8]), "steps": 20} | changes))
    # The name makes the task longer than an environment variable can be.
    context = AttemptContext(job_id=folder.name, attempt=1, name="test" * 50_000, folder=str(folder))
    return RunFiles(folder.parent).write_task(AttemptTask(spec=spec, context=context))


async def test_a_submission_runs_once_to_its_end(cluster, tmp_path):
    name = new_id("job") + "-a1"
    assert await cluster.ray.find(name) is None
    task = make_task(tmp_path)
    await cluster.ray.submit(name, task)
    await cluster.ray.submit(name, task)
    await cluster.reach(name, RayStatus.SUCCEEDED)
    await cluster.ray.submit(name, task)
    assert (await cluster.ray.find(name)).status == RayStatus.SUCCEEDED
    assert isinstance(await cluster.ray.logs(name), str)
    if isinstance(cluster, Real):
        folder = attempt_folder(tmp_path, 1)
        assert Outcome.model_validate_json((folder / OUTCOME_FILE).read_text()).state == "succeeded"
        assert (folder / worker_log_file(0)).read_text().count("step 20/20") == 1
        assert str(folder / LOG_FILE) in await cluster.ray.logs(name)


async def test_a_running_submission_can_be_stopped(cluster, tmp_path):
    name = new_id("job") + "-a1"
    await cluster.ray.submit(name, make_task(tmp_path, steps=10_000_000, num_workers=2))
    await cluster.reach(name, RayStatus.RUNNING)
    async with asyncio.timeout(60):  # Ray assigns resources to workers long before their first step
        while name not in (await cluster.ray.cluster()).placed:
            await asyncio.sleep(0.2)
    await cluster.ray.stop(name)
    await cluster.reach(name, RayStatus.STOPPED)
    await cluster.ray.stop(name)
    assert not (attempt_folder(tmp_path, 1) / OUTCOME_FILE).exists()


async def test_an_unknown_submission_is_no_error(cluster):
    assert await cluster.ray.find("job-0-a1") is None
    await cluster.ray.stop("job-0-a1")
    assert await cluster.ray.logs("job-0-a1") == ""


async def test_the_cluster_reports_its_size(cluster):
    size = 4 if isinstance(cluster, Real) else 2
    async with asyncio.timeout(30):  # until earlier work is gone from Ray's monitor
        while (found := await cluster.ray.cluster()).free.cpus < size:
            await asyncio.sleep(0.2)
    all_of_it, memory = Resources(size, 0), found.largest_node_bytes
    node = Node(found.nodes[0].address, all_of_it, all_of_it, memory or 0)
    assert found == Cluster(all_of_it, all_of_it, largest_node_bytes=memory, nodes=(node,))
    if isinstance(cluster, Real):
        assert 1e9 < found.largest_node_bytes < psutil.virtual_memory().total


@pytest.mark.ray
async def test_a_wrong_token_is_rejected(stack):
    ray = RayJobsOverHttp(stack.connection.ray_address, "wrong", 10)
    with pytest.raises(UpstreamUnavailable, match=r"40[13]"):
        await ray.find("job-0-a1")
    await ray.close()


async def test_a_cluster_that_does_not_answer_is_unavailable_in_time():
    async def hang(reader, writer):
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    ray = RayJobsOverHttp(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None, 0.3)
    began = time.monotonic()
    with pytest.raises(UpstreamUnavailable, match="did not answer"):
        await ray.cluster()
    assert time.monotonic() - began < 2
    await ray.close()
    server.close()
