import tracemalloc

import pytest

from service.domain.errors import InvalidField
from service.engine.logs import LONGEST_LINE_BYTES, AttemptLog, Place, Selection

LOG = """output of the driver
(RayTrainWorker pid=11, ip=10.0.0.1) worker 1 of 2 on a, process 11
(RayTrainWorker pid=11, ip=10.0.0.2) worker 0 of 2 on b, process 11
(RayTrainWorker pid=11, ip=10.0.0.2) step 5/10  accuracy 0.5
(RayTrainWorker pid=11, ip=10.0.0.1) WARNING: slow
(raylet) something of Ray's
(RayTrainWorker pid=11, ip=10.0.0.1) Traceback (most recent call last):
2026-01-01 00:00:00 ERROR ray: lost
(_Feeder pid=99) 3 files
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(LOG)
    return path


def read(path, place=None, **selection):
    wanted = Selection(**selection)
    return [line for line in AttemptLog(path, place or Place()).read() if wanted.takes(line)]


def test_lines_have_rank_level_and_place(path):
    lines = read(path)
    assert [(line.rank, line.level, line.text) for line in lines] == [
        (None, "info", "output of the driver"),
        (1, "info", "worker 1 of 2 on a, process 11"),
        (0, "info", "worker 0 of 2 on b, process 11"),
        (0, "info", "step 5/10  accuracy 0.5"),
        (1, "warning", "WARNING: slow"),
        (None, "info", "(raylet) something of Ray's"),
        (1, "error", "Traceback (most recent call last):"),
        (None, "error", "2026-01-01 00:00:00 ERROR ray: lost"),
        (None, "info", "3 files"),
    ]
    assert lines[0].place == Place(1, len("output of the driver\n"))
    assert lines[-1].place == Place(1, len(LOG))


def test_lines_are_selected(path):
    assert [line.text for line in read(path, rank=0)] == ["worker 0 of 2 on b, process 11", "step 5/10  accuracy 0.5"]
    assert [line.level for line in read(path, level="warning")] == ["warning", "error", "error"]
    assert [line.text for line in read(path, rank=1, level="error")] == ["Traceback (most recent call last):"]


def test_from_every_line_on_the_rest_is_the_same(path):
    lines = read(path)
    for number, line in enumerate(lines):
        assert read(path, line.place) == lines[number + 1 :]


def test_a_line_is_read_when_it_is_whole_or_nothing_follows(path):
    log = AttemptLog(path, Place())
    assert len(list(log.read())) == 9
    with path.open("a") as file:
        file.write("half")
    assert list(log.read()) == []
    with path.open("a") as file:
        file.write(" a line\nand the end")
    assert [line.text for line in log.read()] == ["half a line"]
    assert [line.text for line in log.read(is_over=True)] == ["and the end"]
    assert list(log.read(is_over=True)) == []
    assert log.place.offset == path.stat().st_size


def test_bytes_that_are_no_text_and_endless_lines_are_read_too(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"\xff\r\n" + b"x" * (2 * LONGEST_LINE_BYTES + 5) + b"\n")
    lines = read(path)
    assert lines[0].text == "�"
    assert sum(len(line.text) for line in lines[1:]) == 2 * LONGEST_LINE_BYTES + 5
    assert lines[-1].place.offset == path.stat().st_size
    assert read(tmp_path / "none.txt") == []


def test_a_large_log_takes_little_memory(tmp_path):
    path = tmp_path / "log.txt"
    with path.open("wb") as file:
        for _ in range(100):
            file.write((b"x" * 99 + b"\n") * 1_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in AttemptLog(path, Place()).read()) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_places_are_parsed_as_they_are_told():
    assert Place.parse("Last-Event-ID", str(Place(3, 17))) == Place(3, 17)
    for text in ("", "3", "a:b", "1:-1", "1:2:3", "9999999:1"):
        with pytest.raises(InvalidField, match="Last-Event-ID"):
            Place.parse("Last-Event-ID", text)
