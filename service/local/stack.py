"""Embedded stack: Ray, MLflow and the API on this machine."""

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

import httpx

from service.local import processes
from service.local.host import (
    RAY_SUBFOLDER,
    choose_ports,
    is_free,
    keep_secret,
    short_folder,
    tail,
)
from service.local.supervisor import Plan, SupervisorHandle
from trainer.atomic import atomic_write
from trainer.processes import STOP_SIGNALS

REQUIRED_PACKAGES = ("fastapi", "mlflow", "ray", "torch", "torchvision", "uvicorn")
START_ATTEMPTS = 3
MIN_FREE_BYTES = 100_000_000
POLL_SECONDS = 0.1
PORT_TAKEN_WORDS = (
    "already in use",
    "Failed to bind to",
)  # uvicorn's and Ray's; Ray may go on without its dashboard


class StackError(Exception):
    """The stack cannot start, or does not run."""


class PortTakenError(StackError):
    """A chosen port was taken before the process could listen on it."""


@dataclass(frozen=True)
class Connection:
    """Address and token of a running stack."""

    url: str
    token: str
    mlflow_url: str
    ray_address: str


def read_connection(data_dir: Path) -> Connection:
    """Return the connection of the stack that runs in a data folder.

    Raises StackError.
    """
    try:
        return Connection(**json.loads((data_dir / "connection.json").read_text()))
    except FileNotFoundError:
        raise StackError(
            f"no stack runs on {data_dir}; `syncbn up --data-dir {data_dir}` starts one"
        ) from None


