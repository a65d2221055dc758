"""Errors that end a run before its last step.

RunError                       its message is the reason, for the user to read
├── InvalidInput               a field of the spec, or what it points to, cannot be used
│   ├── ConfigurationError
│   └── DataError
│       └── CorruptImage
├── DataTimeoutError           data did not arrive within its time limit
├── StorageError               files of the run, such as checkpoints, cannot be written or read
├── ExportError                training is complete, but its model cannot be written
├── Diverged
└── Preempted
"""

from trainer.jobspec import Cause


class RunError(Exception):
    """A run ended for a reason that its user can read; the message is that reason."""

    cause: Cause


class InvalidInput(RunError):  # noqa: N818 - names say what is the case
    """A field of the spec, or what it points to, cannot be used: names field, value and what is taken."""

    def __init__(self, field: str, value: object, takes: str) -> None:
        super().__init__(f"{field}: {takes} (got {value!r})")
        self.field, self.value, self.takes = field, value, takes

    def __reduce__(self) -> tuple[type["InvalidInput"], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.takes)


class ConfigurationError(InvalidInput):
    """The spec asks for something that does not exist or does not fit together."""

    cause = "configuration"


class DataError(InvalidInput):
    """Data is missing, broken or not as the spec describes it."""

    cause = "data"


class CorruptImage(DataError):  # noqa: N818
    """An image is there, but cannot be decoded: the one thing that `corrupt_images: skip` is for; `value` names it."""


class DataTimeoutError(RunError):
    """Data did not arrive within its time limit; the next attempt may receive it."""

    cause = "hang"


class StorageError(RunError):
    """The storage of a run's files, such as checkpoints, fails: an error of the cluster that another attempt may not meet."""

    cause = "worker_lost"


class ExportError(RunError):
    """Training is complete, but its model cannot be written; another attempt exports it from the last checkpoint."""

    cause = "export"

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"training is complete ({step} steps), but its model could not be written: {what}")


class Diverged(RunError):  # noqa: N818
    """The loss of some step was not finite on some worker; a result, and raised on every worker at the same step."""

    cause = "diverged"

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"diverged at step {step}: {what}")
        self.step, self.what = step, what

    def __reduce__(self) -> tuple[type["Diverged"], tuple[int, str]]:
        return Diverged, (self.step, self.what)


class Preempted(RunError):  # noqa: N818
    """A worker's node is about to go; everything up to `step` is saved."""

    cause = "preempted"

    def __init__(self, step: int) -> None:
        super().__init__(f"a node is about to go; saved after {step} steps")
        self.step = step

    def __reduce__(self) -> tuple[type["Preempted"], tuple[int]]:
        return Preempted, (self.step,)
