"""Service on its own port, whose jobs complete by themselves on fakes of Ray and MLflow."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from service.adapters.webhook_http import WebhookHttp
from service.api.app import make_app
from service.api.server import Server
from service.domain.access import Caller, RateLimit, Token
from service.domain.errors import Conflict
from service.domain.lifecycle import RayStatus, Submission
from service.domain.resources import Resources
from service.settings import Settings
from service.store.tokens import TokenStore
from tests.fakes import FakeMlflow, FakeRay
from trainer.jobspec import LOG_FILE, OUTCOME_FILE, Outcome, attempt_folder

TOKEN = "0123456789abcdef-contract"


@dataclass
class QuickRay(FakeRay):
    """Cluster with room for every job; a job succeeds at the second status request."""

    async def submit(self, submission_id: str, task_file: Path) -> None:
        await super().submit(submission_id, task_file)
        task = self.tasks[submission_id][-1]
        folder = attempt_folder(Path(task.context.folder), task.context.attempt)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOG_FILE).write_text("step 1\nWARNING: the loss grows\n")
        outcome = Outcome(
            state="failed" if task.spec.seed % 2 else "succeeded", reason="as the seed wants it"
        )
        (folder / OUTCOME_FILE).write_text(outcome.model_dump_json())

    async def find(self, submission_id: str) -> Submission | None:
        found = await super().find(submission_id)
        if found is not None:
            self.set(
                submission_id, RayStatus.SUCCEEDED if found.status == RayStatus.RUNNING else RayStatus.RUNNING
            )
        return found


class Tokens(TokenStore):
    """Tokens that cannot be revoked: after a revocation a walk would only see status 401."""

    async def revoke(self, token_id: str, actor: Caller) -> Token:
        if token_id == actor.token_id:
            raise Conflict(f"token {token_id} is used by the walk")
        return await super().revoke(token_id, actor)


class AcceptingWebhooks(WebhookHttp):
    """Webhook client that accepts all addresses and sends nothing, as generated addresses may be real."""

    async def check(self, url: str) -> None:
        pass

    async def post(self, url: str, body: str, headers: dict[str, str]) -> int:
        return 204


@contextmanager
def running_service(folder: Path) -> Iterator[str]:
    """Run the service in a thread without effective rate limits; yield its URL.

    The token is that of `schemathesis.toml`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings(
        token=TOKEN,
        port=port,
        database_url=f"sqlite+aiosqlite:///{folder}/contract.db",
        storage=folder / "storage",
        secrets_folder=folder / "secrets",
        poll_seconds=0.05,
        outcome_grace_seconds=0,
        max_active_jobs=10_000,
        check_seconds=0,
        rate_per_second=1e6,
        rate_burst=1_000_000,
    )
    app = make_app(settings, QuickRay(total=Resources(cpus=1e9, gpus=1e9)), FakeMlflow())
    server = Server(app, settings)
    ended = threading.Thread(target=lambda: asyncio.run(server.serve()), name="the service")
    try:
        with patch("service.wiring.WebhookHttp", AcceptingWebhooks):
            ended.start()
            while not server.started and ended.is_alive():
                ended.join(0.05)
        assert server.started
        # Many requests have no valid token, since each operation is checked to require one.
        parts = app.state.components
        app.state.components = replace(
            parts, failures=RateLimit(1e6, 1_000_000), tokens=Tokens(parts.database)
        )
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        ended.join(20)
        assert not ended.is_alive()
