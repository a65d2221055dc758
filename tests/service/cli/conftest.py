"""The command line against the API on a port."""

import pytest

from service.cli.app import main
from tests.service.running_api import TOKEN


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
