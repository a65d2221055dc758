"""A job's secrets: read on each worker, just before it trains, into its own environment and nowhere else."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from trainer.errors import ConfigurationError


def set_variables(secrets: Mapping[str, str]) -> None:
    """Set environment variables to what files hold, without the line's end; neither errors nor output tell a value.

    Raises ConfigurationError naming the variable whose file cannot be read, or leads out of its folder.
    """
    for variable, name in secrets.items():
        path = Path(name)
        try:
            if not path.resolve().is_relative_to(path.parent.resolve()):
                raise ConfigurationError(f"secrets.{variable}", name, "takes a file that is no link out of its folder")
            if path.stat().st_mode & stat.S_IROTH:
                print(f"warning: every user of this node can read the secret {name}", flush=True)
            os.environ[variable] = path.read_text().rstrip("\r\n")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL character, which no variable can hold
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            takes = f"its file cannot be read on this node: {reason}"
            raise ConfigurationError(f"secrets.{variable}", name, takes) from None
