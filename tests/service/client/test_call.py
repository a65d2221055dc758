import pytest

from service.client.retry import ApiError


def test_ids_are_escaped_in_paths(network, by):
    with pytest.raises(ApiError):
        by.call(network.url, lambda client: client.job("../tokens?x=#"))
    assert network.seen[0][0] == "GET /v1/jobs/..%2Ftokens%3Fx%3D%23"
