"""What is torn or foreign is refused by name, and the checkpoint before it is taken."""

import io
import json
import multiprocessing
import os
import signal
import threading
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from unittest import mock

import fsspec
import pytest
import torch.distributed as dist

from tests.dist import run_on_ranks
from tests.trainer.factories import InterruptedRunError, Interrupting, Notes, here, make_spec, run_here
from trainer import failures
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.state import TrainProgress
from trainer.errors import StorageError
from trainer.jobspec import CheckpointSpec

SPEC = {"steps": 8, "eval_every": 2, "checkpoint": {"every": 2, "keep_last": 3}}


def write_checkpoints(folder, **changes):
    run_here(make_spec(**SPEC | changes), folder)
    return sorted(path for path in folder.iterdir() if path.name.startswith("step-"))


def go_on(folder, **changes):
    return run_here(make_spec(**SPEC | {"steps": 10} | changes), folder)[1]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("manifest.json", lambda path: path.unlink(), "torn: it has no manifest.json"),
        ("manifest.json", cut_short, "torn: manifest.json is not one of ours"),
        ("manifest.json", lambda path: path.write_text("[1]"), "torn: manifest.json is not one of ours"),
        ("shared.pt", cut_short, "torn: shared.pt has"),
        ("shared.pt", flip_a_bit, "torn: shared.pt has"),
        ("rank-00000.pt", lambda path: path.unlink(), "torn: rank-00000.pt is missing"),
        ("manifest.json", lambda path: path.write_text('{"format": 99}'), "format must be 3 (got 99)"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, file, damage, told):
    *_, before, last = write_checkpoints(tmp_path)
    damage(last / file)
    notes = go_on(tmp_path)
    assert notes.resumed_from == 6
    assert [refusal for refusal in notes.refused if last.name in refusal and told in refusal]
    assert before.name.startswith("step-000000000006")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, "another seed"),
        ({"optimizer": {"lr": 0.1}}, "another optimizer"),
        ({"norm": "batch", "global_batch_size": 40}, "another global_batch_size, norm"),
    ],
)
def test_a_checkpoint_of_another_spec_is_named_and_not_taken(tmp_path, changes, told):
    paths = write_checkpoints(tmp_path)
    notes = go_on(tmp_path, **changes)
    assert notes.resumed_from is None
    assert all("foreign" in refusal and told in refusal for refusal in notes.refused)
    assert len(notes.refused) == 3
    assert all(path.exists() for path in paths)


def test_what_does_not_shape_the_state_may_change(tmp_path):
    write_checkpoints(tmp_path)
    assert go_on(tmp_path, eval_every=5, collective_timeout_seconds=20, probes={"every": 3}).resumed_from == 8


def test_nothing_is_taken_from_an_empty_or_a_strange_folder(tmp_path):
    (tmp_path / "step-of-somebody").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    notes = go_on(tmp_path)
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


def test_the_best_by_a_direction_that_is_given_is_kept(tmp_path):
    checkpoint = {"every": 2, "keep_last": 1, "keep_best": "test_loss", "best_mode": "max"}
    write_checkpoints(tmp_path, steps=30, checkpoint=checkpoint)
    _, notes = run_here(make_spec(**SPEC | {"steps": 30}))
    losses = {step: values["test_loss"] for step, values in notes.metrics.items() if step > 0}
    steps = {json.loads(path.read_text())["step"] for path in tmp_path.glob("step-*/manifest.json")}
    assert steps == {max(losses, key=losses.get), 30}


def test_the_best_is_kept_by_its_own_steps_evaluation_wherever_checkpoints_fall(tmp_path):
    checkpoint = {"every": 7, "keep_last": 1, "keep_best": "accuracy"}
    _, notes = run_here(make_spec(steps=60, eval_every=5, checkpoint=checkpoint), tmp_path)
    accuracies = {step: values["accuracy"] for step, values in notes.metrics.items() if step > 0}
    first_best = next(step for step, value in accuracies.items() if value == max(accuracies.values()))
    kept = {json.loads(path.read_text())["step"] for path in tmp_path.glob("step-*/manifest.json")}
    assert kept == {first_best, 60}


