"""Selection of the service that a command calls."""

import json
import os

import pytest
import typer

from service.cli.connection import ServiceTarget, default_config_path, find_service, read_config
from service.local.stack import StackError
from tests.service.running_api import TOKEN

OPTION = ServiceTarget(url="http://option", token="of option")
VARIABLES = {"SYNCBN_URL": "http://variable", "SYNCBN_TOKEN": "of variable"}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Write the config file at its default location."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    path = default_config_path()

    def write(text, mode=0o600):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    return write


@pytest.fixture
def stack(tmp_path, monkeypatch):
    """Write the files of a stack to its data folder, the default one included."""
    monkeypatch.chdir(tmp_path)

    def make(name):
        (tmp_path / name).mkdir(exist_ok=True)
        content = {"url": f"http://{name}", "token": f"of {name}", "mlflow_url": "", "ray_address": ""}
        (tmp_path / name / "connection.json").write_text(json.dumps(content))
        return tmp_path / name

    make(".syncbn")
    return make


def test_precedence_is_options_variables_config_file_stack(config, stack):
    assert find_service(ServiceTarget(), {}) == ("http://.syncbn", "of .syncbn")
    config('url = "http://file"\ntoken = "of file"\n')
    assert find_service(ServiceTarget(), {}) == ("http://file", "of file")
    assert find_service(ServiceTarget(), VARIABLES) == ("http://variable", "of variable")
    assert find_service(OPTION, VARIABLES) == ("http://option", "of option")


def test_a_data_folder_selects_its_stack(config, stack):
    other = stack("other")
    config(f'data_dir = "{other}"\n')
    assert find_service(ServiceTarget(), {}) == ("http://other", "of other")
    assert find_service(ServiceTarget(), {"SYNCBN_DATA_DIR": ".syncbn"}) == ("http://.syncbn", "of .syncbn")
    assert find_service(ServiceTarget(data_dir=other), VARIABLES) == ("http://other", "of other")
    assert find_service(ServiceTarget(data_dir=other, token="mine"), VARIABLES) == ("http://other", "mine")
    assert find_service(ServiceTarget(), {"SYNCBN_TOKEN": "mine"}) == ("http://other", "mine")
    with pytest.raises(
        StackError, match=r"no stack runs on nowhere; `syncbn up --data-dir nowhere` starts one"
    ):
        find_service(ServiceTarget(data_dir="nowhere"), {})


def test_a_token_is_never_taken_from_the_file_of_another_service(config):
    config('url = "http://file"\ntoken = "of file"\n')
    assert find_service(ServiceTarget(token="other"), {}) == ("http://file", "other")
    assert find_service(ServiceTarget(), {"SYNCBN_TOKEN": " other\n"}) == ("http://file", "other")
    assert find_service(ServiceTarget(url="http://option"), {"SYNCBN_TOKEN": "other"}) == (
        "http://option",
        "other",
    )
    with pytest.raises(typer.BadParameter, match="http://option needs a token"):
        find_service(ServiceTarget(url="http://option"), {})


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_token_file_that_others_can_read_is_rejected(config, mode):
    path = config('url = "http://file"\ntoken = "secret"\n', mode)
    with pytest.raises(typer.BadParameter, match="may be read by others; `chmod 600") as refused:
        find_service(ServiceTarget(), {})
    assert "secret" not in str(refused.value)
    path.write_text('url = "http://file"\n')
    assert find_service(ServiceTarget(token="t"), {}) == ("http://file", "t")
    path.write_text("nonsense")
    assert find_service(OPTION, {}) == ("http://option", "of option")  # an unused file is not read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("url = ", "holds no TOML"),
        ('address = "x"', "address: must be one of url, token, data_dir"),
        ("url = 5", "url: Input should be a valid string"),
        ('token = "x"', "token: must be used with the url of its service"),
    ],
)
def test_an_invalid_config_file_is_rejected(config, text, message):
    with pytest.raises(typer.BadParameter, match=message):
        read_config(config(text))


def test_another_config_file_can_be_chosen(config, tmp_path):
    config('url = "http://file"\ntoken = "of file"\n')
    other = tmp_path / "other.toml"
    with pytest.raises(OSError, match=r"other\.toml"):
        find_service(ServiceTarget(), {}, other)
    os.close(os.open(other, os.O_CREAT, 0o600))
    other.write_text('url = "http://other"\ntoken = "of other"\n')
    assert find_service(ServiceTarget(), {}, other) == ("http://other", "of other")
    assert find_service(ServiceTarget(), {"SYNCBN_CONFIG": str(other)}) == ("http://other", "of other")


def test_a_missing_token_and_an_invalid_config_file_are_usage_errors(syncbn, monkeypatch, api):
    monkeypatch.delenv("SYNCBN_TOKEN")
    code, _, error = syncbn("jobs")
    assert code == 2
    assert "needs a token" in error
    code, _, error = syncbn("jobs", "--url", "nonsense", "--token", "x")
    assert code == 2
    assert "must be an address" in error
    monkeypatch.delenv("SYNCBN_URL")
    path = default_config_path()
    path.parent.mkdir()
    path.write_text(f'url = "{api.url}"\ntoken = "{TOKEN}"\n')
    path.chmod(0o644)
    code, _, error = syncbn("jobs")
    assert code == 2
    assert "chmod 600" in error
    assert TOKEN not in error
    path.chmod(0o600)
    assert syncbn("jobs")[0] == 0
