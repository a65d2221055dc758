"""The API on a port, and a bad network before it."""

import pytest

from service.cli.app import main
from tests.service.cli.bad_network import BadNetwork
from tests.service.cli.running import TOKEN, RunningApi


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """One for all tests of a file."""
    api = RunningApi(tmp_path_factory.mktemp("api"))
    api.start()
    yield api
    api.stop()


@pytest.fixture
def url(api):
    return api.url


@pytest.fixture
def network(api):
    with BadNetwork(api.url).run() as network:
        yield network


@pytest.fixture
def syncbn(api, capsys, monkeypatch, tmp_path):
    """Run the command against the API; returns exit code, standard output and standard error."""
    monkeypatch.setenv("SYNCBN_URL", api.url)
    monkeypatch.setenv("SYNCBN_TOKEN", TOKEN)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("SYNCBN_CONFIG", "SYNCBN_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run
