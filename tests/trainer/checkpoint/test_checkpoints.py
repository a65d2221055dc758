"""Checkpoints: corrupt and mismatched ones are named and skipped, and the previous one is loaded."""

import io
import json
import multiprocessing
import os
import signal
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from unittest import mock

import fsspec
import pytest
import torch.distributed as dist

from tests.dist import run_on_ranks
from tests.trainer.checkpoint.saving import SPEC
from tests.trainer.factories import RecordingLogger, here, make_spec, run_here
from trainer import failures
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.state import TrainProgress
from trainer.errors import StorageError
from trainer.jobspec import CheckpointSpec


def write_checkpoints(folder, **changes):
    run_here(make_spec(**SPEC | changes), folder)
    return sorted(path for path in folder.iterdir() if path.name.startswith("step-"))


def resume_run(folder, **changes):
    return run_here(make_spec(**SPEC | {"steps": 10} | changes), folder)[1]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("manifest.json", lambda path: path.unlink(), "incomplete: manifest.json is missing"),
        ("manifest.json", cut_short, "corrupt: manifest.json cannot be parsed"),
        ("manifest.json", lambda path: path.write_text("[1]"), "corrupt: manifest.json cannot be parsed"),
        ("shared.pt", cut_short, "corrupt: shared.pt must have"),
        ("shared.pt", flip_a_bit, "corrupt: shared.pt must have"),
        ("rank-00000.pt", lambda path: path.unlink(), "incomplete: rank-00000.pt is missing"),
        ("manifest.json", lambda path: path.write_text('{"format": 99}'), "format must be 3 (got 99)"),
    ],
)
def test_a_corrupt_checkpoint_is_named_and_the_previous_one_loaded(tmp_path, file, damage, message):
    *_, before, last = write_checkpoints(tmp_path)
    damage(last / file)
    notes = resume_run(tmp_path)
    assert notes.resumed_from == 6
    assert [refusal for refusal in notes.refused if last.name in refusal and message in refusal]
    assert before.name.startswith("step-000000000006")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "differs in seed"),
        ({"optimizer": {"lr": 0.1}}, "differs in optimizer"),
        ({"norm": "batch", "global_batch_size": 40}, "differs in global_batch_size, norm"),
    ],
)
def test_a_checkpoint_of_another_spec_is_named_and_skipped(tmp_path, changes, message):
    paths = write_checkpoints(tmp_path)
    notes = resume_run(tmp_path, **changes)
    assert notes.resumed_from is None
    assert all("another run's" in refusal and message in refusal for refusal in notes.refused)
    assert len(notes.refused) == 3
    assert all(path.exists() for path in paths)


def test_fields_outside_the_resume_key_may_change(tmp_path):
    write_checkpoints(tmp_path)
    assert (
        resume_run(tmp_path, eval_every=5, collective_timeout_seconds=20, probes={"every": 3}).resumed_from
        == 8
    )


def test_empty_and_unrelated_folders_have_no_checkpoint(tmp_path):
    (tmp_path / "step-of-somebody").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    notes = resume_run(tmp_path)
    assert (notes.resumed_from, notes.refused) == (None, [])
    assert (tmp_path / "notes.txt").exists()


def test_the_policy_keeps_the_last_and_the_best(tmp_path):
    changes = {"steps": 30, "checkpoint": {"every": 2, "keep_last": 2, "keep_best": "test_loss"}}
    write_checkpoints(tmp_path, **changes)
    manifests = [json.loads((path / "manifest.json").read_text()) for path in sorted(tmp_path.glob("step-*"))]
    steps = [manifest["step"] for manifest in manifests]
    assert steps[-2:] == [28, 30]
    assert len(steps) <= 3
    _, notes = run_here(make_spec(**SPEC | changes))
    losses = {step: values["test_loss"] for step, values in notes.metrics.items() if step > 0}
    assert min(losses, key=losses.get) in steps


def test_keep_best_uses_the_given_direction(tmp_path):
    checkpoint = {"every": 2, "keep_last": 1, "keep_best": "test_loss", "best_mode": "max"}
    write_checkpoints(tmp_path, steps=30, checkpoint=checkpoint)
    _, notes = run_here(make_spec(**SPEC | {"steps": 30}))
    losses = {step: values["test_loss"] for step, values in notes.metrics.items() if step > 0}
    steps = {json.loads(path.read_text())["step"] for path in tmp_path.glob("step-*/manifest.json")}
    assert steps == {max(losses, key=losses.get), 30}


