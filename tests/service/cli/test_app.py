"""The command as a process: what a terminal gives it, and what it prints there."""

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


def test_a_package_that_is_not_installed_is_named_with_its_extra():
    code = "import sys; sys.modules['typer'] = None; from service.__main__ import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
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
def test_a_terminal_without_the_characters_gets_others(api, locale):
    with api.client() as client:
        client.submit_job("first", {"steps": 5})
    for command in ("jobs", "cluster"):
        shown = run(command, "--url", api.url, "--token", TOKEN, **locale)
        assert "Error" not in shown.stderr, command
        assert shown.returncode == 0
