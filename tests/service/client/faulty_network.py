"""Calls by the synchronous and the asynchronous client."""

import asyncio

from service.client import AsyncClient, Client
from service.client.retry import RetryPolicy
from tests.service.running_api import TOKEN

QUICK = RetryPolicy(max_attempts=4, total_seconds=10, first_pause_seconds=0.02)


class Waiting:
    """Calls by the synchronous client."""

    def call(self, url, make, **options):
        with Client(url, TOKEN, **{"retry_policy": QUICK} | options) as client:
            return make(client)

    def collect(self, url, make, **options):
        return self.call(url, lambda client: list(make(client)), **options)


class Asynchronous:
    """The same calls by the asynchronous client."""

    def call(self, url, make, **options):
        async def run():
            async with AsyncClient(url, TOKEN, **{"retry_policy": QUICK} | options) as client:
                return await make(client)

        return asyncio.run(run())

    def collect(self, url, make, **options):
        async def gather(client):
            return [each async for each in make(client)]

        return self.call(url, gather, **options)
