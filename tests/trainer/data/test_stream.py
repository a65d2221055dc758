import contextlib
import re
import secrets
import statistics
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from tests.trainer.data.image_files import (
    CPU,
    assert_same,
    damage_page,
    encode_but,
    make_spec,
    make_stream,
    open_all,
    take,
    take_test,
    write_parquet,
)
from trainer.data import open_dataset
from trainer.errors import ConfigurationError, CorruptImage, DataError, DataTimeoutError
from trainer.failure_kinds import classify
from trainer.jobspec import DigitsSpec

pytestmark = pytest.mark.private_ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Private Ray of this machine, as `trainer.driver.launch` starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray  # imported here: it reads the environment

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@contextlib.contextmanager
def feeding(spec):
    from trainer.data.stream import start_feeder, stop_feeder

    feeder = start_feeder(spec)
    yield feeder
    stop_feeder(feeder)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "kind", ["parquet", pytest.param("images", marks=SLOW), pytest.param("webdataset", marks=SLOW)]
)
def test_samples_do_not_depend_on_workers_or_resumption(kind, tmp_path):
    """Five steps of 9 samples are more than two passes over the 21 rows."""
    spec = make_spec(make_stream(kind, tmp_path), global_batch_size=9, gradient_accumulation_steps=2)
    with feeding(spec) as feeder:
        alone = open_all(spec, 1, feeder=feeder)
        assert (alone[0].shape, alone[0].classes, alone[0].skipped_images) == ((3, 8, 8), 3, frozenset())
        assert alone[0].class_names == (["a", "b", "c"] if kind == "images" else [])
        whole, tests = take(alone, 0, 5), take_test(alone)
        assert [len(labels) for _, labels in tests] == [4, 4, 1]
        workers = open_all(spec, 2, feeder=feeder)
        assert_same(take(workers, 0, 5), whole)
        assert_same(take_test(workers), tests)
    labels = torch.cat([labels for _, labels in whole])
    assert labels[:21].bincount().tolist() == labels[21:42].bincount().tolist()
    assert labels[:21].tolist() != labels[21:42].tolist()


def test_a_pass_over_little_data_takes_little_time(tmp_path):
    """Ray Data waits for a second at the beginning of each pass, unless its interval is set."""
    spec = make_spec(make_stream("images", tmp_path), global_batch_size=21)
    with feeding(spec) as feeder:
        passes = open_all(spec, 1, feeder=feeder)[0].train(0)
        seconds = []
        for _ in range(6):
            began = time.monotonic()
            next(passes)
            seconds.append(time.monotonic() - began)
    assert statistics.median(seconds[1:]) < 0.8, seconds


