"""Background execution of one function at a time."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


class BackgroundTask:
    """Background task with one daemon thread per function.

    A process that exits does not wait for a function that hangs.
    """

    def __init__(self) -> None:
        self._running: Future[None] | None = None

    def start(self, function: Callable[[], None]) -> None:
        """Run a function in a thread, after `wait` for the one before."""
        assert self._running is None
        future: Future[None] = Future()

        def run() -> None:
            try:
                function()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        self._running = future
        threading.Thread(target=run, name="checkpoint", daemon=True).start()

    @property
    def has_failed(self) -> bool:
        """Whether the function has raised an error so far."""
        return self._running is not None and self._running.done() and self._running.exception() is not None

    def wait(self, timeout_seconds: float) -> None:
        """Wait for the function, if one was started.

        Raises its error, or TimeoutError.
        """
        if self._running is None:
            return
        future, self._running = self._running, None
        future.result(timeout_seconds)
