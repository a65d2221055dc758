"""Reading of logs for tests."""

from service.adapters.job_log import AttemptLog, LogOffset
from trainer.jobspec import (
    Outcome,
)

SECRET = "the admin's token"


GOOD = Outcome(state="succeeded", reason=SECRET).model_dump_json()


def read_log(folder):
    log = AttemptLog(folder, LogOffset())
    return [line.text for line in [*log.read(), *log.read(is_over=True), *log.unfinished()]]
