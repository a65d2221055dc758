import json
import logging

import pytest

from service import logging as service_log


@pytest.fixture(autouse=True)
def as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_have_the_current_job(capsys):
    service_log.configure("json")
    logger = logging.getLogger("service.engine.dispatcher")
    service_log.current_job_id.set("job-1")
    logger.warning("it waits: %s", "Ray is away")
    logger.info("another", extra={"job_id": "job-2"})
    service_log.current_job_id.set(None)
    try:
        raise ValueError("ours")
    except ValueError:
        logger.exception("a mistake")
    first, second, third = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["logger"]) == ("WARNING", "service.engine.dispatcher")
    assert (first["message"], first["job_id"]) == ("it waits: Ray is away", "job-1")
    assert second["job_id"] == "job-2"
    assert "job_id" not in third
    assert "ValueError: ours" in third["exc_info"]


def test_text(capsys):
    service_log.configure("text")
    logging.getLogger("service").info("hello")
    assert capsys.readouterr().err.endswith("INFO service: hello\n")
