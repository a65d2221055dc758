"""Secrets of a job, read by each worker into its environment.

The credentials of the cluster and of the service leave that environment, which user code reads.
"""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from trainer.errors import ConfigurationError

HIDDEN = re.compile(
    r"RAY_AUTH_.*|SYNCBN_(?!TIMEOUT_SECONDS$).*|MLFLOW_TRACKING_(USERNAME|PASSWORD|TOKEN)|PG(PASSWORD|PASSFILE)"
)
"""Variables with, or pointing to, credentials that are not the job's. Ray has read its own by the time a worker trains."""


def hide_credentials() -> None:
    """Remove the credentials of the cluster and of the service from this process's environment."""
    for variable in list(os.environ):
        if HIDDEN.fullmatch(variable):
            del os.environ[variable]


def set_variables(secrets: Mapping[str, str]) -> None:
    """Set environment variables to what files hold, without the line's end; neither errors nor output contain a value.

    Raises ConfigurationError naming the variable whose file cannot be read, or leads out of its folder.
    """
    for variable, name in secrets.items():
        path = Path(name)
        try:
            if not path.resolve().is_relative_to(path.parent.resolve()):
                raise ConfigurationError(
                    f"secrets.{variable}", name, "must be a file inside its folder, not a link out of it"
                )
            if path.stat().st_mode & stat.S_IROTH:
                print(f"warning: every user of this node can read the secret {name}", flush=True)
            os.environ[variable] = path.read_text().rstrip("\r\n")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL character, which no variable can hold
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            takes = f"its file cannot be read on this node: {reason}"
            raise ConfigurationError(f"secrets.{variable}", name, takes) from None