class LocalStack:
    """Embedded stack; a context manager from `start` to `stop`.

    Whatever happens to this process or to a part, all processes of the stack end within 15 seconds.
    Without `api`, Ray and MLflow run alone, and `api_environment` is what `syncbn serve` needs to join them.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        cpus: int | None = None,
        api: bool = True,
        start_timeout_seconds: float = 120,
    ) -> None:
        self.data_dir = data_dir.resolve()
        self.ready_seconds: dict[str, float] = {}
        self._port = port
        self._cpus = cpus or os.cpu_count() or 1
        self._api = api
        self._start_timeout_seconds = start_timeout_seconds
        self._lock: int | None = None
        self._layout: processes.Layout | None = None
        self._supervisor: SupervisorHandle | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def connection(self) -> Connection:
        """Connection of this stack."""
        layout = self._running()
        return Connection(layout.api_url, layout.api_token, layout.mlflow_public_url, layout.ray_url)

    @property
    def mlflow(self) -> tuple[str, str]:
        """Address and secret of the MLflow server."""
        layout = self._running()
        return layout.mlflow_url, layout.mlflow_secret

    @property
    def api_environment(self) -> dict[str, str]:
        """Environment for `syncbn serve` in this stack."""
        return processes.api_environment(self._running())

    @property
    def process_ids(self) -> dict[str, int]:
        """Process id of each part."""
        return dict(self._supervisor.process_ids) if self._supervisor else {}

    def start(self) -> None:
        """Start all processes and return when all answer.

        Raises StackError, with nothing left running.
        """
        if missing := [name for name in REQUIRED_PACKAGES if find_spec(name) is None]:
            raise StackError(f"not installed: {', '.join(missing)}; pip install 'syncbn[service,trainer]'")
        self._take_data_dir()
        try:
            for attempt in range(1, START_ATTEMPTS + 1):
                try:
                    self._start_parts()
                    self._wait_until_ready()
                    break
                except PortTakenError:
                    if attempt == START_ATTEMPTS:
                        raise
                    self._stop_parts()
            atomic_write(
                self.data_dir / "connection.json", json.dumps(asdict(self.connection), indent=2) + "\n"
            )
        except BaseException:
            self.stop()
            raise

    def wait(self, timeout_seconds: float | None = None) -> str | None:
        """Wait for the end and return its reason.

        None after the timeout or a requested stop.
        """
        if (
            self._supervisor is None
            or not self._supervisor.ended.wait(timeout_seconds)
            or self._supervisor.reason is None
        ):
            return None
        log = self._running().log(self._supervisor.dead_process or "supervisor")
        return f"{self._supervisor.reason}; the end of {log}:\n{tail(log)}"

    def stop(self) -> None:
        """Stop all processes and return when none is left; no effect if nothing runs."""
        self._stop_parts()
        if self._lock is not None:
            (self.data_dir / "connection.json").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _running(self) -> processes.Layout:
        if self._layout is None:
            raise StackError("the stack has not been started")
        return self._layout

    def _take_data_dir(self) -> None:
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.data_dir.chmod(
            0o700
        )  # also one that was made by hand, or by an earlier version: it holds tokens and logs
        if (free := shutil.disk_usage(self.data_dir).free) < MIN_FREE_BYTES:
            raise StackError(
                f"{self.data_dir}: its disk must have {MIN_FREE_BYTES // 10**6} MB free (got "
                f"{free / 10**6:.1f} MB); "
                "make room, or choose another folder by --data-dir"
            )
        for name in ("logs", "storage", "mlflow-artifacts"):
            (self.data_dir / name).mkdir(exist_ok=True)
        lock = os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            where = self.data_dir / "connection.json"
            raise StackError(
                f"another stack runs on {self.data_dir} (see {where}), or is still stopping"
            ) from None
        self._lock = lock
        (self.data_dir / "connection.json").unlink(missing_ok=True)

    def _start_parts(self) -> None:
        assert self._lock is not None
        free = choose_ports(4)
        if self._port is not None and not is_free(self._port):
            raise StackError(f"port {self._port} is taken; choose another, or none to get a free one")
        temporary = short_folder(self.data_dir)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a crash of the machine
        temporary.mkdir(mode=0o700)
        (temporary / RAY_SUBFOLDER).mkdir()
        self._layout = layout = processes.Layout(
            data_dir=self.data_dir,
            ray_dir=temporary / RAY_SUBFOLDER,
            ray_token_path=self.data_dir / "ray-token",
            api_token=keep_secret(self.data_dir / "token"),
            mlflow_secret=keep_secret(self.data_dir / "mlflow-secret"),
            cpus=self._cpus,
            api_port=self._port or free[0],
            mlflow_port=free[1],
            ray_port=free[2],
            ray_client_port=free[3],
        )
        keep_secret(layout.ray_token_path)
        started = [processes.mlflow_server(layout), processes.ray_head(layout)]
        if self._api:
            started.append(processes.api_server(layout))
        for log in (self.data_dir / "logs").glob("*.log"):
            log.replace(log.with_suffix(".log.1"))
        plan = Plan(
            processes=started,
            directory=str(self.data_dir),
            remove=[str(self.data_dir / "connection.json"), str(temporary)],
        )
        # The supervisor shares the lock: the data folder is free again when the last process has ended,
        # however this one ends.
        self._supervisor = SupervisorHandle(plan, log=layout.log("supervisor"), pass_fds=[self._lock])

    def _wait_until_ready(self) -> None:
        assert self._supervisor is not None
        begin = time.monotonic()
        with httpx.Client(timeout=processes.PROBE_TIMEOUT_SECONDS, trust_env=False) as client:
            waiting = processes.probes(self._running(), client)
            if not self._api:
                del waiting["api"]
            names = set(waiting)
            # A process can answer before its supervisor has reported its id.
            while waiting or not names <= self._supervisor.process_ids.keys():
                for name, is_ready in list(waiting.items()):
                    with suppress(httpx.HTTPError):
                        if is_ready():
                            del waiting[name]
                            self.ready_seconds[name] = time.monotonic() - begin
                reason = self.wait(POLL_SECONDS)
                for name in self._supervisor.process_ids:
                    end = tail(self._running().log(name))
                    if any(words in end for words in PORT_TAKEN_WORDS):
                        raise PortTakenError(
                            f"{name} found a port taken by somebody else; the end of its log:\n{end}"
                        )
                if reason is not None:
                    raise StackError(reason)
                if time.monotonic() - begin > self._start_timeout_seconds:
                    ends = "\n".join(
                        f"the end of {log}:\n{tail(log)}" for log in map(self._running().log, waiting)
                    )
                    raise StackError(
                        f"not ready after {self._start_timeout_seconds:.0f} s: {', '.join(waiting)}; {ends}"
                    )

    def _stop_parts(self) -> None:
        if self._supervisor is not None:
            self._supervisor.stop()


def run_until_stopped(stack: LocalStack, on_ready: Callable[[Connection], None]) -> str | None:
    """Run the stack until a signal (returns None) or a failure (returns its reason).

    The signals are SIGINT, SIGTERM and SIGHUP; a failure is the end of a part.
    """
    with first_signal_interrupts():
        try:
            with stack:
                on_ready(stack.connection)
                return stack.wait()
        except KeyboardInterrupt:
            return None
        finally:
            stack.stop()


@contextmanager
def first_signal_interrupts() -> Iterator[None]:
    """Convert the first stop signal to a KeyboardInterrupt and ignore the rest.

    Stopping takes seconds and must not be interrupted.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    # What the caller ignores (`nohup`) stays ignored.
    before = {
        number: signal.getsignal(number)
        for number in STOP_SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