def test_a_run_that_is_to_end_before_its_checkpoint_ends_there(tmp_path):
    write_checkpoints(tmp_path)
    result, notes = run_here(make_spec(**SPEC | {"steps": 5}), tmp_path)
    assert (result.step, result.end, notes.resumed_from) == (8, "finished", 8)


class Full(io.BytesIO):
    """A disk that is full after some bytes."""

    def write(self, data):
        if self.tell() + len(data) > 2_000:
            raise OSError(28, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_told_as_that(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    monkeypatch.setattr(LocalFileSystem, "open", lambda *_, **__: Full())
    with pytest.raises(StorageError, match=r"step 2 in .*could not be written: worker 0: OSError: .*No space left"):
        run_here(make_spec(**SPEC), tmp_path)


class Counting(Notes):
    """A journal that counts the checkpoints in a folder at each step."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.counts = folder, {}

    def update(self, step):
        self.counts[step] = len(list(self.folder.glob("step-*/manifest.json")))


def save_late(spec, folder):
    """Have the checkpoint of step 5 wait for step 8; return the numbers of checkpoints at each step, and at the end."""
    write, journal = Checkpoints._write_manifest, Counting(folder)

    def write_late(self, manifest):
        deadline = time.monotonic() + 10
        while manifest.step == 5 and 8 not in journal.counts and time.monotonic() < deadline:
            time.sleep(0.001)
        write(self, manifest)

    Checkpoints._write_manifest = write_late
    try:
        run_here(spec, folder, journal=journal)
        return journal.counts, len(list(folder.glob("step-*/manifest.json")))
    finally:
        Checkpoints._write_manifest = write


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_do_not_wait_for_a_checkpoint_and_the_end_does(tmp_path, world_size):
    spec = make_spec(num_workers=world_size, steps=10, checkpoint={"every": 5})
    arguments = (spec, tmp_path)
    results = run_on_ranks(save_late, 2, *arguments) if world_size > 1 else [save_late(*arguments)]
    assert results[0][0][8] == 0
    assert [at_the_end for _, at_the_end in results] == [2] * world_size


@pytest.mark.parametrize(("every", "failing", "reported"), [(2, 4, 5), (8, 8, 8)])
def test_a_failure_in_the_background_ends_the_run_at_the_next_step_or_at_the_end(
    tmp_path, monkeypatch, every, failing, reported
):
    """Once it is known: the journal waits for it, as a step is shorter than a write."""
    write, steps = Checkpoints._write, []
    failed = threading.Event()

    def fail(self, name, file, content):
        if f"step-{failing:012d}" in name and file == "shared.pt":
            failed.set()
            raise OSError(28, "No space left on device")
        return write(self, name, file, content)

    class Waiting(Notes):
        def update(self, step):
            steps.append(step)
            if step == failing + 1:
                assert failed.wait(10)
                time.sleep(0.2)  # from the error to its being known

    monkeypatch.setattr(Checkpoints, "_write", fail)
    with pytest.raises(StorageError, match=rf"step {failing} in .*No space left"):
        run_here(make_spec(**SPEC | {"checkpoint": {"every": every}}), tmp_path, journal=Waiting())
    assert steps[-1] in (reported, reported + 1)


def test_a_run_that_fails_lets_its_checkpoint_be_finished(tmp_path):
    with pytest.raises(InterruptedRunError):
        run_here(make_spec(**SPEC), tmp_path, journal=Interrupting(3))
    assert len(list(tmp_path.glob("step-000000000002-*/manifest.json"))) == 1


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
    """Whoever can write to the storage must not be able to run anything here: files are read as data alone."""
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
        go_on(tmp_path)


def test_any_storage_that_fsspec_reaches(tmp_path):
    address = "memory://checkpoints/job-1"
    run_here(make_spec(**SPEC), address)
    assert go_on(address).resumed_from == 8
    names = [path.rpartition("/")[2] for path in fsspec.filesystem("memory").ls("/checkpoints/job-1", detail=False)]
    assert len(names) == 3


def save_without_end(folder):
    spec = make_spec(steps=1_000_000, eval_every=1_000_000, checkpoint={"every": 1})
    run_here(spec, folder)


def test_a_kill_at_any_moment_leaves_a_checkpoint_that_can_be_used(tmp_path):
    """A process that saves in every step is killed again and again; each one after it goes on from where another was."""
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
        notes = Notes()
        steps = newest(tmp_path)
        assert steps > reached
        run_here(make_spec(steps=steps, eval_every=1_000_000, checkpoint={"every": 1}), tmp_path, journal=notes)
        assert notes.resumed_from == steps
        reached = steps


def newest(folder):
    """Step of the newest checkpoint with a manifest; -1 if there is none."""
    return max((int(path.parent.name.split("-")[1]) for path in folder.glob("step-*/manifest.json")), default=-1)


def fail_in(spec, folder, method, error, told):
    """Train while worker 1's storage fails in a method; return what the run ends with on this worker."""
    before = getattr(Checkpoints, method)

    def fail(*arguments):
        if dist.get_rank() == 1:
            raise error
        return before(*arguments)

    setattr(Checkpoints, method, fail)
    with pytest.raises(StorageError, match=told) as ended:
        run_here(spec, folder)
    setattr(Checkpoints, method, before)
    return str(ended.value)


@pytest.mark.dist
def test_a_worker_that_cannot_read_ends_the_run_on_all_with_its_reason(tmp_path):
    spec = make_spec(num_workers=2, **SPEC)
    run_on_ranks(run_here, 2, spec, tmp_path)
    told = r"step-000000000008-.* could not be read: worker 1: OSError"
    first, second = run_on_ranks(fail_in, 2, spec, tmp_path, "_read", OSError(5, "Input/output error"), told)
    assert first == second


@pytest.mark.dist
def test_a_worker_that_cannot_write_ends_the_run_on_all_with_its_reason(tmp_path):
    spec = make_spec(num_workers=2, **SPEC)
    told = r"worker 1: OSError: .*No space left on device"
    first, second = run_on_ranks(fail_in, 2, spec, tmp_path, "_write", OSError(28, "No space left on device"), told)
    assert first == second
    assert not list(tmp_path.glob("step-*/manifest.json"))


def train_on_slow_storage(spec, folder, methods):
    """Train while some calls of rank 0's storage take longer than the default group's time limit; return the last steps."""
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
def test_storage_may_be_slower_than_collectives_of_training(tmp_path):
    spec = make_spec(num_workers=2, **SPEC | {"checkpoint": {"every": 2, "keep_last": 1}})
    assert run_on_ranks(train_on_slow_storage, 2, spec, tmp_path, ["_write", "_prune"]) == [(8, None)] * 2
    longer = spec.model_copy(update={"steps": 10})
    assert run_on_ranks(train_on_slow_storage, 2, longer, tmp_path, ["_verify", "_read"])[0] == (10, 8)


def lose_a_worker(spec, folder):
    """Have worker 1 die while it writes a checkpoint; return how worker 0 classifies what it meets."""
    if dist.get_rank() == 1:
        Checkpoints._write = lambda *_: os._exit(1)
    checkpoints = Checkpoints(str(folder), spec, {}, here())
    state = SimpleNamespace(own=dict, shared=dict, position=TrainProgress(step=2))
    checkpoints.save(state)
    with pytest.raises(StorageError, match="needs an answer of every worker") as ended:
        checkpoints.wait()
    failures.record(folder / "failures", ended.value, 0, 2)


@pytest.mark.dist
def test_a_worker_that_dies_while_a_checkpoint_is_written_is_the_first_failure(tmp_path):
    with pytest.raises(EOFError):
        run_on_ranks(lose_a_worker, 2, CheckpointSpec(), tmp_path, timeout_seconds=20)
    [failure] = failures.read(tmp_path / "failures")
    assert (failure.cause, failure.is_consequence) == ("worker_lost", True)


def wait_for_a_missing_worker(folder):
    """Return the seconds until worker 0 misses worker 1, before either has checkpoints."""
    dist.set_timeout(timedelta(seconds=1.5))
    if dist.get_rank() == 1:
        time.sleep(5)
        return 0.0
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out"):
        Checkpoints(str(folder), CheckpointSpec(), {}, here())
    return time.monotonic() - began


@pytest.mark.dist
def test_a_worker_that_is_missing_at_the_start_is_found_within_the_limit_of_training(tmp_path):
    assert run_on_ranks(wait_for_a_missing_worker, 2, tmp_path)[0] < 4
