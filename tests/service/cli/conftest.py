"""Command line with the API on a port."""

import threading
import time

import pytest
import yaml

from service.cli.app import main
from service.cli.output import errors, output
from tests.service.running_api import SPEC, TOKEN


@pytest.fixture
def syncbn(api, capsys, monkeypatch, tmp_path):
    """Run the command with the API; returns exit status, standard output and standard error."""
    monkeypatch.setenv("SYNCBN_URL", api.url)
    monkeypatch.setenv("SYNCBN_TOKEN", TOKEN)
    for console in (output, errors):
        monkeypatch.setattr(console, "_width", 200)  # a console reads them once, at its creation
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


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "my-job.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return path


@pytest.fixture
def comparison(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"spec": SPEC, "matrix": {"norm": ["none", "sync"]}, "target": 0.5}))
    return path


@pytest.fixture
def later():
    """Run a function in a thread after a short delay."""
    threads = []

    def start(*steps, pause=0.4):
        def run_later():
            for step in steps:
                time.sleep(pause)
                step()

        threads.append(threading.Thread(target=run_later))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(20)
