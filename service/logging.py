"""Logging of the service: text or JSON, with the current job."""

import logging
from contextvars import ContextVar
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

LogFormat = Literal["text", "json"]
current_job_id: ContextVar[str | None] = ContextVar("current_job_id", default=None)
"""Id of the job that the current task works on."""


def configure(form: LogFormat) -> None:
    """Configure logging to standard error."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_job)
    if form == "json":
        names = {"asctime": "time", "levelname": "level", "name": "logger"}
        handler.setFormatter(
            JsonFormatter("{asctime}{levelname}{name}{message}", style="{", rename_fields=names)
        )
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _add_job(record: logging.LogRecord) -> bool:
    job_id = getattr(record, "job_id", None) or current_job_id.get()
    if job_id is not None:
        record.job_id = job_id
    return True
