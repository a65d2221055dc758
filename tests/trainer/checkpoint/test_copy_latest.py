"""Copies of checkpoints for a job that resumes another one."""

import pytest

from tests.trainer.factories import make_spec, run_here
from trainer.checkpoint.copy_latest import MANIFEST, copy_latest_checkpoint
from trainer.jobspec import AttemptContext, AttemptTask


def task(folder, *ancestors, **changes):
    context = AttemptContext(
        job_id=folder.name, attempt=1, name="test", folder=str(folder), resumed_from=ancestors
    )
    return AttemptTask(spec=make_spec(**changes), context=context)


@pytest.fixture
def old(tmp_path):
    """A job after 20 steps."""
    run_here(make_spec(steps=20, eval_every=10), tmp_path / "job-1" / "checkpoints")
    return tmp_path / "job-1"


def test_the_newest_checkpoint_is_copied_and_resumed_from(old, tmp_path):
    whole, _ = run_here(make_spec(steps=40, eval_every=10))
    folder = tmp_path / "job-2"
    name = copy_latest_checkpoint(task(folder, "job-1", steps=40, eval_every=10))
    assert name.startswith("step-000000000020-")
    (old / "checkpoints" / name / MANIFEST).unlink()  # a copy does not need it
    result, notes = run_here(make_spec(steps=40, eval_every=10), folder / "checkpoints")
    assert notes.resumed_from == 20
    for key, value in whole.model.state_dict().items():
        assert result.model.state_dict()[key].numpy().tobytes() == value.numpy().tobytes()


def test_a_job_with_own_checkpoints_copies_none(old):
    assert copy_latest_checkpoint(task(old, "job-0")) is None


def test_ancestors_without_a_complete_checkpoint_are_skipped(old, tmp_path, capsys):
    unfinished = tmp_path / "job-5" / "checkpoints" / "step-000000000099-00000000"
    unfinished.mkdir(parents=True)
    assert copy_latest_checkpoint(task(tmp_path / "job-6", "job-5", "job-4", "job-1")).startswith(
        "step-000000000020-"
    )
    assert copy_latest_checkpoint(task(tmp_path / "job-7", "job-5", "job-4")) is None
    assert "no checkpoint in job-5, job-4; starting from step 0" in capsys.readouterr().out


def test_an_interrupted_copy_is_repeated(old, tmp_path):
    new = task(tmp_path / "job-2", "job-1")
    name = copy_latest_checkpoint(new)
    (tmp_path / "job-2" / "checkpoints" / name / MANIFEST).unlink()
    assert copy_latest_checkpoint(new) == name


def test_checkpoints_at_another_address_are_found(old, tmp_path):
    address = tmp_path / "elsewhere"
    run_here(make_spec(steps=20, eval_every=10), address / "job-1")
    new = task(tmp_path / "job-2", "job-1", checkpoint={"address": str(address)})
    name = copy_latest_checkpoint(new)
    assert (address / "job-2" / name / MANIFEST).exists()


def test_the_best_checkpoint_is_copied(tmp_path):
    checkpoint = {"every": 10, "keep_last": 1, "keep_best": "test_loss", "best_mode": "max"}
    run_here(make_spec(steps=30, eval_every=10, checkpoint=checkpoint), tmp_path / "job-1" / "checkpoints")
    names = sorted(path.parent.name for path in (tmp_path / "job-1").glob("checkpoints/*/manifest.json"))
    assert [name[:17] for name in names] == ["step-000000000010", "step-000000000030"]
    new = task(tmp_path / "job-2", "job-1", checkpoint=checkpoint)
    assert copy_latest_checkpoint(new) == names[-1]
    assert (
        sorted(path.parent.name for path in (tmp_path / "job-2").glob("checkpoints/*/manifest.json")) == names
    )
    (tmp_path / "job-2" / "checkpoints" / names[-1] / MANIFEST).unlink()  # an interrupted copy
    assert copy_latest_checkpoint(new) == names[-1]
    assert copy_latest_checkpoint(new) is None
