"""Failure kinds of errors and exit statuses.

Errors are matched by the names of their classes and by their messages, so that neither torch nor Ray is
imported. An error that no rule matches has the kind `default` of the caller: `user_code` inside the training
loop, `unknown` elsewhere.
"""

import signal
from dataclasses import dataclass
from typing import Any

from trainer.errors import RunError
from trainer.jobspec import FailureKind
from trainer.processes import OUTSIDE_SIGNALS

MAX_MESSAGE_CHARS = 2_000


@dataclass(frozen=True)
class Rule:
    """Failure kind, and the conditions on errors of this kind, all of which must hold."""

    kind: FailureKind
    classes: tuple[str, ...] = ()
    """Prefixes of qualified class names, of which one of the error's classes has one."""
    words: tuple[str, ...] = ()
    """Lower-case texts, of which the message contains one."""
    about: tuple[str, ...] = ()
    """Further lower-case texts, of which the message contains one."""
    is_consequence: bool = False
    """Whether another worker's failure, which is then the first one, can cause this error."""


NATIVE_ERRORS = ("builtins.RuntimeError", "builtins.OSError")
STORE_ERRORS = ("torch.distributed.DistNetworkError", "torch.distributed.DistStoreError")
COMMUNICATION = (
    "gloo/transport",
    "gloo/rendezvous",
    "nccl error",
    "nccl communicator",
    "worknccl",
    "processgroup",
    "tcpstore",
    "monitoredbarrier",
)
"""Texts of gloo, NCCL and torch.distributed; words such as "peer" or "timeout" also occur in errors of other
network libraries.
"""
TIMED_OUT = ("timed out", "timeout")
CONNECTION_LOST = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "remote process exited",
    "communicator was aborted",
)
LOADER = ("dataloader",)
RULES = (
    Rule(
        "out_of_memory", ("builtins.MemoryError", "torch.OutOfMemoryError", "ray.exceptions.OutOfMemoryError")
    ),
    Rule(
        "out_of_memory",
        NATIVE_ERRORS,
        ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc"),
    ),
    Rule("out_of_memory", NATIVE_ERRORS, ("cublas_status_alloc_failed", "insufficient shared memory")),
    # A peer whose node died: its connection is reset before Ray knows that it is gone.
    Rule("worker_lost", ("syncbn.errors.DesyncError",), CONNECTION_LOST, COMMUNICATION, is_consequence=True),
    Rule("hang", ("syncbn.errors.DesyncError",), is_consequence=True),
    Rule("unknown", ("ray.exceptions.RayTaskError",)),
    Rule("worker_lost", ("ray.",)),
    # A data loader process that the kernel killed most likely ran out of memory.
    Rule(
        "out_of_memory",
        ("builtins.RuntimeError",),
        ("killed by signal: killed", "killed by signal: bus"),
        LOADER,
    ),
    Rule("user_code", ("builtins.RuntimeError",), ("killed by signal",), LOADER),
    Rule("hang", ("builtins.RuntimeError",), ("timed out",), LOADER),
    Rule("unknown", ("builtins.RuntimeError",), ("exited unexpectedly",), LOADER),
    # When a worker has died, Ray destroys the process group of the others from another thread.
    Rule(
        "worker_lost",
        ("builtins.ValueError",),
        ("process group has not been initialized",),
        is_consequence=True,
    ),
    Rule("worker_lost", ("builtins.RuntimeError",), CONNECTION_LOST, COMMUNICATION, is_consequence=True),
    Rule("hang", ("builtins.RuntimeError",), TIMED_OUT, COMMUNICATION, is_consequence=True),
    # The store is a server in the process of worker 0.
    Rule("hang", STORE_ERRORS, TIMED_OUT, is_consequence=True),
    Rule("worker_lost", STORE_ERRORS, is_consequence=True),
    # Errors of node or storage: no space (28), quota (122), I/O (5), stale handle (116), read-only (30).
    Rule(
        "worker_lost", ("builtins.OSError",), tuple(f"[errno {number}]" for number in (28, 122, 5, 116, 30))
    ),
    Rule(
        "worker_lost",
        NATIVE_ERRORS,
        ("uncorrectable ecc error", "fallen off the bus", "no cuda-capable device"),
    ),
)
"""Rules in the order in which they are tried."""

SIGNALS: dict[int, FailureKind] = {
    **dict.fromkeys(OUTSIDE_SIGNALS, "worker_lost"),
    # Raised in the process itself.
    signal.SIGSEGV: "user_code",
    signal.SIGBUS: "user_code",
    signal.SIGFPE: "user_code",
    signal.SIGILL: "user_code",
    signal.SIGSYS: "user_code",
    signal.SIGTRAP: "user_code",
    # Without SIGABRT, which is ambiguous: an assertion in native code, or NCCL's watchdog after a hang.
}
"""Failure kinds of processes that were ended by a signal; other signals are `unknown`."""


def classify(error: BaseException, default: FailureKind = "user_code") -> tuple[FailureKind, bool]:
    """Return an error's failure kind, and whether it can be a consequence.

    A consequence is caused by the failure of another worker.
    """
    if isinstance(error, RunError):
        return error.cause, error.__cause__ is not None and classify(error.__cause__)[1]
    classes, text = _classes(error), message(error).lower()
    for rule in RULES:
        if (
            (not rule.classes or any(name.startswith(rule.classes) for name in classes))
            and (not rule.words or any(word in text for word in rule.words))
            and (not rule.about or any(word in text for word in rule.about))
        ):
            return rule.kind, rule.is_consequence
    return default, False


def classify_exit(
    status: int, *, out_of_memory: bool = False, orphaned: bool = False, detail: str = ""
) -> FailureKind:
    """Return the failure kind of a worker's process that has ended.

    Args:
        status: exit code, or the negative number of a signal.
        out_of_memory: whether the kernel or Ray reports that it ran out of memory.
        orphaned: whether Ray's raylet ended first, after which its workers end too.
        detail: Ray's message about the end.
    """
    if out_of_memory:
        return "out_of_memory"
    if orphaned or "SIGTERM" in detail:  # Ray's workers exit with a code on SIGTERM
        return "worker_lost"
    return "user_code" if status >= 0 else SIGNALS.get(-status, "unknown")


def message(error: BaseException) -> str:
    """Return an error's message as text that can be stored; never raises."""
    if isinstance(error, SystemExit):
        return f"exit code {printable(error.code)}"
    return printable(error)


def printable(value: Any, limit: int = MAX_MESSAGE_CHARS) -> str:
    """Return a value as text of limited length; never raises.

    Replacement characters stand for what UTF-8 or a database cannot represent.
    """
    try:
        text = str(value)
    except BaseException as error:
        text = f"<{type(value).__name__} that cannot be shown: its __str__ raised {type(error).__name__}>"
    if len(text) > limit:
        text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")


def _classes(error: BaseException) -> list[str]:
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__]
