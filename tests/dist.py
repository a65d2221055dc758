"""Runner of functions on several gloo ranks of this machine.

Ranks are started once and reused by all tests. Each call creates a new default process group, so that no
state of the previous call remains. Ranks that do not answer are killed, and the next call starts new ones, as
forks of a process that has imported torch and done nothing else.
"""

import atexit
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
PRELOADED = ["trainer.worker"]
"""Modules preloaded in the fork server, torch among them."""
START_SECONDS = 120.0
"""Time limit for starting ranks; the time limit of a call begins afterwards."""


def run_on_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 60.0
) -> list[Any]:
    """Call a function on each of `world_size` ranks and return the results in the order of the ranks.

    Args:
        function: picklable function, called as function(*arguments) with torch.distributed initialised, one
            thread, warnings as errors, and torch's generator seeded equally on every rank. Returns a
            picklable result.
        world_size: number of ranks.
        arguments: equal on every rank; torch.distributed.get_rank() distinguishes ranks.
        timeout_seconds: time limit of the whole call, and of each collective in it.

    Raises:
        The error of a rank that died, or else of the rank that failed first, with its traceback as a note.
        TimeoutError: ranks did not answer in time, although none failed.
    """
    return _POOL.run(function, world_size, arguments, timeout_seconds)


@dataclass
class Reply:
    """Reply of a rank: a result, or an error and its time."""

    result: Any = None
    error: BaseException | None = None
    seconds: float = field(default_factory=time.monotonic)
    has_group: bool = True
    """Whether the rank was in the process group when it failed."""


@dataclass(frozen=True)
class Rank:
    """Process of a rank and the parent's end of its pipe."""

    process: BaseProcess
    channel: connection.Connection


class Pool:
    """Ranks that are started on demand and kept until `close`."""

    def __init__(self, outcome_grace_seconds: float = 5.0, **environment: str) -> None:
        """Create an empty pool.

        `outcome_grace_seconds` limits the wait for replies after the first failure or the time limit;
        `environment` holds additional variables of the ranks.
        """
        self._outcome_grace_seconds = outcome_grace_seconds
        self._environment = ENVIRONMENT | environment
        self._ranks: list[Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._calls = 0

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        arguments: tuple[Any, ...],
        timeout_seconds: float,
    ) -> list[Any]:
        """See `run_on_ranks`.

        Ranks that cannot form a process group are replaced once: it was seen that from some moment on, in
        each call, every rank waited for the address of another one until the time limit.
        """
        replies = self._call(function, world_size, arguments, timeout_seconds)
        if any(not reply.has_group for reply in replies.values()):
            self.close()
            replies = self._call(function, world_size, arguments, timeout_seconds)
        return self._results(replies, world_size, timeout_seconds)

    def _call(
        self,
        function: Callable[..., Any],
        world_size: int,
        arguments: tuple[Any, ...],
        timeout_seconds: float,
    ) -> dict[int, Reply]:
        try:
            self._start(world_size)
            request = pickle.dumps((function, arguments, world_size, self._new_store(), timeout_seconds))
            for rank in self._ranks[:world_size]:
                rank.channel.send_bytes(request)
            return self._collect(world_size, time.monotonic() + timeout_seconds + self._outcome_grace_seconds)
        except BaseException:
            self.close()  # ranks may be in the middle of a call
            raise

    @staticmethod
    def _results(replies: dict[int, Reply], world_size: int, timeout_seconds: float) -> list[Any]:
        failures = [reply for reply in replies.values() if reply.error is not None]
        if failures:
            # A rank died before the others noticed, even if its death is detected after their errors.
            raise min(
                failures, key=lambda reply: (not isinstance(reply.error, EOFError), reply.seconds)
            ).error
        silent = [rank for rank in range(world_size) if rank not in replies]
        if silent:
            raise TimeoutError(
                f"ranks {silent} of {world_size} did not answer within {timeout_seconds} seconds"
            )
        return [replies[rank].result for rank in range(world_size)]

    def close(self) -> None:
        """Stop all ranks: close their pipes, then kill those that remain."""
        for rank in self._ranks:
            rank.channel.close()
        deadline = time.monotonic() + 1
        for rank in self._ranks:
            rank.process.join(max(0, deadline - time.monotonic()))
            rank.process.kill()
            rank.process.join()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _new_store(self) -> Path:
        """Return a new rendezvous file for the ranks of one call."""
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="ranks-")
        self._calls += 1
        return Path(self._folder.name, f"store-{self._calls}")

    def _start(self, world_size: int) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        new = range(len(self._ranks), world_size)
        for number in new:
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(number, there, self._environment),
                name=f"rank {number}",
                daemon=True,
            )
            process.start()
            there.close()  # otherwise the pipe would survive the process
            self._ranks.append(Rank(process, here))
        for number in new:
            if not self._ranks[number].channel.poll(START_SECONDS):
                raise TimeoutError(f"rank {number} did not start within {START_SECONDS} seconds")
            self._ranks[number].channel.recv_bytes()

    def _collect(self, world_size: int, deadline: float) -> dict[int, Reply]:
        """Collect replies until all have arrived or the deadline, which the first failure shortens."""
        replies: dict[int, Reply] = {}
        while len(replies) < world_size:
            waiting = {
                self._ranks[number].channel: number for number in range(world_size) if number not in replies
            }
            ready = connection.wait(list(waiting), max(0, deadline - time.monotonic()))
            if not ready:
                break
            for number in (waiting[channel] for channel in ready):
                replies[number] = self._receive(number)
                if replies[number].error is not None:
                    deadline = min(deadline, replies[number].seconds + self._outcome_grace_seconds)
        if len(replies) < world_size or any(isinstance(reply.error, EOFError) for reply in replies.values()):
            self.close()
        return replies

    def _receive(self, number: int) -> Reply:
        try:
            return pickle.loads(self._ranks[number].channel.recv_bytes())
        except (EOFError, ConnectionError):
            self._ranks[number].process.join()
            return Reply(
                error=EOFError(f"rank {number} died, exit code {self._ranks[number].process.exitcode}")
            )


def _serve(number: int, channel: connection.Connection, environment: dict[str, str]) -> None:
    """Serve requests until the parent closes the pipe or exits."""
    os.environ.update(environment)
    dist.set_debug_level_from_env()  # torch read it at import
    torch.set_num_threads(1)
    channel.send_bytes(b"ready")
    while True:
        try:
            request = channel.recv_bytes()
        except EOFError:
            _leave()
            return
        reply = _answer(number, request)
        channel.send_bytes(reply)


def _answer(number: int, request: bytes) -> bytes:
    _leave()  # all ranks are done with the group; an earlier exit could fail a slower rank
    has_group = False
    try:
        function, arguments, world_size, store, timeout_seconds = pickle.loads(request)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=number,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_seconds),
            )
            has_group = True
            return pickle.dumps(Reply(result=function(*arguments)))
    except BaseException as error:
        failure = _failure(number, error, has_group)
    _leave()  # immediately, so that ranks which wait for this one fail too
    return failure


def _failure(number: int, error: BaseException, has_group: bool) -> bytes:
    note = f"on rank {number}:\n{traceback.format_exc()}"
    error.add_note(note)
    reply = Reply(error=error, has_group=has_group)
    try:
        pickle.loads(pickle.dumps(reply))
    except Exception:  # at least the message of an error that cannot be pickled
        reply.error = RuntimeError(note)
    return pickle.dumps(reply)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


_POOL = Pool()
atexit.register(_POOL.close)
