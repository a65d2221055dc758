"""`docker-compose.yml` from outside: a comparison, isolation, restarts of every service, pages."""

import json
import re
import shutil
import time

import pytest
from playwright.sync_api import expect, sync_playwright

from deploy.cluster import read_env
from tests.cluster.compose import IMAGE_TAG

pytestmark = pytest.mark.cluster
SERVICES = ("postgres", "mlflow", "checker", "api", "ray-worker", "ray-head")
BODY = {
    "name": "four workers on two nodes",
    "spec": {
        "model": {"name": "mlp", "hidden": [32, 32]},
        "data": {"name": "digits"},
        "num_workers": 4,
        "placement": "spread",
        "global_batch_size": 64,
        "steps": 400,
        "eval_every": 20,
        "optimizer": {"lr": 0.1},
        "checkpoint": {"every": 20},
        "log_model": False,
    },
    "matrix": {"norm": ["none", "sync"], "seed": [0, 1, 2]},
    "target": 0.8,
    # Each restart of Ray's head ends an attempt.
    "retries": {"infrastructure": 8},
}
CONNECT = """
import socket, sys
for port in map(int, sys.argv[2:]):
    try:
        socket.create_connection((sys.argv[1], port), timeout=2).close()
        print(port)
    except OSError:
        pass
"""
PORTS = {"postgres": [5432], "mlflow": [5000], "ray-head": [6379, 8265, 10001, 52365], "ray-worker": [52365]}


@pytest.fixture(scope="module")
def comparison(compose):
    """A comparison, during which each service was restarted in turn."""
    with compose.client() as client:
        submitted = client.submit_comparison(BODY)
        for service in SERVICES:
            until(lambda: has_progress(client, submitted.id), 300)
            compose.call("restart", "--time=10", *compose.containers(service), seconds=120)
            compose.until_ready()
        return client.wait(submitted.id, 1_200, lambda _: None)


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def has_progress(client, comparison_id):
    """Return whether a job is training now, or all have ended."""
    jobs = client.comparison(comparison_id).jobs
    trains = any(job.state == "running" and job.progress and job.progress.step > 20 for job in jobs)
    return trains or all(job.state.is_terminal for job in jobs)


@pytest.mark.timeout(2_400)
def test_a_comparison_survives_the_restart_of_every_service(compose, comparison):
    assert [(job.state, job.reason) for job in comparison.jobs] == [("succeeded", "finished 400 steps")] * 6
    with compose.client() as client:
        hosts = set(re.findall(r"worker \d of 4 on ([^\s,]+)", client.logs(comparison.jobs[0].id)))
        assert len(hosts) >= 2
        report = client.report(comparison.id, curves=True)
        curves = [curve for variant in report.variants for curve in variant.curves]
        assert [[step for step, _ in curve.points] for curve in curves] == [list(range(0, 401, 20))] * 6
        assert report.finished
        assert report.conclusion.sentence


@pytest.mark.timeout(300)
def test_the_page_and_the_saved_view_open_from_outside(compose, comparison):
    with compose.client() as client, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        page.goto(client.create_sign_in_link(f"/comparisons/{comparison.id}").url)
        expect(page.get_by_role("heading", level=1)).to_contain_text("four workers")
        page.locator("#chart .uplot").wait_for()
        page.goto(client.comparison(comparison.id).mlflow_url)
        page.get_by_text("norm=sync").first.wait_for(timeout=60_000)
        browser.close()


def test_only_the_api_is_published_and_on_this_machine_alone(compose):
    published = []
    for name in compose.containers():
        ports = json.loads(compose.inspect(name, "{{json .NetworkSettings.Ports}}")) or {}
        published += [(name, binding) for bindings in ports.values() for binding in bindings or []]
    [(name, binding)] = published
    assert name in compose.containers("api")
    assert (binding["HostIp"], binding["HostPort"]) == ("127.0.0.1", compose.url.rsplit(":", 1)[1])


@pytest.mark.parametrize(
    ("source", "closed"),
    [("ray-worker", ["postgres", "mlflow"]), ("checker", ["postgres", "mlflow", "ray-head", "ray-worker"])],
)
def test_inner_networks_are_separate(compose, source, closed):
    for service in closed:
        for address in addresses(compose, service):
            opened = compose.python(compose.container(source), CONNECT, address, *map(str, PORTS[service]))
            assert opened == "", f"{source} reaches {service} at {address}"


def test_a_container_beside_the_api_reaches_nothing_but_the_api(compose):
    """Also Ray's own port answers to its token only."""
    network = next(
        n for n in compose.call("network", "ls", "--format={{.Name}}").split() if n.endswith("_edge")
    )
    run = ("run", "--rm", f"--network={network}", f"syncbn-service:{IMAGE_TAG}")
    for service, ports in PORTS.items():
        for address in addresses(compose, service):
            opened = compose.call(*run, "python", "-c", CONNECT, address, *map(str, ports))
            assert opened == "", f"a container on the published network reaches {service}"
    code = """
import urllib.error, urllib.request
try:
    urllib.request.urlopen("http://ray-head:8265/api/jobs/", timeout=5)
except urllib.error.HTTPError as error:
    print(error.code)
"""
    assert compose.python(compose.container("ray-worker"), code) in ("401", "403")


def test_containers_run_without_root_and_without_capabilities(compose):
    for name in compose.containers():
        service = compose.inspect(name, '{{index .Config.Labels "com.docker.compose.service"}}')
        limits = json.loads(compose.inspect(name, "{{json .HostConfig}}"))
        assert limits["Memory"] > 0, service
        assert limits["PidsLimit"] > 0, service
        assert limits["RestartPolicy"]["Name"] == "unless-stopped", service
        if service != "postgres":  # its entry point leaves root by itself
            code = "import os; print(os.getuid(), open('/proc/self/status').read())"
            uid, status = compose.python(name, code).split(None, 1)
            assert uid == "1000", service
            assert "CapEff:\t0000000000000000" in status, service
            assert "NoNewPrivs:\t1" in status, service
        if service in ("api", "mlflow", "checker"):
            assert limits["ReadonlyRootfs"], service


def test_secrets_are_not_where_jobs_run(compose):
    secrets = read_env(compose.env_file)
    # The nodes hold Ray's token, and the key of the object store of profile s3.
    hidden = [
        value for name, value in secrets.items() if name not in ("RAY_AUTH_TOKEN", "S3_CHECKPOINTS_KEY")
    ]
    hidden = [value for value in hidden if len(value) == 64]
    assert len(hidden) == 6
    for service in ("ray-head", "ray-worker", "checker"):
        environment = compose.inspect(compose.container(service), "{{json .Config.Env}}")
        assert not [secret for secret in hidden if secret in environment], service
    checker = compose.inspect(compose.container("checker"), "{{json .Config.Env}}")
    assert secrets["RAY_AUTH_TOKEN"] not in checker
    assert secrets["S3_CHECKPOINTS_KEY"] not in checker


def test_object_stores_are_in_shared_memory(compose):
    for name in (*compose.containers("ray-head"), *compose.containers("ray-worker")):
        assert "instead of /dev/shm" not in compose.logs(name)


def addresses(compose, service):
    """Return the addresses of a service's containers in all of their networks."""
    found = []
    for name in compose.containers(service):
        networks = json.loads(compose.inspect(name, "{{json .NetworkSettings.Networks}}"))
        found += [network["IPAddress"] for network in networks.values()]
    assert found
    return found
