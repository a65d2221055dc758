"""Fixtures of the tests of clients."""

import pytest

from tests.service.client.faulty_network import Asynchronous, Waiting


@pytest.fixture(params=[Waiting, Asynchronous])
def by(request):
    return request.param()
