import threading

import pytest

from trainer.data.cache import cached


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_file_is_written_once_by_several_threads():
    writes = []

    def write(file):
        writes.append(1)
        file.write(b"data")

    threads = [threading.Thread(target=cached, args=("a.npy", write)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cached("a.npy", write).read_bytes() == b"data"
    assert writes == [1]


def test_a_failed_write_leaves_no_file_and_is_repeated():
    def fail(file):
        file.write(b"half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        cached("b.npy", fail)
    assert cached("b.npy", lambda file: file.write(b"whole")).read_bytes() == b"whole"