def test_data_is_read_from_any_address(tmp_path):
    """Through fsspec and a real server, like an object store."""
    data = make_stream("webdataset", tmp_path)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        there = data.model_copy(update={"train": f"{address}/train/", "test": f"{address}/test/"})
        with feeding(make_spec(there)) as feeder:
            tests = take_test(open_all(make_spec(there), 1, feeder=feeder))
        server.shutdown()
    assert torch.cat([labels for _, labels in tests]).tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("kind", "name", "names"),
    [
        ("parquet", r"train/\d.parquet, crc32 [0-9a-f]{8}", [f"{n}.parquet" for n in (0, 0, 0, 1, 1, 1, 2)]),
        pytest.param(
            "images",
            r"train/./\d.png",
            [f"{n}.png" for n in ("a/0", "a/5", "a/6", "b/1", "c/0", "c/0", "c/6")],
            marks=SLOW,
        ),
        pytest.param(
            "webdataset",
            r"train/\d.tar, \d{3}",
            [f"{n[0]}.tar, {n[1:]}" for n in ("0000", "0005", "0006", "1001", "1001", "1007", "2005")],
            marks=SLOW,
        ),
    ],
)
def test_corrupt_images_are_rejected_by_name_or_replaced_equally_for_all_workers(kind, name, names, tmp_path):
    """The last rows of each file are corrupt too, so that a pass may end in them."""
    data = make_stream(kind, tmp_path, corrupt_train=(5, 6, 8, 14, 20), corrupt_test=(0, 6))
    spec = make_spec(data, global_batch_size=9, gradient_accumulation_steps=2)
    with feeding(spec) as feeder, pytest.raises(CorruptImage, match=f"`corrupt_images: skip`.*{name}"):
        take(open_all(spec, 1, feeder=feeder), 0, 3)
    spec = spec.model_copy(update={"data": data.model_copy(update={"corrupt_images": "skip"})})
    with feeding(spec) as feeder:
        alone, workers = open_all(spec, 1, feeder=feeder), open_all(spec, 2, feeder=feeder)
        whole, tests = take(alone, 0, 3), take_test(alone)
        assert_same(take(workers, 1, 2), whole[2:])
        assert_same(take_test(workers), tests)
        found = [dataset.skipped_images for dataset in (*alone, *workers)]
    assert [len(labels) for _, labels in whole] == [5, 4] * 3
    assert min(labels.min() for _, labels in whole) >= 0
    images = {image.numpy().tobytes() for inputs, _ in whole for image in inputs}
    assert bytes(4 * 3 * 8 * 8) not in images  # placeholder of a corrupt image
    assert [len(labels) for _, labels in tests] == [3, 3, 1]
    assert found[0] == found[1] == found[2]
    ends = sorted(re.sub(r"^.*/(train|val|test)/|, crc32 .{8}$", "", skipped) for skipped in found[0])
    assert ends == names


def test_too_many_consecutive_corrupt_test_rows_end_an_evaluation(tmp_path):
    test = write_parquet(tmp_path / "many", [110], encode_but(*range(3, 105)))
    spec = make_spec(make_stream("parquet", tmp_path, corrupt_images="skip", test=test))
    with (
        feeding(spec) as feeder,
        pytest.raises(DataError, match=r"100 in a row; all are corrupt: .*many/0.parquet"),
    ):
        take_test(open_all(spec, 1, feeder=feeder))


def test_an_invalid_label_is_rejected_even_if_corrupt_images_are_skipped(tmp_path):
    data = make_stream("webdataset", tmp_path, corrupt_train=(2,), classes=2, corrupt_images="skip")
    spec = make_spec(data)
    with (
        feeding(spec) as feeder,
        pytest.raises(DataError, match="must be a column of labels from 0 to 1") as caught,
    ):
        take(open_all(spec, 1, feeder=feeder), 0, 3)
    assert type(caught.value) is DataError


def test_a_missing_value_is_rejected_with_file_and_row(tmp_path):
    data = make_stream("parquet", tmp_path, shape=[2], transform={}, shuffle_rows=0, corrupt_images="skip")
    rows = [[0.5, 1.0]] * 70 + [[0.5, None]] + [[0.5, 1.0]] * 5
    pyarrow.parquet.write_table(pa.table({"image": rows, "label": [0] * 76}), tmp_path / "test" / "1.parquet")
    pyarrow.parquet.write_table(
        pa.table({"image": rows[:5], "label": [0] * 5}), tmp_path / "test" / "0.parquet"
    )
    spec = make_spec(data)
    with (
        feeding(spec) as feeder,
        pytest.raises(
            DataError, match=r"is missing, NaN or infinite in .*1.parquet; it is row 70 of the file"
        ),
    ):
        list(open_all(spec, 1, feeder=feeder)[0].test())


def cut_off(path):
    """Truncate a file within a member."""
    path.write_bytes(path.read_bytes()[:5_000])


