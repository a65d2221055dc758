import os
import traceback

import pytest

from trainer.errors import ConfigurationError
from trainer.secrets import hide_credentials, set_variables

VALUE = "a-secret-value"


@pytest.fixture
def secret(tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "before")
    path = tmp_path / "ann" / "secret"
    path.parent.mkdir()
    path.write_text(VALUE + "\n")
    path.chmod(0o600)
    return path


def test_a_variable_holds_what_the_file_holds(secret, capsys):
    set_variables({"A_SECRET": str(secret)})
    assert os.environ["A_SECRET"] == VALUE
    assert capsys.readouterr().out == ""


def test_a_world_readable_secret_file_is_reported_without_its_value(secret, capsys):
    secret.chmod(0o644)
    set_variables({"A_SECRET": str(secret)})
    output = capsys.readouterr().out
    assert str(secret) in output
    assert VALUE not in output


@pytest.mark.parametrize("content", [None, b"\xff\xfe" + VALUE.encode(), f"{VALUE}\0".encode()])
def test_an_unreadable_secret_is_a_configuration_error(secret, content):
    if content is None:
        secret.unlink()
    else:
        secret.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"secrets\.A_SECRET") as caught:
        set_variables({"A_SECRET": str(secret)})
    assert VALUE not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__cause__ is None
    assert os.environ["A_SECRET"] == "before"


def test_a_link_out_of_the_folder_is_rejected(secret, tmp_path):
    (tmp_path / "outside").write_text(VALUE)
    secret.unlink()
    secret.symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigurationError, match="not a link out of it"):
        set_variables({"A_SECRET": str(secret)})


def test_credentials_of_the_service_are_removed_from_the_environment(monkeypatch):
    gone = {
        "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "SYNCBN_TOKEN", "SYNCBN_DATABASE_URL",
        "SYNCBN_SECRETS_FOLDER", "SYNCBN_JOB", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
        "PGPASSWORD",
    }  # fmt: skip
    kept = {"SYNCBN_TIMEOUT_SECONDS", "RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_PROFILE"}
    for variable in gone | kept:
        monkeypatch.setenv(variable, "value")
    hide_credentials()
    assert not gone & os.environ.keys()
    assert kept <= os.environ.keys()
