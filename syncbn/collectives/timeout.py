"""A time limit on calls that have none: those to the store, whose host may have stopped, and what waits for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar, cast

Result = TypeVar("Result")


def run_with_timeout(seconds: float, function: Callable[[], Result]) -> Result:
    """Return what a function returns, or raise what it raises; it goes on in its thread if that takes longer.

    Raises:
        TimeoutError: it is not done yet.
    """
    outcome: queue.SimpleQueue[tuple[Exception | None, Result | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((None, function()))
        except Exception as error:
            outcome.put((error, None))

    threading.Thread(target=run, name="syncbn within a time limit", daemon=True).start()
    try:
        error, result = outcome.get(timeout=max(seconds, 0))
    except queue.Empty:
        raise TimeoutError(f"not done after {seconds:.1f} s") from None
    if error is not None:
        raise error
    return cast(Result, result)
