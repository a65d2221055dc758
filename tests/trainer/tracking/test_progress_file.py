from trainer.jobspec import PROGRESS_FILE, Progress
from trainer.tracking import progress_file
from trainer.tracking.progress_file import ProgressFile, read_step


def test_progress_has_speed_and_remaining_time_and_is_rate_limited(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress_file.time, "monotonic", lambda: now)
    file = ProgressFile(tmp_path, total_steps=100, batch_size=8)
    now = 0.1
    file.update(1)
    assert not (tmp_path / PROGRESS_FILE).exists()
    now = 2.0
    file.update(20)
    progress = Progress.model_validate_json((tmp_path / PROGRESS_FILE).read_text())
    assert progress == Progress(step=20, total_steps=100, samples_per_second=80.0, eta_seconds=8.0)
    now = 2.1
    file.update(100)  # the last step is always written
    assert read_step(tmp_path) == 100


def test_without_a_readable_file_the_step_is_0(tmp_path):
    assert read_step(tmp_path) == 0
    (tmp_path / PROGRESS_FILE).write_text("{")
    assert read_step(tmp_path) == 0
