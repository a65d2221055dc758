"""Logs and events by server-sent events, over a real socket."""

import asyncio
import json
import socket

import httpx
import pytest
from sqlalchemy import text

from service.api.app import make_app
from service.api.server import Server
from service.domain.jobs import JobState, Transition
from service.settings import Settings
from tests.service.api.conftest import TOKEN
from tests.service.api.routes.test_jobs import SPEC
from trainer.jobspec import LOG_FILE, Progress, worker_log_file

HEADERS = {"Authorization": f"Bearer {TOKEN}"}


class Running:
    """Service on a port that can be stopped and restarted."""

    def __init__(self, folder, ray, mlflow):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.settings = Settings(
            token=TOKEN,
            port=port,
            database_url=f"sqlite+aiosqlite:///{folder}/test.db",
            storage=folder / "storage",
            poll_seconds=0.02,
            streams_per_token=5,
        )
        self.parts, self.url = (ray, mlflow), f"http://127.0.0.1:{port}"

    async def start(self):
        self.app = make_app(self.settings, *self.parts)
        self.server = Server(self.app, self.settings)
        self.task = asyncio.create_task(self.server._serve())
        async with asyncio.timeout(30):
            while not self.server.started:
                await asyncio.sleep(0.01)

    async def stop(self):
        self.server.should_exit = True
        async with asyncio.timeout(5):
            await self.task

    def client(self):
        return httpx.AsyncClient(base_url=self.url, headers=HEADERS, timeout=10)

    async def job(self, **changes):
        async with self.client() as client:
            answer = await client.post("/v1/jobs", json={"name": "mine", "spec": SPEC} | changes)
        return await self.app.state.components.jobs.get(answer.json()["id"])

    async def advance(self, job, state, **changes):
        store = self.app.state.components.jobs
        while (
            moved := await store.advance(
                job, Transition(state=JobState(state), reason="test", **changes), "test"
            )
        ) is None:
            job = await store.get(job.id)
        return moved

    def write(self, job, text, name=LOG_FILE):
        folder = self.app.state.components.files.attempt_folder(job)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("a") as file:
            file.write(text)


@pytest.fixture
async def running(tmp_path, ray, mlflow):
    ray.is_down = True  # jobs change state only by `advance`
    running = Running(tmp_path, ray, mlflow)
    await running.start()
    yield running
    await running.stop()


async def events(response):
    """Parse events as they arrive: kind, data and id."""
    fields = {}
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield fields.get("event"), json.loads(fields["data"]), fields.get("id")
            fields = {}


async def follow(running, path, *, most=None, last=None):
    """Read a stream to its end, or a number of its events."""
    found = []
    headers = {"Last-Event-ID": last} if last else {}
    async with (
        asyncio.timeout(20),
        running.client() as client,
        client.stream("GET", path, params={"follow": "true"}, headers=headers) as response,
    ):
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        async for event in events(response):
            found.append(event)
            if len(found) == most:
                break
    return found


async def test_a_log_is_followed_over_attempts_to_its_end(running):
    job = await running.job()
    reading = asyncio.create_task(follow(running, f"/v1/jobs/{job.id}/logs"))
    job = await running.advance(job, "submitted")
    running.write(job, "one\ntwo, hal")
    await asyncio.sleep(0.2)
    running.write(job, "f\nlast words")
    job = await running.advance(job, "queued")
    job = await running.advance(job, "submitted")
    running.write(job, "again\n")
    await running.advance(job, "failed")
    assert [(kind, data.get("text"), event_id) for kind, data, event_id in await reading] == [
        ("line", "one", "1:4"),
        ("line", "two, half", "1:14"),
        ("line", "last words", "1:24"),
        ("line", "again", "2:6"),
        ("end", None, "2:6"),
    ]


async def test_a_log_is_complete_across_disconnects_and_a_restart(running):
    job = await running.advance(await running.job(), "submitted")
    texts = [f"line {number}" for number in range(300)]
    running.write(job, "".join(f"{text}\n" for text in texts[:100]))
    seen = await follow(running, f"/v1/jobs/{job.id}/logs", most=7)
    seen += await follow(running, f"/v1/jobs/{job.id}/logs", most=50, last=seen[-1][2])
    reading = asyncio.create_task(follow(running, f"/v1/jobs/{job.id}/logs", last=seen[-1][2]))
    await asyncio.sleep(0.2)
    await running.stop()  # the stream ends by itself, without an end event
    seen += await reading
    assert seen[-1][0] == "line"
    running.write(job, "".join(f"{text}\n" for text in texts[100:]))
    await running.start()
    await running.advance(job, "succeeded")
    seen += await follow(running, f"/v1/jobs/{job.id}/logs", last=seen[-1][2])
    assert [data["text"] for kind, data, _ in seen if kind == "line"] == texts
    assert seen[-1][:2] == ("end", {"state": "succeeded"})


