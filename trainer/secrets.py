"""Secrets of a job, which each worker reads into its environment.

The credentials of the cluster and of the service are removed from this environment, which user code can read.
"""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from trainer.errors import ConfigurationError

HIDDEN = re.compile(
    r"RAY_AUTH_.*|SYNCBN_(?!TIMEOUT_SECONDS$).*"
    r"|MLFLOW_TRACKING_(USERNAME|PASSWORD|TOKEN)|PG(PASSWORD|PASSFILE)"
)
"""Variables with credentials, or with their locations, that do not belong to the job. Ray has read its own
before a worker trains.
"""


def hide_credentials() -> None:
    """Remove credentials of the cluster and the service from the environment."""
    for variable in list(os.environ):
        if HIDDEN.fullmatch(variable):
            del os.environ[variable]


def set_variables(secrets: Mapping[str, str]) -> None:
    """Set environment variables to the contents of files without the final newline.

    Neither errors nor output contain a value. Raises ConfigurationError, with the variable, if a file cannot
    be read or is a link out of its folder.
    """
    for variable, name in secrets.items():
        path = Path(name)
        try:
            if not path.resolve().is_relative_to(path.parent.resolve()):
                raise ConfigurationError(
                    f"secrets.{variable}", name, "must be a file inside its folder, not a link out of it"
                )
            if path.stat().st_mode & stat.S_IROTH:
                print(f"warning: all users of this node can read the secret {name}", flush=True)
            os.environ[variable] = path.read_text().rstrip("\r\n")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL character
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            rule = f"must be a file that this node can read: {reason}"
            raise ConfigurationError(f"secrets.{variable}", name, rule) from None
