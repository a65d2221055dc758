"""A job's log, line by line: what its driver and workers printed, over all attempts, and where each line ends.

The log of an attempt is one file on the project's storage. Ray passes on the workers' lines to their driver, which writes them
there with the worker's process in front; each worker tells its rank and process in its first line.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast, get_args

from service.domain.errors import InvalidField

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = get_args(Level)
CHUNK_BYTES = 65_536
LONGEST_LINE_BYTES = 65_536
"""What is longer is cut into several."""
OF_WORKER = re.compile(r"^\((?P<process>\w[^()]* pid=\d+(?:, ip=[^()]+)?)\) ?(?P<text>.*)$", re.DOTALL)
ANNOUNCED = re.compile(r"^worker (?P<rank>\d+) of \d+ on \S+, process \d+$")
LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
TROUBLE = re.compile(r"^(Traceback \(most recent call last\)|\w*(Error|Exception)\b)")
PLACE = re.compile(r"^([0-9]{1,6}):([0-9]{1,15})$")


@dataclass(frozen=True, order=True)
class Place:
    """Where a line ends, and so where to go on: the attempt, and bytes of its file."""

    attempt: int = 1
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.attempt}:{self.offset}"

    @classmethod
    def parse(cls, field: str, text: str) -> "Place":
        """Read what `str` made. Raises InvalidField."""
        if (found := PLACE.match(text)) is None:
            raise InvalidField(field, text, "takes the id of an event of this stream, such as 1:4096")
        return cls(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Line:
    """One line of a log."""

    place: Place
    """Its end."""
    rank: int | None
    """Of the worker that printed it; None for the driver."""
    level: Level
    text: str


@dataclass(frozen=True)
class Selection:
    """Which lines to show; None is all."""

    rank: int | None = None
    level: Level | None = None
    """The least."""

    def takes(self, line: Line) -> bool:
        """Whether to show a line."""
        return (self.rank is None or line.rank == self.rank) and (
            self.level is None or LEVELS.index(line.level) >= LEVELS.index(self.level)
        )


class AttemptLog:
    """Reads an attempt's file from a place on, as far as it has been written."""

    def __init__(self, path: Path, place: Place) -> None:
        self._path, self.place = path, place
        self._ranks: dict[str, int] = {}
        self._knows_ranks = place.offset == 0

    def read(self, *, is_over: bool = False) -> Iterator[Line]:
        """Yield the whole lines that there are now; with `is_over`, what is left at the end is one too."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            if not self._knows_ranks:
                self._learn_ranks(file)
            file.seek(self.place.offset)
            rest = b""
            while chunk := file.read(CHUNK_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                for content in lines:
                    yield self._line(content, len(content) + 1)
                if len(rest) > LONGEST_LINE_BYTES:
                    yield self._line(rest, len(rest))
                    rest = b""
            if is_over and rest:
                yield self._line(rest, len(rest))

    def _learn_ranks(self, file: BinaryIO) -> None:
        """Look through what lies before the place for the lines in which workers tell their ranks."""
        left = self.place.offset
        while content := file.readline(LONGEST_LINE_BYTES):
            left -= len(content)
            if left < 0:
                break
            if b", process " in content:
                self._who(content.decode(errors="replace").rstrip("\n"))
        self._knows_ranks = True

    def _line(self, content: bytes, size: int) -> Line:
        self.place = Place(self.place.attempt, self.place.offset + size)
        rank, text = self._who(content.decode(errors="replace").rstrip("\r"))
        return Line(self.place, rank, _level(text), text)

    def _who(self, text: str) -> tuple[int | None, str]:
        """Take a worker's process off the front of a line."""
        if (found := OF_WORKER.match(text)) is None:
            return None, text
        process, text = found["process"], found["text"]
        if (announced := ANNOUNCED.match(text)) is not None:
            self._ranks[process] = int(announced["rank"])
        return self._ranks.get(process), text


def _level(text: str) -> Level:
    """Tell how serious a line is, by the word for it near its beginning."""
    if (found := LEVEL.search(text, 0, 100)) is not None:
        name = found[1].lower()
        return "error" if name == "critical" else cast("Level", name)
    return "error" if TROUBLE.match(text) else "info"
