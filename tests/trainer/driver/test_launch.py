"""Parts of the driver that do not need Ray."""

import sys
import threading
import time
from types import SimpleNamespace
from unittest import mock

import pytest

from tests.trainer.factories import make_spec
from trainer.atomic import atomic_write
from trainer.driver.launch import _explain, _fit, _has_room, _run_with_restarts, wait_while_saving
from trainer.errors import StorageError
from trainer.jobspec import STOP_FILE, TASK_FILE, AttemptContext, AttemptTask, Outcome, attempt_folder
from trainer.worker import read_task


def test_a_stopping_driver_waits_for_the_checkpoint_in_progress(tmp_path):
    marker = tmp_path / "saving"
    began = time.monotonic()
    wait_while_saving(marker, 30)
    assert time.monotonic() - began < 1
    for finish in (marker.unlink, lambda: marker.write_text("the next one")):
        marker.write_text("this one")
        threading.Timer(0.3, finish).start()
        began = time.monotonic()
        wait_while_saving(marker, 30)
        assert 0.25 < time.monotonic() - began < 10
    began = time.monotonic()
    wait_while_saving(marker, 0.2)
    assert 0.2 <= time.monotonic() - began < 10


TOKEN = "0123456789abcdef-of-mlflow"


def make_task(folder):
    context = AttemptContext(
        job_id="a", attempt=1, name="a", folder=str(folder), mlflow_url="http://m", mlflow_token=TOKEN
    )
    return AttemptTask(spec=make_spec(), context=context)


def test_ray_train_gets_no_token(tmp_path, monkeypatch):
    """Ray copies the configuration of a run into its state and its events."""
    modules = (
        "ray",
        "ray.exceptions",
        "ray.train",
        "ray.train.torch",
        "ray.train.v2._internal.execution.callback",
    )
    fakes = {name: mock.MagicMock() for name in modules}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    fakes["ray.train.v2._internal.execution.callback"].WorkerGroupCallback = object
    train = mock.MagicMock()
    monkeypatch.setattr("trainer.driver.launch._trainer_class", lambda: train)
    train.return_value.fit.return_value.return_value = {"state": "succeeded", "reason": "finished"}
    task = make_task(tmp_path)
    _fit(task, 0, {"feeder": None, "logs": None})
    given = str([train.mock_calls, *(fake.mock_calls for fake in fakes.values())])
    assert TOKEN not in given
    path = tmp_path / "attempt-1" / TASK_FILE
    assert train.call_args.kwargs["train_loop_config"]["task"] == str(path)
    atomic_write(path, task.model_dump_json())
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_task(path) == task


def test_a_missing_task_file_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"task.json cannot be read on .*: No such file"):
        read_task(tmp_path / TASK_FILE)


def test_workers_that_stop_on_request_are_not_restarted(tmp_path, monkeypatch):
    task, history = make_task(tmp_path), mock.Mock()
    saved = Outcome(state="failed", reason="saved", cause="preempted", step=3)
    done = Outcome(state="succeeded", reason="finished")
    monkeypatch.setattr("trainer.driver.launch._has_room", lambda spec: True)
    monkeypatch.setattr("trainer.driver.launch._fit", lambda task, number, given: [saved, done][number])
    assert _run_with_restarts(task, history, {}) == done
    folder = attempt_folder(tmp_path, 1)
    folder.mkdir()
    (folder / STOP_FILE).touch()
    assert _run_with_restarts(task, history, {}) == saved


@pytest.fixture
def ray(monkeypatch):
    """Ray without resources, and its autoscaler."""
    fakes = {name: mock.MagicMock() for name in ("ray", "ray.autoscaler", "ray.autoscaler.sdk")}
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    fakes["ray"].cluster_resources.return_value = {}
    fakes["ray"].request_resources = fakes["ray.autoscaler.sdk"].request_resources
    monkeypatch.setattr("trainer.driver.launch.time.sleep", mock.Mock())
    return fakes["ray"]


def requests(ray):
    return [call.kwargs["bundles"] for call in ray.request_resources.call_args_list]


GPU, CPU = {"GPU": 1, "CPU": 1}, {"CPU": 1}


@pytest.mark.parametrize(
    ("changes", "worker"),
    [
        ({}, CPU),
        ({"use_gpu": True}, GPU),
        ({"use_gpu": True, "accelerator_type": "A100"}, GPU | {"accelerator_type:A100": 0.001}),
    ],
)
def test_the_autoscaler_is_asked_once_for_the_workers(ray, changes, worker):
    spec = make_spec(num_workers=2, **changes)
    few, enough = {"CPU": 1, "GPU": 1}, {"CPU": 2, "GPU": 2}
    ray.cluster_resources.side_effect = [{}, few, few, enough]
    assert _has_room(spec)
    # Both, although one is there: Ray compares a request with the whole cluster.
    assert requests(ray) == [[worker, worker], []]


def test_the_request_to_the_autoscaler_ends_with_every_wait(ray, monkeypatch):
    spec = make_spec(num_workers=2)
    monkeypatch.setattr("trainer.driver.launch.RESOURCE_TIMEOUT_SECONDS", -1.0)
    assert not _has_room(spec)
    assert requests(ray) == [[CPU, CPU], []]
    ray.request_resources.reset_mock()
    ray.cluster_resources.side_effect = [{}, KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        _has_room(spec)
    assert requests(ray) == [[CPU, CPU], []]


def test_the_autoscaler_is_not_asked_for_what_is_there(ray):
    ray.cluster_resources.return_value = {"CPU": 2}
    assert _has_room(make_spec(num_workers=2))
    assert requests(ray) == []


def test_a_worker_that_does_not_answer_is_lost(tmp_path):
    """As on a node that is cut off, which Ray declares dead later."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    failed = SimpleNamespace(
        worker_failures={1: WorkerHealthCheckTimeoutError("A worker has hung for 60 s.")}
    )
    outcome = _explain(failed, tmp_path, make_task(tmp_path))
    assert (outcome.state, outcome.cause, outcome.rank) == ("failed", "worker_lost", 1)
    assert "A worker has hung for 60 s." in outcome.reason
