"""Load limits of the service: submissions per second, pages among many jobs, log streams, and a long queue.

    python benchmarks/service_load.py                                   on SQLite; a quarter of an hour
    python benchmarks/service_load.py --database-url postgresql+asyncpg://user@host/empty
    python benchmarks/service_load.py --parts posts page

All parts are real: `syncbn serve` runs in its own process on this machine, with Ray, MLflow, the database
and the clients, which use the same cores. No job leaves the queue, since the quota of the owner is 0, except
in `head`, where jobs run one after the other. Each figure is printed with its goal, and with the result of
Ray's own jobs API where it has the same function, in numbers that a head on this machine can handle. The
database of --database-url must be empty; everything created in it is dropped again.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from loaded_service import SPEC, Load, p99, state_of, submit, submit_bare, summary, until_ended
from sqlalchemy import func, select, text

from service.domain.jobs import Job, JobState, new_id
from service.local.stack import LocalStack
from service.store.database import Database
from service.store.job_inserts import insert_jobs
from trainer.jobspec import LOG_FILE, JobSpec

SHORT = SPEC | {"steps": 5, "num_workers": 1, "log_model": False}
POSTS_PER_SECOND, POST_SECONDS, POST_ROUNDS = 100, 30, 5
MANY_JOBS, PAGE_SIZE, PAGES = 100_000, 50, 200
STREAMS, LINES = 500, 30
QUEUED = 1_000
BARE_JOBS = 20
"""Number of jobs submitted to Ray directly: each costs its head a process."""


async def posts(load: Load) -> None:
    """Submit at a steady rate in several rounds, each with an empty queue and after rejected requests."""
    rounds = []
    for number in range(POST_ROUNDS):
        await load.empty()
        async with load.serving() as session:

            async def submit_keyed(number: int) -> None:
                body = {"name": f"job {number}", "spec": SPEC, "tags": ["load"]}
                async with session.post(
                    "/v1/jobs", json=body, headers={"Idempotency-Key": f"load-{number}"}
                ) as answer:
                    if not answer.ok:
                        raise RuntimeError(f"{answer.status}: {await answer.text()}")

            async def ask_for_nothing(_: int) -> None:
                async with session.get("/livez") as answer:
                    answer.raise_for_status()

            await submit_keyed(-1)
            nothing, submissions = (
                await steadily(ask_for_nothing, 10),
                await steadily(submit_keyed, POST_SECONDS),
            )
        rounds.append(p99(submissions))
        print(
            f"posts: round {number + 1}, {POSTS_PER_SECOND} a second: keyed POSTs for {POST_SECONDS} s "
            f"{summary(submissions)}; "
            f"GETs of /livez before {summary(nothing)}"
        )
    print(
        f"posts: p99 of {POST_ROUNDS} rounds: median {statistics.median(rounds) * 1e3:.1f} ms "
        f"({min(rounds) * 1e3:.1f} to {max(rounds) * 1e3:.1f}); goal 50 ms"
    )
    bare = []
    async with load.ray_session() as ray:
        for _ in range(BARE_JOBS):
            began = time.perf_counter()
            await submit_bare(ray, "true")
            bare.append(time.perf_counter() - began)
    print(f"posts: {BARE_JOBS} POSTs to Ray, one after the other: {summary(bare)}")


async def steadily(call: Callable[[int], Coroutine[Any, Any, None]], seconds: float) -> list[float]:
    """Call at a steady rate regardless of responses; return the seconds from each due time to its
    response.
    """
    took = []

    async def timed(number: int, due: float) -> None:
        await call(number)
        took.append(time.perf_counter() - due)

    start = time.perf_counter() + 0.1
    async with asyncio.TaskGroup() as group:
        for number in range(int(POSTS_PER_SECOND * seconds)):
            due = start + number / POSTS_PER_SECOND
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(timed(number, due))
    return took


async def page(load: Load) -> None:
    """Read pages among many jobs: the newest, old ones, and with each filter."""
    async with load.serving():
        pass  # creates the tables
    database = Database(load.environment["SYNCBN_DATABASE_URL"], 60)
    await fill(database)
    await database.close()
    queries: dict[str, dict[str, str]] = {
        "newest": {},
        "of a state": {"state": "failed"},
        "of an owner": {"owner": "owner-7"},
        "of a norm": {"norm": "sync"},
        "of a tag": {"tag": "tag-42"},
        "of a rare tag": {"tag": "rare"},
    }
    async with load.serving() as session:
        for name, query in queries.items():
            seconds, tokens = [], [""]
            for number in range(PAGES):
                began = time.perf_counter()
                position = (
                    {"page_token": tokens[number % len(tokens)]} if tokens[number % len(tokens)] else {}
                )
                async with session.get(
                    "/v1/jobs", params={"page_size": str(PAGE_SIZE)} | query | position
                ) as answer:
                    content = await answer.json()
                seconds.append(time.perf_counter() - began)
                if content["next_page_token"] and len(tokens) < PAGES // 2:
                    tokens.append(content["next_page_token"])
            print(
                f"page: {PAGE_SIZE} of {MANY_JOBS:,} jobs, {name}, {len(tokens)} pages deep: "
                f"{summary(seconds)}; goal 50 ms"
            )
    print("page: Ray's jobs API has neither pages nor filters")


async def fill(database: Database) -> None:
    """Store many jobs, most of which have ended."""
    now = datetime.now(UTC)
    specs = [JobSpec.model_validate(SPEC | {"norm": norm}) for norm in ("none", "batch", "sync")]
    states = [JobState.SUCCEEDED] * 8 + [JobState.FAILED, JobState.CANCELLED]
    for first in range(0, MANY_JOBS, 1_000):
        jobs = [
            Job(
                id=new_id("job"),
                name=f"job {number}",
                owner=f"owner-{number % 20}",
                spec=specs[number % 3],
                tags=(f"tag-{number % 100}", *(["rare"] if number % 10_000 == 0 else [])),
                state=states[number % 10],
                reason="filled in",
                mlflow_closed=True,
                created_at=now - timedelta(seconds=MANY_JOBS - number),
                queued_at=now,
                ended_at=now,
            )
            for number in range(first, first + 1_000)
        ]
        async with database.write() as connection:
            await insert_jobs(connection, jobs)


async def streams(load: Load) -> None:
    """Follow one log with many streams, and time each line from its write."""
    async with load.serving() as session:
        job_id = await submit(session, "followed")
        path = load.storage / job_id / "attempt-1" / LOG_FILE
        path.parent.mkdir(parents=True)
        path.touch()
        before = load.memory()

        async def follow() -> list[float]:
            seconds: list[float] = []
            async with session.get(f"/v1/jobs/{job_id}/logs", params={"follow": "true"}) as answer:
                async for line in answer.content:
                    if line.startswith(b"data:") and (found := json.loads(line[5:])).get("text"):
                        seconds.append(time.time() - float(found["text"].removeprefix("[0] ")))
                        if len(seconds) == LINES:
                            return seconds
            raise RuntimeError(f"a stream ended after {len(seconds)} lines")

        async with asyncio.TaskGroup() as group:
            followers = [group.create_task(follow()) for _ in range(STREAMS)]
            await asyncio.sleep(10)  # until all of them are connected
            assert load.process is not None
            load.process.cpu_percent()
            for _ in range(LINES):
                with path.open("a") as log:
                    log.write(f"[0] {time.time()}\n")
                await asyncio.sleep(1)
            share, memory = load.process.cpu_percent(), load.memory()
        late = [second for follower in followers for second in follower.result()]
        print(
            f"streams: {STREAMS} of one log, each got all of {LINES} lines: {summary(late)} after it was "
            "written; "
            f"the service took {share:.0f} % of a core and {memory - before:.0f} MB for them"
        )
    await bare_streams(load)


async def bare_streams(load: Load) -> None:
    """Follow one of Ray's own jobs in the same way, by its websockets."""
    program = f"import time\nfor _ in range({LINES + 40}): print(time.time(), flush=True); time.sleep(1)"
    async with load.ray_session() as session:
        job_id = await submit_bare(session, f'{sys.executable} -c "{program}"')
        while True:
            async with session.get(f"/api/jobs/{job_id}") as answer:
                if (await answer.json())["status"] == "RUNNING":
                    break
            await asyncio.sleep(0.5)
        ready = asyncio.Event()

        async def follow() -> list[float]:
            seconds: list[float] = []
            async with session.ws_connect(f"/api/jobs/{job_id}/logs/tail") as socket:
                async for message in socket:
                    for line in str(message.data).splitlines():
                        with suppress(ValueError):
                            if ready.is_set():
                                seconds.append(time.time() - float(line))
            return seconds

        async with asyncio.TaskGroup() as group:
            followers = [group.create_task(follow()) for _ in range(STREAMS)]
            await asyncio.sleep(10)
            ready.set()
        late = [second for follower in followers for second in follower.result()]
        fewest = min(len(follower.result()) for follower in followers)
    print(
        f"streams: {STREAMS} of one log from Ray, the fewest lines in a stream {fewest}: {summary(late)} "
        "after it was printed"
    )


