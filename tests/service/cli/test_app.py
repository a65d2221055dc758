"""The command as a process: arguments, standard input and terminal output."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from tests.service.running_api import TOKEN


def run(*arguments, stdin="", **environment):
    return subprocess.run(
        [sys.executable, "-m", "service.cli.app", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        encoding="utf-8",
        errors="replace",
    )


def test_the_version():
    assert run("--version").stdout == f"syncbn {metadata.version('syncbn')}\n"


def test_a_missing_package_names_its_extra():
    code = "import sys; sys.modules['typer'] = None; from service.__main__ import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("syncbn: the package typer is not installed; pip install 'syncbn[client]'")


def test_a_spec_is_read_from_standard_input(api):
    options = ["--url", api.url, "--token", TOKEN]
    submitted = run("submit", "-", *options, stdin="{steps: 5, data: {name: digits}}")
    assert submitted.returncode == 0, submitted.stderr
    with api.client() as client:
        (job,) = client.jobs()
        assert (job.name, client.job(job.id).spec.steps) == ("standard input", 5)
    assert "valid" in run("validate", "-", *options, stdin="{steps: 5}").stdout
    assert run("submit", "-", *options, stdin="[" * 3_000).returncode == 2
    missing = run("submit", "nowhere.yaml", *options)
    assert missing.returncode == 2
    assert "nowhere.yaml" in missing.stderr


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LANG": "C", "PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
)
def test_terminals_without_unicode_get_ascii(api, locale):
    with api.client() as client:
        client.submit_job("first", {"steps": 5})
    for command in ("jobs", "cluster"):
        shown = run(command, "--url", api.url, "--token", TOKEN, **locale)
        assert "Error" not in shown.stderr, command
        assert shown.returncode == 0


def test_a_start_without_the_assets_of_the_pages_names_the_remedy(tmp_path):
    code = (
        "from pathlib import Path; from service.api.web import assets; "
        f"assets.load.__defaults__ = (Path({str(tmp_path)!r}),); "
        "from service.cli.app import main; main()"
    )
    command = [sys.executable, "-c", code, "serve"]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "300"},
    )
    assert ended.returncode == 2, ended.stderr
    assert "run `make setup`, which fetches the assets of the pages" in ended.stderr
    assert "Traceback" not in ended.stderr
