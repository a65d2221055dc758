"""The product on containers, brought up once for all tests that need it."""

import pytest

from tests.cluster.compose import PROJECT, ComposeStack


@pytest.fixture(scope="session")
def compose(tmp_path_factory):
    """The product on containers; afterwards nothing of it is left."""
    stack = ComposeStack(tmp_path_factory.mktemp("compose"), "tests/cluster/compose.override.yml")
    stack.down()  # what an interrupted run has left
    try:
        stack.up()
        stack.until_ready()
        yield stack
    finally:
        stack.down()
    assert stack.containers(stopped=True) == []
    for kind in ("volume", "network"):
        names = stack.call(kind, "ls", "--format={{.Name}}").split()
        assert [name for name in names if name.startswith(f"{PROJECT}_")] == []
