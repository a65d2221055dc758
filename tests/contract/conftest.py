"""OpenAPI document of the application."""

import pytest

from service.api.app import make_app
from service.settings import Settings


@pytest.fixture(scope="session")
def document():
    return make_app(Settings()).openapi()
