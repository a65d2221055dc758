from sqlalchemy import select

from service.domain.access import hash_secret
from service.domain.lifecycle import RayStatus
from service.domain.retries import Retries
from service.engine.submitter import MOST_REFUSALS
from service.store.tables import credentials


async def test_refusals_before_a_success_count_no_more(house):
    job = await house.add()
    for _ in range(2):
        house.ray.refuses = True
        for _ in range(MOST_REFUSALS - 1):
            await house.round()
        assert await house.state(job) == "submitted"
        house.ray.refuses = False
        await house.round()
        assert house.ray.submissions
        house.ray.lose_everything()
    assert (await house.jobs.get(job.id)).attempt == 1


async def stored_credentials(house):
    async with house.database.read() as connection:
        return (await connection.execute(select(credentials.c.hash, credentials.c.attempt))).all()


async def test_an_attempt_has_one_credential_however_often_it_is_handed_over(house):
    job = await house.add()
    house.ray.refuses = True
    for _ in range(MOST_REFUSALS - 1):
        await house.round()
    house.ray.refuses = False
    await house.round()
    (task,) = house.ray.tasks[f"{job.id}-a1"]
    assert await stored_credentials(house) == [(hash_secret(task.context.mlflow_token), 1)]


async def test_the_credentials_of_earlier_attempts_are_deleted(house):
    job = await house.add(retries=Retries(infrastructure=2))
    await house.round()
    house.ray.set(f"{job.id}-a1", RayStatus.FAILED)
    for _ in range(3):
        await house.round()
    (task,) = house.ray.tasks[f"{job.id}-a2"]
    assert await stored_credentials(house) == [(hash_secret(task.context.mlflow_token), 2)]
