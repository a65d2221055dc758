"""Background tasks, and the exit of the process after one of them has failed."""

import asyncio
import os
import subprocess
import sys

import pytest

from service.engine.background import Background
from service.local.host import choose_ports

SERVE = """
import service.api.server
from service.cli.app import app
from service.engine import dispatcher, webhook_sender

async def fail(self):
    raise ZeroDivisionError("an internal error")

{fault}
service.api.server.CHECKS_UNTIL_FAILURE = 3
app(["serve"])
"""


async def test_a_failed_task_does_not_keep_others_from_stopping():
    background, ended = Background(), []

    async def fail():
        raise ZeroDivisionError

    async def run_until_cancelled(name):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    background.start("first", run_until_cancelled("first"))
    failing = background.start("failing", fail())
    background.start("last", run_until_cancelled("last"))
    await asyncio.wait([failing])
    assert background.ended() == ["failing"]
    await background.close()
    assert ended == ["first", "last"]


@pytest.mark.parametrize(
    "fault",
    [
        "webhook_sender.WebhookSender.run = fail",
        "dispatcher.STUCK_SECONDS = 0.5; dispatcher.Dispatcher.tick = fail",
    ],
)
def test_a_failed_background_task_exits_the_service_with_1(tmp_path, fault):
    settings = {
        "SYNCBN_TOKEN": "0123456789abcdef-test",
        "SYNCBN_PORT": str(choose_ports(1)[0]),
        "SYNCBN_DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/test.db",
        "SYNCBN_STORAGE": str(tmp_path / "storage"),
    }
    done = subprocess.run(
        [sys.executable, "-c", SERVE.format(fault=fault)],
        env=os.environ | settings, capture_output=True, text=True, timeout=40,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("service failed; exiting with status 1") == 1, done.stderr
