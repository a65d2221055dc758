from service.engine.job_advice import read_advice
from tests.fakes import FakeMlflow
from tests.service.examples import make_job
from trainer.jobspec import JobSpec

SPEC = JobSpec(steps=10, num_workers=2, global_batch_size=64)


async def test_only_the_metrics_that_advice_needs_are_read():
    class Strict(FakeMlflow):
        async def curve(self, run_id, metric):
            assert metric != "accuracy"
            return await super().curve(run_id, metric)

    mlflow = Strict(
        curves={("run", "accuracy"): [(0, 0.1)], ("run", "probe/norm1/variance_share"): [(0, 0.3)]}
    )
    measured = await read_advice(make_job(spec=SPEC, mlflow_run_id="run"), mlflow)
    assert (measured.basis, measured.decision) == ("measured", "synchronise")
    mlflow.is_down = True  # a job without a run needs no answer
    assert (await read_advice(make_job(spec=SPEC), mlflow)).basis == "predicted"
