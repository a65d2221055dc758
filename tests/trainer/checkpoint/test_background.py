import threading
import time

import pytest

from tests.dist import run_on_ranks
from tests.trainer.checkpoint.saving import SPEC
from tests.trainer.factories import InterruptedRunError, Interrupting, RecordingLogger, make_spec, run_here
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.errors import StorageError


class CheckpointCounter(RecordingLogger):
    """Metrics logger that counts the checkpoints in a folder at each step."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.counts = folder, {}

    def update(self, step):
        self.counts[step] = len(list(self.folder.glob("step-*/manifest.json")))


def save_late(spec, folder):
    """Delay the checkpoint of step 5 until step 8; return the checkpoint counts per step and at the end."""
    write, metrics_logger = Checkpoints._write_manifest, CheckpointCounter(folder)

    def write_late(self, manifest):
        deadline = time.monotonic() + 10
        while manifest.step == 5 and 8 not in metrics_logger.counts and time.monotonic() < deadline:
            time.sleep(0.001)
        write(self, manifest)

    Checkpoints._write_manifest = write_late
    try:
        run_here(spec, folder, metrics_logger=metrics_logger)
        return metrics_logger.counts, len(list(folder.glob("step-*/manifest.json")))
    finally:
        Checkpoints._write_manifest = write


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_do_not_wait_for_a_checkpoint_but_the_end_of_the_run_does(tmp_path, world_size):
    spec = make_spec(num_workers=world_size, steps=10, checkpoint={"every": 5})
    arguments = (spec, tmp_path)
    results = run_on_ranks(save_late, 2, *arguments) if world_size > 1 else [save_late(*arguments)]
    assert results[0][0][8] == 0
    assert [at_the_end for _, at_the_end in results] == [2] * world_size


@pytest.mark.parametrize(("every", "failing", "reported"), [(2, 4, 5), (8, 8, 8)])
def test_a_background_failure_ends_the_run_at_the_next_step_or_the_end(
    tmp_path, monkeypatch, every, failing, reported
):
    """The metrics logger waits for the failure, as a step is shorter than a write."""
    write, steps = Checkpoints._write, []
    failed = threading.Event()

    def fail(self, name, file, content):
        if f"step-{failing:012d}" in name and file == "shared.pt":
            failed.set()
            raise OSError(28, "No space left on device")
        return write(self, name, file, content)

    class Waiting(RecordingLogger):
        def update(self, step):
            steps.append(step)
            if step == failing + 1:
                assert failed.wait(10)
                time.sleep(0.2)  # until the error is stored

    monkeypatch.setattr(Checkpoints, "_write", fail)
    with pytest.raises(StorageError, match=rf"step {failing} in .*No space left"):
        run_here(make_spec(**SPEC | {"checkpoint": {"every": every}}), tmp_path, metrics_logger=Waiting())
    assert steps[-1] in (reported, reported + 1)


def test_a_failing_run_completes_its_checkpoint(tmp_path):
    with pytest.raises(InterruptedRunError):
        run_here(make_spec(**SPEC), tmp_path, metrics_logger=Interrupting(3))
    assert len(list(tmp_path.glob("step-000000000002-*/manifest.json"))) == 1
