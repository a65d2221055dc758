import subprocess
import sys
import tracemalloc

import pytest

from service.adapters.job_log import MAX_LINE_BYTES, AttemptLog, LogOffset, Selection
from trainer.jobspec import FEEDER_LOG_FILE, LOG_FILE, LOG_INDEX_FILE, InvalidField, worker_log_file
from trainer.logs import LogIndex, indexed_logs

PARTS = [
    (LOG_FILE, "output of the driver\n"),
    (worker_log_file(1), "worker 1 of 2 on a, process 11\n"),
    (worker_log_file(0), "worker 0 of 2 on b, process 11\nstep 5/10  accuracy 0.5\n"),
    (worker_log_file(1), "WARNING: slow\n"),
    (LOG_FILE, "(raylet) something of Ray's\n"),
    (worker_log_file(1), "Traceback (most recent call last):\n"),
    (LOG_FILE, "2026-01-01 00:00:00 ERROR ray: lost\n"),
    (FEEDER_LOG_FILE, "3 files\n"),
]
"""Lines in write order, and the file of each."""


def write(folder, name, text):
    with (folder / name).open("ab") as file:
        file.write(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def folder(tmp_path):
    index = LogIndex(tmp_path)
    for name, text in PARTS:
        write(tmp_path, name, text)
        index.update()
    return tmp_path


def read(folder, place=None, *, is_over=False, **selection):
    wanted = Selection(**selection)
    return [
        line
        for line in AttemptLog(folder, place or LogOffset()).read(is_over=is_over)
        if wanted.matches(line)
    ]


def test_lines_have_rank_level_and_offset_in_write_order(folder):
    lines = read(folder)
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
    assert lines[0].place == LogOffset(1, len("output of the driver\n"))
    assert lines[-1].place == LogOffset(1, sum(len(text) for _, text in PARTS))


def test_lines_are_filtered(folder):
    assert [line.text for line in read(folder, rank=0)] == [
        "worker 0 of 2 on b, process 11",
        "step 5/10  accuracy 0.5",
    ]
    assert [line.level for line in read(folder, level="warning")] == ["warning", "error", "error"]
    assert [line.text for line in read(folder, rank=1, level="error")] == [
        "Traceback (most recent call last):"
    ]


def test_reading_from_any_offset_yields_the_same_remaining_lines(folder):
    lines = read(folder)
    for number, line in enumerate(lines):
        assert read(folder, line.place) == lines[number + 1 :]


def test_an_offset_beyond_the_end_is_the_end(folder):
    log = AttemptLog(folder, LogOffset(1, 999_999_999_999_999))
    assert list(log.read()) == []
    assert log.place == read(folder)[-1].place
    write(folder, LOG_FILE, "more\n")
    write(folder, LOG_INDEX_FILE, f"{LOG_FILE} {(folder / LOG_FILE).stat().st_size}\n")
    assert [line.text for line in log.read()] == ["more"]


def test_lines_missing_from_the_index_are_read_after_the_attempt(folder):
    """After a kill of the driver no output of it or the workers is missing."""
    before = read(folder)
    write(folder, worker_log_file(1), "one more\nand half a line")
    write(folder, worker_log_file(7), "another\n")
    write(folder, LOG_FILE, "the driver\n")
    assert read(folder) == before
    rest = read(folder, is_over=True)[len(before) :]
    assert [(line.rank, line.text) for line in rest] == [
        (None, "the driver"),
        (1, "one more"),
        (1, "and half a line"),
        (7, "another"),
    ]
    assert read(folder, rest[1].place, is_over=True) == rest[2:]


def test_without_an_index_the_driver_log_is_followed(tmp_path):
    write(tmp_path, LOG_FILE, "whole\nhalf")
    log = AttemptLog(tmp_path, LogOffset())
    assert [line.text for line in log.read()] == ["whole"]
    assert list(log.read()) == []
    write(tmp_path, LOG_FILE, " a line\nand the end")
    assert [line.text for line in log.read()] == ["half a line"]
    assert [line.text for line in log.read(is_over=True)] == ["and the end"]
    assert list(log.read(is_over=True)) == []
    assert log.place.offset == (tmp_path / LOG_FILE).stat().st_size


def test_lines_are_indexed_once_complete(tmp_path):
    index = LogIndex(tmp_path)
    log = AttemptLog(tmp_path, LogOffset())
    write(tmp_path, worker_log_file(0), "whole\nhalf")
    index.update()
    assert [line.text for line in log.read()] == ["whole"]
    write(tmp_path, worker_log_file(0), " a line\n")
    index.update()
    assert [line.text for line in log.read()] == ["half a line"]


def test_an_interrupted_reader_resumes_at_its_offset(folder):
    lines, log = read(folder), AttemptLog(folder, LogOffset())
    found = []
    while True:
        line = next(log.read(), None)
        if line is None:
            break
        found.append(line)
    assert found == lines


def test_the_last_state_of_a_progress_bar_is_shown(tmp_path):
    write(tmp_path, LOG_FILE, "epoch 1:  0%\repoch 1: 50%\repoch 1: 100%\r\nwindows\r\n")
    assert [line.text for line in read(tmp_path)] == ["epoch 1: 100%", "windows"]


def test_the_current_state_of_a_progress_bar_is_shown_until_its_line_ends(tmp_path):
    log = AttemptLog(tmp_path, LogOffset())
    write(tmp_path, LOG_FILE, "whole\nhalf")
    assert log.unfinished() == []
    write(tmp_path, worker_log_file(1), "before\n\r 10%|#\r 20%|##")
    [line] = log.unfinished()
    assert (line.rank, line.level, line.text) == (1, "info", " 20%|##")
    write(tmp_path, worker_log_file(1), "\r" + "x" * 10_000 + "\r 30%|###\r")
    assert [line.text for line in log.unfinished()] == [" 30%|###"]
    write(tmp_path, worker_log_file(1), "\rdone\n")
    assert log.unfinished() == []
    assert [line.text for line in log.read(is_over=True)] == ["whole", "half", "before", "done"]
    assert log.unfinished() == []


def test_invalid_utf_8_and_unterminated_lines_are_read(tmp_path):
    index = LogIndex(tmp_path)
    write(tmp_path, LOG_FILE, b"\xff\r\n" + b"x" * (2 * MAX_LINE_BYTES + 5))
    index.update()
    write(tmp_path, LOG_FILE, "\n")
    index.update()
    lines = read(tmp_path)
    assert lines[0].text == "�"
    assert sum(len(line.text) for line in lines[1:]) == 2 * MAX_LINE_BYTES + 5
    assert lines[-1].place.offset == (tmp_path / LOG_FILE).stat().st_size
    assert read(tmp_path / "none") == []


WRITER = """
import os, sys
from pathlib import Path
from trainer.logs import redirect_output

redirect_output(Path(sys.argv[1]))
for number in range(100_000):
    print(f"line {number} of a log with a good many bytes in each of its lines")
os.system("echo the last line, by a child")
"""


def test_concurrent_output_of_several_workers_is_complete(tmp_path):
    ranks = range(3)
    with indexed_logs(tmp_path):
        command = [sys.executable, "-c", WRITER]
        writers = [subprocess.Popen([*command, str(tmp_path / worker_log_file(rank))]) for rank in ranks]
        log, found = AttemptLog(tmp_path, LogOffset()), {rank: [] for rank in ranks}
        while any(writer.poll() is None for writer in writers):
            for line in log.read():
                found[line.rank].append(line.text)
    for line in log.read(is_over=True):
        found[line.rank].append(line.text)
    for rank in ranks:
        assert found[rank][-1] == "the last line, by a child"
        assert [int(text.split()[1]) for text in found[rank][:-1]] == list(range(100_000))
    assert log.place.offset == sum((tmp_path / worker_log_file(rank)).stat().st_size for rank in ranks)


def test_a_log_of_100_mb_takes_little_memory(tmp_path):
    index = LogIndex(tmp_path)
    content = (b"x" * 999 + b"\n") * 1_000
    for number in range(100):
        write(tmp_path, worker_log_file(number % 2), content)
        index.update()
    tracemalloc.start()
    try:
        assert sum(1 for _ in AttemptLog(tmp_path, LogOffset()).read()) == 100_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_offsets_round_trip_through_text():
    assert LogOffset.parse("Last-Event-ID", str(LogOffset(3, 17))) == LogOffset(3, 17)
    for text in ("", "3", "a:b", "1:-1", "1:2:3", "9999999:1"):
        with pytest.raises(InvalidField, match="Last-Event-ID"):
            LogOffset.parse("Last-Event-ID", text)
