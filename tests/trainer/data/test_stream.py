import contextlib
import secrets
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from tests.trainer.data.making import CPU, assert_same, make_spec, make_stream, open_all, take, take_test, truncate
from trainer.data import open_dataset
from trainer.errors import ConfigurationError, DataError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A Ray of this machine's own, as `trainer.launch` starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray  # only now: it reads the environment

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


@pytest.mark.parametrize("kind", ["parquet", "images", "webdataset"])
def test_neither_workers_nor_a_resumption_change_a_sample(kind, tmp_path):
    """Five steps of 9 go more than twice over the 21 rows."""
    spec = make_spec(make_stream(kind, tmp_path), global_batch_size=9, accumulate=2)
    with feeding(spec) as feeder:
        alone = open_all(spec, 1, feeder=feeder)
        assert (alone[0].shape, alone[0].classes, alone[0].skipped_images) == ((3, 8, 8), 3, 0)
        whole, tests = take(alone, 0, 5), take_test(alone)
        assert [len(labels) for _, labels in tests] == [4, 4, 1]
        workers = open_all(spec, 2, feeder=feeder)
        assert_same(take(workers, 0, 5), whole)
        assert_same(take_test(workers), tests)
    labels = torch.cat([labels for _, labels in whole])
    assert labels[:21].bincount().tolist() == labels[21:42].bincount().tolist()
    assert labels[:21].tolist() != labels[21:42].tolist()


def test_data_lies_at_any_address(tmp_path):
    """Through fsspec and a real server, as an object store would be reached."""
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


def test_a_corrupt_image_is_named(tmp_path):
    data = make_stream("images", tmp_path)
    truncate(tmp_path / "data" / "train" / "b" / "4.png")
    spec = make_spec(data, global_batch_size=21)
    with pytest.raises(DataError, match=r"takes images that can be read.*train/b/4.png"), feeding(spec) as feeder:
        next(open_all(spec, 1, feeder=feeder)[0].train(0))


def test_a_feeder_finds_what_is_wrong_as_it_starts(tmp_path):
    spec = make_spec(make_stream("parquet", tmp_path), global_batch_size=22)
    with pytest.raises(ConfigurationError, match="global_batch_size: takes 21 at most"), feeding(spec):
        pass


def test_neither_an_evaluation_nor_the_death_of_the_feeder_changes_a_sample(tmp_path):
    import ray

    spec = make_spec(make_stream("parquet", tmp_path))
    with feeding(spec) as feeder:
        dataset = open_dataset(spec, 0, 1, CPU, torch.float32, feeder)
        stream = dataset.train(0)
        parts = [next(stream)[0] for _ in range(2)]
        ahead = take([dataset], 2, 4)
        take_test([dataset])
        parts += [next(stream)[0]]
        ray.kill(feeder, no_restart=False)
        parts += [next(stream)[0] for _ in range(3)]
        whole = take([dataset], 0, 6)
    assert_same(ahead, whole[2:])
    assert_same([(part.inputs, part.labels) for part in parts], whole)
