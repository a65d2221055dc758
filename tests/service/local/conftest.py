"""Fixtures of the tests of the embedded stack."""

import os

import pytest

from service.local import processes
from service.local.supervisor import ProcessSpec


@pytest.fixture
def fake_parts(monkeypatch):
    """Replace the processes by shell scripts, each ready once `<name>-ready` exists in the folder."""

    def install(**scripts: str) -> None:
        def make(name):
            return lambda layout: ProcessSpec(
                name=name,
                command=["sh", "-c", scripts.get(name, f"touch {name}-ready; exec sleep 300")],
                environment=dict(os.environ),
                log=str(layout.log(name)),
                stop_seconds=0.5,
            )

        for name, function in {"ray": "ray_head", "mlflow": "mlflow_server", "api": "api_server"}.items():
            monkeypatch.setattr(processes, function, make(name))
        monkeypatch.setattr(
            processes,
            "probes",
            lambda layout, _client: {
                name: (layout.data_dir / f"{name}-ready").exists for name in ("ray", "mlflow", "api")
            },
        )

    install()
    return install
