"""Clients of the HTTP API: `Client` blocks, `AsyncClient` is for asyncio."""

from service.client.client import AsyncClient, Client
from service.client.retry import ApiError

__all__ = ["ApiError", "AsyncClient", "Client"]
