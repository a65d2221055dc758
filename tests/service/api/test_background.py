"""Tasks beside the requests, and how the process ends once one of them has."""

import asyncio
import os
import subprocess
import sys

import pytest

from service.api.background import Background
from service.local.host import choose_ports

SERVE = """
import service.api.server
from service.cli.app import app
from service.engine import dispatcher, webhook_sender

async def fail(self):
    raise ZeroDivisionError("a mistake of ours")

{trouble}
service.api.server.LOOKS = 3
app(["serve"])
"""


async def test_one_that_has_failed_keeps_none_of_the_others_from_their_end():
    background, ended = Background(), []

    async def fail():
        raise ZeroDivisionError

    async def go_on(name):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    background.start("first", go_on("first"))
    failing = background.start("failing", fail())
    background.start("last", go_on("last"))
    await asyncio.wait([failing])
    assert background.ended() == ["failing"]
    await background.close()
    assert ended == ["first", "last"]


@pytest.mark.parametrize(
    "trouble",
    ["webhook_sender.WebhookSender.run = fail", "dispatcher.STUCK_SECONDS = 0.5; dispatcher.Dispatcher.round = fail"],
)
def test_a_service_that_goes_on_no_more_ends_to_be_started_anew(tmp_path, trouble):
    settings = {
        "SYNCBN_TOKEN": "0123456789abcdef-test",
        "SYNCBN_PORT": str(choose_ports(1)[0]),
        "SYNCBN_DATABASE_URL": f"sqlite+aiosqlite:///{tmp_path}/test.db",
        "SYNCBN_STORAGE": str(tmp_path / "storage"),
    }
    done = subprocess.run(
        [sys.executable, "-c", SERVE.format(trouble=trouble)],
        env=os.environ | settings, capture_output=True, text=True, timeout=40,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("service failed; exiting with status 1") == 1, done.stderr
