"""Timeout for calls without one, such as those to torch.distributed's store."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar, cast

Result = TypeVar("Result")


def run_with_timeout(seconds: float, function: Callable[[], Result]) -> Result:
    """Call a function in a thread and return its result or raise its error.

    Raises:
        TimeoutError: the function takes longer than `seconds`; its thread continues.
    """
    outcome: queue.SimpleQueue[tuple[Exception | None, Result | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((None, function()))
        except Exception as error:
            outcome.put((error, None))

    threading.Thread(target=run, name="syncbn timeout", daemon=True).start()
    try:
        error, result = outcome.get(timeout=max(seconds, 0))
    except queue.Empty:
        raise TimeoutError(f"not done after {seconds:.1f} s") from None
    if error is not None:
        raise error
    return cast(Result, result)
