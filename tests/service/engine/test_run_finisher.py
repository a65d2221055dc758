from service.domain.errors import UpstreamUnavailable
from service.domain.lifecycle import RayStatus
from tests.service.engine.outcomes import SUCCEEDED
from tests.service.examples import make_comparison, make_job
from trainer.jobspec import OUTCOME_FILE, Outcome


async def test_a_comparison_has_one_parent_run_that_ends_after_its_jobs(replica):
    comparison = make_comparison()
    jobs = [make_job(comparison_id=comparison.id) for _ in range(2)]
    await replica.comparisons.add(comparison, jobs)
    await replica.tick()
    parent = f"run-of-{comparison.id}"
    assert replica.mlflow.runs == {parent: "running"} | {f"run-of-{job.id}": "running" for job in jobs}
    for job, status in zip(jobs, (RayStatus.SUCCEEDED, RayStatus.FAILED), strict=True):
        replica.ray.set(job.submission_id, status)
    replica.write(jobs[0], OUTCOME_FILE, SUCCEEDED)
    replica.write(
        jobs[1], OUTCOME_FILE, Outcome(state="failed", reason="worker 0: ValueError: no", cause="user_code")
    )
    await replica.tick()
    await replica.tick()
    assert replica.mlflow.runs[parent] == "failed"
    assert "report.json" in replica.mlflow.publications[parent].files
    assert await replica.comparisons.open_comparisons() == []


async def test_a_report_that_cannot_be_published_delays_neither_jobs_nor_other_comparisons(replica):
    """The parent run stays open until its report is published."""
    first, second = make_comparison(), make_comparison()
    jobs = [make_job(comparison_id=comparison.id) for comparison in (first, second)]
    for comparison, job in zip((first, second), jobs, strict=True):
        await replica.comparisons.add(comparison, [job])
    await replica.tick()
    publish, failing = replica.mlflow.publish, f"run-of-{first.id}"

    async def fail(run_id, publication):
        if run_id == failing:
            raise UpstreamUnavailable("no space left")
        await publish(run_id, publication)

    replica.mlflow.publish = fail
    for job in jobs:
        replica.ray.set(job.submission_id, RayStatus.SUCCEEDED)
        replica.write(job, OUTCOME_FILE, SUCCEEDED)
    later = await replica.add()
    for _ in range(3):
        await replica.tick()
    assert replica.mlflow.runs[failing] == "running"
    assert replica.mlflow.runs[f"run-of-{second.id}"] == "succeeded"
    assert await replica.state(later) == "submitted"
    assert [comparison.id for comparison in await replica.comparisons.open_comparisons()] == [first.id]
