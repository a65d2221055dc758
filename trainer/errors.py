"""Errors of a run. RunError -> Diverged."""


class RunError(Exception):
    """A run ended for a reason that its user can read; the message is that reason."""


class Diverged(RunError):  # noqa: N818 - the state's name
    """The loss of some step was not finite on some worker."""