async def head(load: Load) -> None:
    """Queue many jobs, of which one at a time runs, and compare the memory of Ray's head.

    Then submit some jobs to Ray directly.
    """
    load.environment["SYNCBN_QUOTA_JOBS"] = "1"
    async with load.serving() as session:
        for number in range(2):  # so that modules that Ray loads once do not count
            await until_ended(session, await submit(session, f"before {number}", SHORT))
        before = load.head_memory()
        queued = [await submit(session, f"queued {number}", SHORT) for number in range(QUEUED)]
        await asyncio.sleep(60)
        states = [await state_of(session, job_id) for job_id in queued]
        after = load.head_memory()
    ran = sum(state == "succeeded" for state in states)
    print(
        f"head: {QUEUED:,} queued jobs, {ran} of which ran in 60 s: {after - before:+.0f} MB of "
        f"{before:.0f}; goal: flat"
    )
    before = load.head_memory()
    async with load.ray_session() as ray:
        for _ in range(BARE_JOBS):
            await submit_bare(ray, f"{sys.executable} -c 'import time; time.sleep(60)'")
        await asyncio.sleep(30)
        after = load.head_memory()
    print(
        f"head: {BARE_JOBS} jobs that Ray was given directly: {after - before:+.0f} MB, and a process or "
        "two for each of them"
    )


PARTS: dict[str, Callable[[Load], Coroutine[Any, Any, None]]] = {
    "posts": posts,
    "page": page,
    "streams": streams,
    "head": head,
}


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--database-url", help="of an empty database; default: a new SQLite file")
    options = parser.parse_args()
    if options.database_url:
        asyncio.run(check_empty(options.database_url))
    for name in options.parts:
        with (
            tempfile.TemporaryDirectory(prefix="load-") as folder,
            LocalStack(Path(folder) / "data", api=False) as stack,
        ):
            load = Load(stack, options.database_url)
            try:
                asyncio.run(PARTS[name](load))
            finally:
                asyncio.run(load.empty())


async def check_empty(url: str) -> None:
    """Exit if the database is not empty."""
    database = Database(url, 60)
    async with database.read() as connection:
        count = (
            select(func.count())
            .select_from(text("information_schema.tables"))
            .where(text("table_schema = 'public'"))
        )
        if (await connection.execute(count)).scalar_one():
            raise SystemExit("--database-url: takes an empty database; this one has tables")
    await database.close()


if __name__ == "__main__":
    main()