def test_the_best_checkpoint_is_of_the_evaluated_step(tmp_path):
    checkpoint = {"every": 7, "keep_last": 1, "keep_best": "accuracy"}
    _, notes = run_here(make_spec(steps=60, eval_every=5, checkpoint=checkpoint), tmp_path)
    accuracies = {step: values["accuracy"] for step, values in notes.metrics.items() if step > 0}
    first_best = next(step for step, value in accuracies.items() if value == max(accuracies.values()))
    kept = {json.loads(path.read_text())["step"] for path in tmp_path.glob("step-*/manifest.json")}
    assert kept == {first_best, 60}


def test_a_resumed_run_with_fewer_steps_ends_at_its_checkpoint(tmp_path):
    write_checkpoints(tmp_path)
    result, notes = run_here(make_spec(**SPEC | {"steps": 5}), tmp_path)
    assert (result.step, result.end, notes.resumed_from) == (8, "finished", 8)


class FullDisk(io.BytesIO):
    """Disk that is full after some bytes."""

    def write(self, data):
        if self.tell() + len(data) > 2_000:
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_reported_as_such(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    monkeypatch.setattr(LocalFileSystem, "open", lambda *_, **__: FullDisk())
    with pytest.raises(
        StorageError, match=r"step 2 in .*could not be written: worker 0: OSError: .*No space left"
    ):
        run_here(make_spec(**SPEC), tmp_path)


def test_a_marker_shows_that_a_checkpoint_is_being_written(tmp_path, monkeypatch):
    write, marker, seen = Checkpoints._write, tmp_path / "saving", []

    def look(self, name, file, content):
        seen.append(marker.read_text() == name)
        return write(self, name, file, content)

    monkeypatch.setattr(Checkpoints, "_write", look)
    monkeypatch.setattr("tests.trainer.factories.Checkpoints", partial(Checkpoints, marker=marker))
    run_here(make_spec(**SPEC), tmp_path)
    assert seen == [True] * 8  # two files for each of four checkpoints
    assert not marker.exists()


def test_a_checkpoint_holds_no_code(tmp_path):
    """Write access to the storage must not allow code execution: files are read only as data."""
    *_, last = write_checkpoints(tmp_path)

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    import hashlib

    import torch

    torch.save({"model": Evil()}, last / "shared.pt")
    manifest = json.loads((last / "manifest.json").read_text())
    content = (last / "shared.pt").read_bytes()
    manifest["files"]["shared.pt"] = [len(content), hashlib.sha256(content).hexdigest()]
    (last / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="Weights only load failed"):
        resume_run(tmp_path)


def test_checkpoints_work_on_fsspec_storage(tmp_path):
    address = "memory://checkpoints/job-1"
    run_here(make_spec(**SPEC), address)
    assert resume_run(address).resumed_from == 8
    names = [
        path.rpartition("/")[2] for path in fsspec.filesystem("memory").ls("/checkpoints/job-1", detail=False)
    ]
    assert len(names) == 3


def save_without_end(folder):
    spec = make_spec(steps=1_000_000, eval_every=1_000_000, checkpoint={"every": 1})
    run_here(spec, folder)


def test_a_kill_at_any_time_leaves_a_usable_checkpoint(tmp_path):
    """A process that saves in every step is killed repeatedly and resumed by the next one."""
    context = multiprocessing.get_context("fork")
    reached = -1
    for number in range(6):
        process = context.Process(target=save_without_end, args=(tmp_path,), daemon=True)
        process.start()
        deadline = time.monotonic() + 30
        while newest(tmp_path) <= reached and time.monotonic() < deadline:
            time.sleep(0.003 * (number + 1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        notes = RecordingLogger()
        steps = newest(tmp_path)
        assert steps > reached
        run_here(
            make_spec(steps=steps, eval_every=1_000_000, checkpoint={"every": 1}),
            tmp_path,
            metrics_logger=notes,
        )
        assert notes.resumed_from == steps
        reached = steps


def newest(folder):
    """Return the step of the newest checkpoint with a manifest, or -1."""
    return max(
        (int(path.parent.name.split("-")[1]) for path in folder.glob("step-*/manifest.json")), default=-1
    )


def fail_in(spec, folder, method, error, message):
    """Train while a storage method of worker 1 fails; return the error of the run on this worker."""
    before = getattr(Checkpoints, method)

    def fail(*arguments):
        if dist.get_rank() == 1:
            raise error
        return before(*arguments)

    setattr(Checkpoints, method, fail)
    with pytest.raises(StorageError, match=message) as ended:
        run_here(spec, folder)
    setattr(Checkpoints, method, before)
    return str(ended.value)


@pytest.mark.dist
def test_a_read_error_of_one_worker_ends_the_run_on_all(tmp_path):
    spec = make_spec(num_workers=2, **SPEC)
    run_on_ranks(run_here, 2, spec, tmp_path)
    message = r"step-000000000008-.* could not be read: worker 1: OSError"
    first, second = run_on_ranks(
        fail_in, 2, spec, tmp_path, "_read", OSError(5, "Input/output error"), message
    )
    assert first == second


@pytest.mark.dist
def test_a_write_error_of_one_worker_ends_the_run_on_all(tmp_path):
    spec = make_spec(num_workers=2, **SPEC)
    message = r"worker 1: OSError: .*No space left on device"
    first, second = run_on_ranks(
        fail_in, 2, spec, tmp_path, "_write", OSError(28, "No space left on device"), message
    )
    assert first == second
    assert not list(tmp_path.glob("step-*/manifest.json"))


def train_on_slow_storage(spec, folder, methods):
    """Train while calls of rank 0's storage exceed the default timeout; return the last steps."""
    slowed = set()

    def slow(name):
        method = getattr(Checkpoints, name)

        def wait_once(*arguments):
            if dist.get_rank() == 0 and name not in slowed:
                slowed.add(name)
                time.sleep(2.5)
            return method(*arguments)

        return wait_once

    dist.set_timeout(timedelta(seconds=1.5))
    with mock.patch.multiple(Checkpoints, **{name: slow(name) for name in methods}):
        result, notes = run_here(spec, folder)
    assert dist.get_rank() > 0 or slowed == set(methods)
    return result.step, notes.resumed_from


@pytest.mark.dist
def test_storage_may_be_slower_than_the_collective_timeout(tmp_path):
    spec = make_spec(num_workers=2, **SPEC | {"checkpoint": {"every": 2, "keep_last": 1}})
    assert run_on_ranks(train_on_slow_storage, 2, spec, tmp_path, ["_write", "_prune"]) == [(8, None)] * 2
    longer = spec.model_copy(update={"steps": 10})
    assert run_on_ranks(train_on_slow_storage, 2, longer, tmp_path, ["_verify", "_read"])[0] == (10, 8)


def lose_a_worker(spec, folder):
    """Kill worker 1 while it writes a checkpoint; return how worker 0 classifies its error."""
    if dist.get_rank() == 1:
        Checkpoints._write = lambda *_: os._exit(1)
    checkpoints = Checkpoints(str(folder), spec, {}, here())
    state = SimpleNamespace(own=dict, shared=dict, position=TrainProgress(step=2))
    checkpoints.save(state)
    with pytest.raises(StorageError, match="a worker did not answer within") as ended:
        checkpoints.wait()
    failures.record(folder / "failures", ended.value, 0, 2)


@pytest.mark.dist
def test_a_worker_that_dies_while_a_checkpoint_is_written_is_the_first_failure(tmp_path):
    with pytest.raises(EOFError):
        run_on_ranks(lose_a_worker, 2, CheckpointSpec(), tmp_path, timeout_seconds=20)
    [failure] = failures.read(tmp_path / "failures")
    assert (failure.cause, failure.is_consequence) == ("worker_lost", True)


def wait_for_a_missing_worker(folder):
    """Return the seconds until worker 0 detects the missing worker 1, before either has checkpoints."""
    dist.set_timeout(timedelta(seconds=1.5))
    if dist.get_rank() == 1:
        time.sleep(5)
        return 0.0
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out"):
        Checkpoints(str(folder), CheckpointSpec(), {}, here())
    return time.monotonic() - began


@pytest.mark.dist
def test_a_missing_worker_is_detected_within_the_collective_timeout(tmp_path):
    assert run_on_ranks(wait_for_a_missing_worker, 2, tmp_path)[0] < 4