async def test_a_timeline_is_followed_with_progress(running):
    job = await running.job()
    reading = asyncio.create_task(follow(running, f"/v1/jobs/{job.id}/events"))
    job = await running.advance(job, "submitted")
    job = await running.advance(job, "running")
    await asyncio.sleep(0.2)
    progress = Progress(step=3, total_steps=10, samples_per_second=9, eta_seconds=1)
    job = await running.app.state.components.jobs.update_fields(job, progress=progress)
    await asyncio.sleep(0.2)
    await running.advance(job, "succeeded")
    seen = await reading
    assert [data["state"] for kind, data, _ in seen if kind == "transition"] == [
        "queued", "submitted", "running", "succeeded",
    ]  # fmt: skip
    assert ("progress", progress.model_dump(), None) in seen
    assert seen[-1][:2] == ("end", {"state": "succeeded"})
    second = next(event_id for kind, data, event_id in seen if data.get("state") == "submitted")
    again = await follow(running, f"/v1/jobs/{job.id}/events", last=second)
    assert [data["state"] for kind, data, _ in again if kind == "transition"] == ["running", "succeeded"]


async def test_an_offset_beyond_the_end_of_a_log_is_its_end(running):
    job = await running.advance(await running.job(), "submitted")
    running.write(job, "one\ntwo\n")
    await running.advance(job, "failed")
    seen = await follow(running, f"/v1/jobs/{job.id}/logs", last="1:999999999999999")
    assert seen == [("end", {"state": "failed"}, "1:8")]


async def test_an_invalid_offset_is_rejected(running):
    job = await running.job()
    async with running.client() as client:
        for path, last in [("logs", "x"), ("logs", "7:0"), ("events", "-1")]:
            answer = await client.get(
                f"/v1/jobs/{job.id}/{path}", params={"follow": "true"}, headers={"Last-Event-ID": last}
            )
            assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "Last-Event-ID")


async def test_lines_are_filtered_in_plain_text(running):
    job = await running.advance(await running.job(), "submitted")
    running.write(job, "driver\n")
    running.write(job, "worker 0 of 2 on a, process 8\n", worker_log_file(0))
    running.write(job, "worker 1 of 2 on a, process 7\nERROR: no\n", worker_log_file(1))
    async with running.client() as client:

        async def text(**query):
            return (await client.get(f"/v1/jobs/{job.id}/logs", params=query)).text

        assert (
            await text()
            == "driver\n[0] worker 0 of 2 on a, process 8\n[1] worker 1 of 2 on a, process 7\n[1] ERROR: no\n"
        )
        assert await text(rank=1, level="warning") == "[1] ERROR: no\n"
        refused = await client.get(f"/v1/jobs/{job.id}/logs", params={"level": "loud"})
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "level")


@pytest.fixture
async def ann(running):
    """A second token, with an expiry, and its headers."""
    async with running.client() as client:
        body = {"owner": "ann", "scopes": ["submit"], "expires_in_seconds": 3}
        return (await client.post("/v1/tokens", json=body)).json()


async def opened(client, path, token=TOKEN):
    """Open a stream without reading it to its end."""
    request = client.build_request(
        "GET", path, params={"follow": "true"}, headers={"Authorization": f"Bearer {token}"}
    )
    return await client.send(request, stream=True)


async def to_its_end(response):
    return [event async for event in events(response)]


@pytest.mark.parametrize("what", ["logs", "events"])
@pytest.mark.parametrize("end", ["revoked", "expired"])
async def test_a_stream_ends_with_its_token(running, ann, what, end):
    job = await running.advance(await running.job(), "submitted")
    async with running.app.state.components.database.write() as connection:
        await connection.execute(text("UPDATE jobs SET owner = 'ann'"))
    running.write(job, "one\n")
    async with running.client() as client:
        response = await opened(client, f"/v1/jobs/{job.id}/{what}", ann["token"])
        assert response.status_code == 200
        reading = asyncio.create_task(to_its_end(response))
        await asyncio.sleep(0.2)
        assert not reading.done()
        if end == "revoked":
            assert (await client.post(f"/v1/tokens/{ann['id']}:revoke")).status_code == 200
        async with asyncio.timeout(1 if end == "revoked" else 4):
            seen = await reading
    assert seen
    assert "end" not in {kind for kind, _, _ in seen}


async def test_the_number_of_streams_per_token_is_limited(running):
    job = await running.advance(await running.job(), "submitted")
    timeline, log = f"/v1/jobs/{job.id}/events", f"/v1/jobs/{job.id}/logs"
    async with running.client() as client:
        streams = [await opened(client, timeline) for _ in range(running.settings.streams_per_token)]
        assert {stream.status_code for stream in streams} == {200}
        refused = await opened(client, log)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
        assert b"as many logs and timelines as it may" in await refused.aread()
        await streams.pop().aclose()  # detected at the next message, here the end event
        await running.advance(job, "succeeded")
        for stream in streams:
            assert (await to_its_end(stream))[-1][0] == "end"
        async with asyncio.timeout(5):
            while (again := await opened(client, log)).status_code == 429:
                await again.aread()
                await asyncio.sleep(0.05)
        assert (await to_its_end(again))[-1][0] == "end"
        async with asyncio.timeout(5):
            while running.app.state.components.feed._streams:
                await asyncio.sleep(0.01)