@pytest.mark.parametrize(
    ("kind", "part", "file", "spoil", "words"),
    [
        ("parquet", "train", "1.parquet", damage_page, r"OSError: Couldn't deserialize thrift"),
        pytest.param(
            "parquet", "test", "0.parquet", damage_page, r"OSError: Couldn't deserialize thrift", marks=SLOW
        ),
        pytest.param(
            "webdataset", "train", "1.tar", cut_off, r"ReadError: unexpected end of data", marks=SLOW
        ),
    ],
)
def test_a_file_that_fails_while_it_is_read_is_named_by_its_address(kind, part, file, spoil, words, tmp_path):
    """An intact footer hides a corrupt page; an archive is truncated after it was counted."""
    spec = make_spec(make_stream(kind, tmp_path))
    with feeding(spec) as feeder:
        datasets = open_all(spec, 1, feeder=feeder)
        spoil(tmp_path / part / file)
        with pytest.raises(DataError) as caught:
            take(datasets, 0, 4) if part == "train" else take_test(datasets)
    assert (caught.value.field, caught.value.value) == (f"data.{part}", str(tmp_path / part))
    assert re.fullmatch(rf"must be readable files: {words}.*", caught.value.rule)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")  # for copying its own context
def test_task_errors_and_lost_workers_are_distinguished():
    """As seen by the feeder: an error raised by a task of Ray Data, and the loss of a worker."""
    import ray.data
    from ray.data._internal.tensor_extensions.arrow import ArrowConversionError
    from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError, RayTaskError

    from trainer.data.stream import _Feeder, _reading

    _Feeder(make_spec(DigitsSpec()).model_dump_json())  # the setup of Ray Data
    rows = ray.data.range(3).map_batches(lambda columns: columns["cls"])
    with (
        pytest.raises(DataError, match=r"must be readable files: KeyError: cls \(got 'x'\)"),
        _reading("data.train", "x"),
    ):
        rows.take_all()
    for broken in (EOFError("the end"), ArrowConversionError("the end")):
        inner = RayTaskError("inner", "", broken)
        with pytest.raises(DataError, match="the end"), _reading("data.test", "x"):
            raise RayTaskError("outer", "", inner)
    for lost in (ActorDiedError(), ObjectLostError("", None, ""), OutOfMemoryError("much")):
        with pytest.raises(type(lost)), _reading("data.test", "x"):
            raise lost
        with pytest.raises(RayTaskError), _reading("data.test", "x"):
            raise RayTaskError("task", "", lost)


def test_data_that_does_not_arrive_in_time_is_a_hang(monkeypatch):
    import ray

    from trainer.data import stream

    @ray.remote
    def sleep():
        threading.Event().wait(60)

    monkeypatch.setattr(stream, "MIN_TIMEOUT_SECONDS", 1)
    spec = make_spec(DigitsSpec()).model_copy(update={"collective_timeout_seconds": 1})
    reference = sleep.remote()
    try:
        with pytest.raises(DataTimeoutError, match="Ray Data had no batch within 1 seconds") as error:
            stream._get(reference, spec)
    finally:
        ray.cancel(reference, force=True)
    assert classify(error.value) == ("hang", False)


def test_a_feeder_reports_errors_at_startup(tmp_path):
    spec = make_spec(make_stream("parquet", tmp_path), global_batch_size=22)
    with pytest.raises(ConfigurationError, match="global_batch_size: must be at most 21"), feeding(spec):
        pass


def test_samples_do_not_depend_on_evaluations_or_feeder_restarts(tmp_path):
    import ray

    from trainer.data.stream import PREFETCH

    spec = make_spec(make_stream("parquet", tmp_path), global_batch_size=3)
    with feeding(spec) as feeder:
        dataset = open_dataset(spec, 0, 1, CPU, torch.float32, feeder)
        stream = dataset.train(0)
        parts = [next(stream)[0]]
        ahead = take([dataset], 2, 3)
        take_test([dataset])
        parts += [next(stream)[0]]
        ray.kill(feeder, no_restart=False)
        parts += [next(stream)[0] for _ in range(PREFETCH + 1)]
        whole = take([dataset], 0, 5)
    assert_same(ahead, whole[2:])
    assert_same([(part.inputs, part.labels) for part in parts], whole)
