"""Client of the checker process, which imports torch.

The service itself never imports torch.
"""

import asyncio
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cachetools import TTLCache

from trainer.jobspec import (
    ImportedModelSpec,
    InvalidField,
    JobSpec,
    LibraryModelSpec,
    ModelSize,
    Norm,
    TorchOptimizerSpec,
    TorchvisionDataSpec,
    shorten,
)

logger = logging.getLogger(__name__)
IDLE_SECONDS = 300.0
"""Time without a check after which the process exits, which frees about 700 MB."""
KNOWN_SECONDS = 600.0
MAX_LINE_BYTES = 1_000_000
MAX_MESSAGE = 1_000
"""Maximum length of a message in characters."""
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS")
"""Environment variables that the process inherits; the service's secrets are not among them."""


@dataclass(frozen=True)
class Connection:
    """Connection to a process that checks specs."""

    requests: asyncio.StreamWriter
    answers: asyncio.StreamReader
    kill: Callable[[], None]
    """Ends the connection, and with it the process."""

    def is_open(self) -> bool:
        """Return whether the process may still answer."""
        return not (self.requests.is_closing() or self.answers.at_eof())


@dataclass(frozen=True)
class Answer:
    """Result of the checks of a spec."""

    error: tuple[str, object, str] | None = None
    """Field, value and message."""
    size: ModelSize | None = None
    """Size of a library model; None for other models."""


def _needs_libraries(spec: JobSpec) -> bool:
    has_arguments = isinstance(spec.optimizer, TorchOptimizerSpec) and bool(spec.optimizer.arguments)
    is_library = isinstance(spec.model, LibraryModelSpec | ImportedModelSpec)
    return has_arguments or is_library or isinstance(spec.data, TorchvisionDataSpec)


def _key(spec: JobSpec) -> str:
    """Return the key of a spec's checks."""
    parts = [part.model_dump_json() for part in (spec.model, spec.data, spec.optimizer)]
    content = " ".join([*parts, str(spec.norm == Norm.NONE)])
    return hashlib.sha256(content.encode()).hexdigest()


class SpecChecker:
    """Client of `python -m trainer.check`, started when needed or at `address`.

    A check takes at most `timeout_seconds`, of which the first ones take several for importing torch. What
    cannot be checked in time, or at all, is left to the workers to find out.
    """

    def __init__(self, timeout_seconds: float, address: tuple[str, int] | None = None) -> None:
        self._timeout_seconds = timeout_seconds
        self._address = address
        self._turn = asyncio.Lock()
        self._connection: Connection | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._end: asyncio.TimerHandle | None = None
        self._known: TTLCache[str, Answer] = TTLCache(1_000, KNOWN_SECONDS)

    async def check(self, specs: Sequence[JobSpec]) -> list[ModelSize | None]:
        """Return the sizes of library models; None for others and unmeasured ones.

        Raises InvalidField if one of the specs names something that does not exist, or does not take its
        arguments.
        """
        if not self._timeout_seconds:
            return [None] * len(specs)
        wanted = {_key(spec): spec for spec in specs if _needs_libraries(spec)}
        try:
            async with asyncio.timeout(self._timeout_seconds):
                for key, spec in wanted.items():
                    if key not in self._known:
                        async with self._turn:
                            self._known[key] = (
                                Answer()
                            )  # if it is not checked in time, not again either, for a while
                            self._known[key] = await self._ask(spec)
                    if (error := self._known.get(key, Answer()).error) is not None:
                        raise InvalidField(*error)
        except (TimeoutError, OSError, ValueError) as error:
            logger.warning("a spec was not checked: %s", error or type(error).__name__)
        return [self._known.get(_key(spec), Answer()).size for spec in specs]

    async def _ask(self, spec: JobSpec) -> Answer:
        connection = await self._connected()
        is_answered = False
        try:
            connection.requests.write(spec.model_dump_json().encode() + b"\n")
            await connection.requests.drain()
            line = await connection.answers.readline()
            is_answered = line.endswith(b"\n")
        finally:
            if not is_answered:  # it is busy with this spec, or has ended: the next one gets a new process
                await self.close()
        if not is_answered:
            raise OSError("the process that checks specs ended")
        found = json.loads(line)
        error, size = found["error"], found["size"]
        return Answer(
            error
            and (f"spec.{error['field']}", shorten(error["value"]), str(error["message"])[:MAX_MESSAGE]),
            size and ModelSize(**size),
        )

    async def _connected(self) -> Connection:
        if self._connection is None or not self._connection.is_open():
            await self.close()
            self._connection = await (self._start() if self._address is None else _connect(*self._address))
        if self._end is not None:
            self._end.cancel()
        self._end = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._connection.kill)
        return self._connection

    async def _start(self) -> Connection:
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "trainer.check",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            limit=MAX_LINE_BYTES,
        )
        assert process.stdin is not None
        assert process.stdout is not None

        def kill() -> None:
            with suppress(ProcessLookupError):
                process.kill()

        return Connection(process.stdin, process.stdout, kill)

    async def close(self) -> None:
        """End the connection and the process."""
        if self._end is not None:
            self._end.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.kill()
        process, self._process = self._process, None
        if process is not None:
            await process.wait()


async def _connect(host: str, port: int) -> Connection:
    reader, writer = await asyncio.open_connection(host, port, limit=MAX_LINE_BYTES)
    return Connection(writer, reader, writer.transport.abort)
