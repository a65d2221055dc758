"""`docker-compose.yml`, its overrides and the files of the monitoring profile, without starting them."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BUCKETS = {"s3-artifacts-bucket", "s3-checkpoints-bucket"}
PROFILED = {"prometheus", "grafana", "s3-artifacts", "s3-checkpoints"} | BUCKETS


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def services(compose):
    return compose["services"]


def test_only_the_api_and_the_dashboard_are_published_and_on_this_machine_alone(services):
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published.keys() == {"api", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_jobs_reach_neither_the_database_nor_mlflow(compose, services):
    for name in ("ray-head", "ray-worker"):
        assert services[name]["networks"] == ["cluster"]
    for name in ("postgres", "mlflow"):
        assert services[name]["networks"] == ["control"]
    assert services["checker"]["networks"] == ["checks"]
    assert services["s3-artifacts"]["networks"] == ["control"]
    assert services["s3-checkpoints"]["networks"] == ["cluster"]
    inner = {name for name, options in compose["networks"].items() if (options or {}).get("internal")}
    assert inner == {"control", "checks", "cluster", "monitoring"}
    assert "--app-name=syncbn" in services["mlflow"]["command"]


def test_every_service_is_limited_restarted_and_without_privileges(services):
    for name, service in services.items():
        assert service["mem_limit"], name
        assert service["pids_limit"], name
        restart = "on-failure" if name in BUCKETS else "unless-stopped"  # failed processes exit
        assert service["restart"] == restart, name
        assert service["cap_drop"] == ["ALL"], name
        if name != "postgres":  # its entry point leaves root by itself
            assert service["security_opt"] == ["no-new-privileges:true"], name
            assert "cap_add" not in service, name
    assert all(services[name]["read_only"] for name in ("api", "mlflow", "checker"))


def test_each_service_waits_for_the_health_of_what_it_needs(services):
    needed = services["api"]["depends_on"]
    assert needed.keys() == {"postgres", "mlflow", "ray-head", "checker"}
    for name in ("postgres", "mlflow", "ray-head"):
        assert needed[name]["condition"] == "service_healthy"
    for name, service in services.items():
        assert "healthcheck" in service or name in PROFILED | {"checker"}, name
    assert "/readyz" in " ".join(services["api"]["healthcheck"]["test"])


def test_each_image_is_built_once_and_never_pulled(services):
    ours = {name: service for name, service in services.items() if service["image"].startswith("syncbn-")}
    built = {name: service["build"]["target"] for name, service in ours.items() if "build" in service}
    assert built == {"api": "service", "ray-head": "trainer"}
    for name, service in ours.items():
        target = "service" if name in {"api", "mlflow"} | BUCKETS else "trainer"
        assert service["image"] == f"syncbn-{target}:${{IMAGE_TAG:-latest}}"
        assert name in built or service["pull_policy"] == "never"


def test_other_images_have_a_version(services):
    for name, service in services.items():
        if not service["image"].startswith("syncbn-"):
            assert re.fullmatch(r"docker\.io/[\w./-]+:v?\d[\w.-]*", service["image"]), name


def test_no_secret_is_in_the_file_and_any_password_is_accepted(services):
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"TOKEN|SECRET|PASSWORD", variable) and variable != "SYNCBN_SECRETS_FOLDER":
                assert value.startswith("${"), (name, variable)
    assert "$" not in services["api"]["environment"]["SYNCBN_DATABASE_URL"]  # where it would be escaped
    assert services["api"]["environment"]["PGPASSWORD"] == "${POSTGRES_PASSWORD}"


def test_the_gpu_override_reserves_gpus_for_the_workers():
    override = yaml.safe_load((ROOT / "deploy" / "compose.gpu.yml").read_text())["services"]
    [device] = override["ray-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_prometheus_sends_the_token_that_the_container_writes(services):
    config = yaml.safe_load((ROOT / "deploy/monitoring/prometheus.yml").read_text())
    [scrape] = config["scrape_configs"]
    path = scrape["authorization"]["credentials_file"]
    assert f"> {path}" in services["prometheus"]["entrypoint"][-1]
    assert services["prometheus"]["environment"]["METRICS_TOKEN"] == "${SYNCBN_METRICS_TOKEN}"
    assert "metrics" in scrape["metrics_path"]
