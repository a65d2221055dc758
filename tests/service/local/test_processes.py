import sys
from pathlib import Path

from service.local import processes
from service.local.stack import (
    LocalStack,
)
from tests.service.local.fakes import mode


def test_the_environment_excludes_ray_and_mlflow_settings_of_the_caller(tmp_path, monkeypatch, fake_parts):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    monkeypatch.setenv("SYNCBN_POLL_SECONDS", "0.1")
    with LocalStack(tmp_path / "data") as stack:
        environment = stack.api_environment
    assert {"RAY_ADDRESS", "MLFLOW_TRACKING_URI"}.isdisjoint(environment)
    assert environment["SYNCBN_POLL_SECONDS"] == "0.1"
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert environment["RAY_AUTH_MODE"] == "token"
    assert mode(Path(environment["RAY_AUTH_TOKEN_PATH"])) == 0o600


def test_jobs_inherit_none_of_the_services_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("SYNCBN_SECRETS_FOLDER", "/secrets")
    monkeypatch.setenv("SYNCBN_TOKEN", "a-token-of-the-service")
    layout = processes.Layout(
        data_dir=tmp_path,
        ray_dir=tmp_path,
        ray_token_path=tmp_path / "ray-token",
        api_token="a-token-of-the-service",
        mlflow_secret="a-secret-of-the-service",
        cpus=1,
        api_port=1,
        mlflow_port=2,
        ray_port=3,
        ray_client_port=4,
    )
    environment = processes.ray_head(layout).environment
    assert not [name for name in environment if name.startswith("SYNCBN_")]
    assert not {"a-token-of-the-service", "a-secret-of-the-service"} & set(environment.values())
