"""API on its own port, in this process or another one."""

import asyncio
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager

import httpx

from service.api.app import make_app
from service.api.server import Server
from service.local.host import choose_ports
from service.settings import Settings
from tests.fakes import FakeMlflow, FakeRay

TOKEN = "0123456789abcdef-test"


def settings_for(folder, **changes):
    (port,) = choose_ports(1)
    database_url = f"sqlite+aiosqlite:///{folder}/test.db"
    return Settings(token=TOKEN, port=port, database_url=database_url, storage=folder / "storage", **changes)


@asynccontextmanager
async def serving(folder, **changes):
    """Run the API in this process; yield its port."""
    settings = settings_for(folder, **changes)
    server = Server(make_app(settings, FakeRay(), FakeMlflow()), settings)
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(30):
        while not server.started:
            await asyncio.sleep(0.05)
    yield settings.port
    server.should_exit = True
    async with asyncio.timeout(30):
        await task


@contextmanager
def serving_elsewhere(folder):
    """Run the API in another process with fakes of Ray and MLflow; yield its URL."""
    (port,) = choose_ports(1)
    command = [sys.executable, "-m", "tests.service.api.serving", str(folder), str(port)]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            try:
                httpx.get(f"{url}/livez", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def main(folder, port):
    settings = Settings(
        token=TOKEN,
        port=port,
        database_url=f"sqlite+aiosqlite:///{folder}/test.db",
        storage=f"{folder}/storage",
        check_seconds=0,
        rate_per_second=100_000,
        rate_burst=100_000,
    )
    Server(make_app(settings, FakeRay(), FakeMlflow()), settings).run()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
