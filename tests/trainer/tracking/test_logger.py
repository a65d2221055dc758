from trainer.jobspec import PROGRESS_FILE, AttemptContext, AttemptTask, JobSpec, Progress
from trainer.tracking.logger import NullLogger, open_logger


def test_only_the_first_rank_writes(tmp_path, capsys):
    folder = tmp_path / "attempt-1"
    folder.mkdir()
    spec = JobSpec(steps=4, global_batch_size=8)
    task = AttemptTask(
        spec=spec, context=AttemptContext(job_id="job-1", attempt=1, name="x", folder=str(tmp_path))
    )
    with open_logger(task, 1) as metrics_logger:
        assert isinstance(metrics_logger, NullLogger)
        metrics_logger.log(0, {"accuracy": 0.1})
        metrics_logger.update(4)
    assert list(folder.iterdir()) == []
    with open_logger(task, 0) as metrics_logger:
        metrics_logger.log(0, {"accuracy": 0.1})
        metrics_logger.update(0)
        metrics_logger.update(4)
    assert "step 0/4  accuracy 0.1000" in capsys.readouterr().out
    progress = Progress.model_validate_json((folder / PROGRESS_FILE).read_text())
    assert (progress.step, progress.total_steps, progress.eta_seconds) == (4, 4, 0)
    assert progress.samples_per_second > 0
