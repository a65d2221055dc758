from service.engine.attempts import MOST_REFUSALS


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
