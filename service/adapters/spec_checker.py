"""Checks of specs in a process that has torch, which the service itself never loads."""

import asyncio
import json
import logging
import os
import sys
from contextlib import suppress

from cachetools import LRUCache

from service.domain.errors import InvalidField
from trainer.spec import ImportedModelSpec, JobSpec, LibraryModelSpec, TorchvisionDataSpec

logger = logging.getLogger(__name__)
IDLE_SECONDS = 300.0
"""After the last check; then the process ends, and frees some 700 MB."""
MAX_LINE_BYTES = 1_000_000
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "OMP_NUM_THREADS")
"""Environment variables that the process gets; the service's secrets are not among them."""

Answer = tuple[str, object, str]


class SpecChecker:
    """Starts `python -m trainer.check` when there is something to check, and asks it about one spec at a time.

    A check takes at most `timeout_seconds`, of which the first ones take several for importing torch. What cannot be checked in
    time, or at all, is left to the workers to find out.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._end: asyncio.TimerHandle | None = None
        self._known: LRUCache[str, Answer | None] = LRUCache(1_000)

    async def check(self, spec: JobSpec) -> None:
        """Raise InvalidField if the spec names something that does not exist, or does not take its arguments."""
        is_library = isinstance(spec.model, LibraryModelSpec | ImportedModelSpec)
        if not self._timeout_seconds or not (is_library or isinstance(spec.data, TorchvisionDataSpec)):
            return
        key = f"{spec.model.model_dump_json()} {spec.data.model_dump_json()}"
        if key not in self._known:
            try:
                async with asyncio.timeout(self._timeout_seconds), self._turn:
                    answer = await self._ask(spec)
            except (TimeoutError, OSError, ValueError) as error:
                logger.warning("a spec was not checked: %s", error or type(error).__name__)
                return
            self._known[key] = answer
        if (found := self._known[key]) is not None:
            field, value, message = found
            raise InvalidField(f"spec.{field}", value, message)

    async def _ask(self, spec: JobSpec) -> Answer | None:
        process = await self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        is_answered = False
        try:
            process.stdin.write(spec.model_dump_json().encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
            is_answered = line.endswith(b"\n")
        finally:
            if not is_answered:  # it is busy with this spec, or has ended: the next one gets a new process
                self._kill()
        if not is_answered:
            raise OSError(f"the process that checks specs ended with status {await process.wait()}")
        found = json.loads(line)
        return None if found is None else (str(found["field"]), found["value"], str(found["message"]))

    async def _started(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "trainer.check",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env=environment,
                limit=MAX_LINE_BYTES,
            )
        if self._end is not None:
            self._end.cancel()
        self._end = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._kill)
        return self._process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if self._end is not None:
            self._end.cancel()
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()

    async def close(self) -> None:
        """End the process."""
        process = self._process
        self._kill()
        if process is not None:
            await process.wait()
