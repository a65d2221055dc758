"""Log of a job: lines of its driver and workers over all attempts.

Driver and workers write files of their own. The driver keeps an index of these files: which of them comes
next, and up to which byte. So the order is fixed, and one number, the bytes before it, is a place in the
stream. What the index does not hold, because the driver was killed or is about to add it, comes last, in the
order of the files' names.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path
from typing import BinaryIO, Literal, cast, get_args

from service.adapters.shared_files import open_file
from trainer.jobspec import LOG_FILE, LOG_INDEX_FILE, InvalidField

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = get_args(Level)
CHUNK_BYTES = 65_536
MAX_LINE_BYTES = 65_536
"""Maximum length of a line; longer lines are split."""
TAIL_BYTES = 4_096
"""Bytes read of an unfinished last line."""
WORKER_FILE = re.compile(r"^log-rank-(?P<rank>\d+)\.txt$")
INDEX_LINE = re.compile(rb"^(?P<name>log[a-z0-9-]*\.txt) (?P<end>\d{1,15})\n$")
LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
TROUBLE = re.compile(r"^(Traceback \(most recent call last\)|\w*(Error|Exception)\b)")
PLACE = re.compile(r"^([1-9][0-9]{0,5}):([0-9]{1,15})$")


@dataclass(frozen=True, order=True)
class LogOffset:
    """Offset after a line: the attempt, and bytes of its log."""

    attempt: int = 1
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.attempt}:{self.offset}"

    @classmethod
    def parse(cls, field: str, text: str) -> "LogOffset":
        """Parse the text form of an offset. Raises InvalidField."""
        if (found := PLACE.match(text)) is None:
            raise InvalidField(field, text, "must be the id of an event of this stream, such as 1:4096")
        return cls(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Line:
    """Line of a log."""

    place: LogOffset
    """Offset of the end of the line."""
    rank: int | None
    """Rank of the worker that printed the line; None for the driver."""
    level: Level
    text: str


@dataclass(frozen=True)
class Selection:
    """Filter of lines; None means all."""

    rank: int | None = None
    level: Level | None = None
    """Lowest level."""

    def matches(self, line: Line) -> bool:
        """Return whether a line matches."""
        return (self.rank is None or line.rank == self.rank) and (
            self.level is None or LEVELS.index(line.level) >= LEVELS.index(self.level)
        )


class AttemptLog:
    """Log files of an attempt, read as one from an offset."""

    def __init__(self, folder: Path, place: LogOffset) -> None:
        self._folder, self._start = folder, place
        self.place = LogOffset(place.attempt)
        self._ends: dict[str, int] = {}
        """Number of bytes read so far, by file."""
        self._index_offset = 0

    def read(self, *, is_over: bool = False) -> Iterator[Line]:
        """Yield the complete lines.

        With `is_over`, also the incomplete one at the end of a file.
        """
        for name, end in self._segments():
            yield from self._read_file(name, end, is_whole=True)
        if is_over or not (self._folder / LOG_INDEX_FILE).exists():
            for path in self._files() if is_over else [self._folder / LOG_FILE]:
                with suppress(FileNotFoundError):
                    yield from self._read_file(path.name, path.stat().st_size, is_whole=is_over)
        if self.place < self._start:  # a place beyond the end is the end
            self._start = self.place

    def unfinished(self) -> list[Line]:
        """Return the current text of incomplete lines that carriage returns overwrite."""
        lines = []
        for path in self._files():
            with suppress(FileNotFoundError), self._open(path.name) as file:
                size = file.seek(0, SEEK_END)
                file.seek(max(self._ends.get(path.name, 0), size - TAIL_BYTES))
                content = file.read(TAIL_BYTES).rpartition(b"\n")[2]
                if b"\r" in content:
                    lines.append(self._make_line(path.name, content))
        return lines

    def _segments(self) -> Iterator[tuple[str, int]]:
        """Yield the new entries of the index: a file, and the end to read up to."""
        try:
            index = self._open(LOG_INDEX_FILE)
        except FileNotFoundError:
            return
        with index:
            index.seek(self._index_offset)
            while line := index.readline(MAX_LINE_BYTES):
                if not line.endswith(b"\n"):  # still being written
                    return
                if (found := INDEX_LINE.match(line)) is not None:
                    yield found["name"].decode(), int(found["end"])
                self._index_offset += len(line)

    def _open(self, name: str) -> BinaryIO:
        return open_file(self._folder.parent.parent, self._folder / name)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("log*.txt"), key=lambda path: (path.name != LOG_FILE, path.name))

    def _read_file(self, name: str, end: int, *, is_whole: bool) -> Iterator[Line]:
        """Yield the lines of a file up to `end`; with `is_whole`, the last one ends there."""
        self._skip(name, end)
        if self._ends.get(name, 0) >= end:
            return
        try:
            file = self._open(name)
        except FileNotFoundError:
            return
        with file:
            file.seek(self._ends.get(name, 0))
            left, rest = end - file.tell(), b""
            while chunk := file.read(min(CHUNK_BYTES, left)):
                left -= len(chunk)
                *lines, rest = (rest + chunk).split(b"\n")
                for content in lines:
                    yield self._line(name, content, len(content) + 1)
                if len(rest) > MAX_LINE_BYTES:
                    yield self._line(name, rest, len(rest))
                    rest = b""
            if is_whole and rest:
                yield self._line(name, rest, len(rest))

    def _skip(self, name: str, end: int) -> None:
        """Skip the bytes before the start offset."""
        size = min(self._start.offset - self.place.offset, end - self._ends.get(name, 0))
        if size > 0:
            self._move(name, size)

    def _move(self, name: str, size: int) -> None:
        self.place = LogOffset(self.place.attempt, self.place.offset + size)
        self._ends[name] = self._ends.get(name, 0) + size

    def _line(self, name: str, content: bytes, size: int) -> Line:
        self._move(name, size)
        return self._make_line(name, content)

    def _make_line(self, name: str, content: bytes) -> Line:
        # A progress bar goes back to the start of its line again and again: what a terminal would show at
        # last is the line.
        text = content.decode(errors="replace").rstrip("\r").rpartition("\r")[2]
        worker = WORKER_FILE.match(name)
        return Line(self.place, int(worker["rank"]) if worker else None, _level(text), text)


def _level(text: str) -> Level:
    """Return the level of a line, by the level name near its beginning."""
    if (found := LEVEL.search(text, 0, 100)) is not None:
        name = found[1].lower()
        return "error" if name == "critical" else cast("Level", name)
    return "error" if TROUBLE.match(text) else "info"
