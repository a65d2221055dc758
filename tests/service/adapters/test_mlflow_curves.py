from service.adapters.mlflow_curves import read_curves, read_metrics
from tests.fakes import FakeMlflow
from tests.service.examples import make_job, summary_of


async def test_curves_are_read_by_job_and_by_metric():
    mlflow = FakeMlflow(curves={("run", "accuracy"): [(0, 0.1)], ("run", "test_loss"): [(0, 2.3)]})
    jobs = [summary_of(make_job(mlflow_run_id="run")), summary_of(make_job())]
    assert await read_curves(jobs, "accuracy", mlflow) == {jobs[0].id: [(0, 0.1)], jobs[1].id: []}
    found = await read_metrics("run", ["test_loss", "unknown"], mlflow)
    assert found == {"test_loss": [(0, 2.3)], "unknown": []}
