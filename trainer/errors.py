"""Errors that end a run before its last step.

RunError                       the message is the reason, for the user
├── ConfigurationError         also an InvalidField: field of the specification, value and rule
├── DataError                  also an InvalidField
│   └── CorruptImage
├── DataTimeoutError           data did not arrive within its time limit
├── StorageError               files of the run, such as checkpoints, cannot be read or written
├── ExportError                training is complete, but its model cannot be written
├── Diverged                   a loss or metric is not finite
└── Preempted                  a node will be taken away, or the job paused; the run is saved
"""

from trainer.jobspec import FailureKind, InvalidField


class RunError(Exception):
    """End of a run for a reason that its user can read: the message."""

    cause: FailureKind


class ConfigurationError(RunError, InvalidField):
    """Specification of something that does not exist or is inconsistent."""

    cause = "configuration"


class DataError(RunError, InvalidField):
    """Data that is missing, damaged or different from its specification."""

    cause = "data"


class CorruptImage(DataError):  # noqa: N818
    """Image that exists but cannot be decoded, as handled by `corrupt_images: skip`.

    `value` is its name.
    """


class DataTimeoutError(RunError):
    """Data that did not arrive in time; the next attempt may receive it."""

    cause = "hang"


class StorageError(RunError):
    """Failure of the storage of a run's files, such as checkpoints.

    It counts as a failure of the cluster, which another attempt may not meet.
    """

    cause = "worker_lost"


class ExportError(RunError):
    """Failure to write the model after complete training.

    Another attempt exports it from the last checkpoint.
    """

    cause = "export"

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"training is complete ({step} steps), but its model could not be written: {what}")


class Diverged(RunError):  # noqa: N818
    """Loss or metric that is not finite on some worker.

    It is a result, and raised on every worker at the same step.
    """

    cause = "diverged"

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"diverged at step {step}: {what}")
        self.step, self.what = step, what

    def __reduce__(self) -> tuple[type["Diverged"], tuple[int, str]]:
        return Diverged, (self.step, self.what)


class Preempted(RunError):  # noqa: N818
    """Imminent preemption of a worker's node or of the job, after a checkpoint."""

    cause = "preempted"

    def __init__(self, step: int, why: str = "a node is about to be preempted") -> None:
        super().__init__(f"{why}; saved after {step} steps")
        self.step, self.why = step, why

    def __reduce__(self) -> tuple[type["Preempted"], tuple[int, str]]:
        return Preempted, (self.step, self.why)
