from sqlalchemy import select

from service.domain.access import hash_secret
from service.domain.lifecycle import RayStatus
from service.domain.retries import Retries
from service.engine.submitter import MAX_REFUSALS
from service.store.tables import credentials


async def test_a_success_resets_the_count_of_rejections(replica):
    job = await replica.add()
    for _ in range(2):
        replica.ray.refuses = True
        for _ in range(MAX_REFUSALS - 1):
            await replica.tick()
        assert await replica.state(job) == "submitted"
        replica.ray.refuses = False
        await replica.tick()
        assert replica.ray.submissions
        replica.ray.lose_everything()
    assert (await replica.jobs.get(job.id)).attempt == 1


async def stored_credentials(replica):
    async with replica.database.read() as connection:
        return (await connection.execute(select(credentials.c.hash, credentials.c.attempt))).all()


async def test_repeated_submission_of_an_attempt_keeps_its_credential(replica):
    job = await replica.add()
    replica.ray.refuses = True
    for _ in range(MAX_REFUSALS - 1):
        await replica.tick()
    replica.ray.refuses = False
    await replica.tick()
    (task,) = replica.ray.tasks[f"{job.id}-a1"]
    assert await stored_credentials(replica) == [(hash_secret(task.context.mlflow_token), 1)]


async def test_the_credentials_of_earlier_attempts_are_deleted(replica):
    job = await replica.add(retries=Retries(infrastructure=2))
    await replica.tick()
    replica.ray.set(f"{job.id}-a1", RayStatus.FAILED)
    for _ in range(3):
        await replica.tick()
    (task,) = replica.ray.tasks[f"{job.id}-a2"]
    assert await stored_credentials(replica) == [(hash_secret(task.context.mlflow_token), 2)]
