"""Metrics in Prometheus format, parsed by its own client."""

import asyncio
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.api.prometheus import _Snapshot
from service.store.usage import Totals, Usage
from tests.service.api.routes.test_validation import end, submit

MONITORING = Path(__file__).parents[3] / "deploy" / "monitoring"


async def read(client):
    answer = await client.get("/metrics")
    assert answer.status_code == 200, answer.text
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    return {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}


async def test_jobs_queue_owners_and_replicas_are_exported(app, client, ray):
    ray.is_down = True
    before = await read(client)
    assert before["syncbn_jobs", ("state", "queued")] == before["syncbn_oldest_queued_seconds",] == 0
    first, second = await submit(client), await submit(client)
    await end(app, first["id"], "failed")
    await end(app, second["id"])
    third = await submit(client)
    seen = await read(client)
    states = {
        state: seen["syncbn_jobs", ("state", state)] for state in ("queued", "failed", "cancelled", "running")
    }
    assert states == {"queued": 1, "failed": 1, "cancelled": 1, "running": 0}
    assert seen["syncbn_queued_jobs", ("owner", third["owner"])] == 1
    assert 0 < seen["syncbn_oldest_queued_seconds",] < 60
    assert seen["syncbn_gpu_seconds_total", ("owner", "admin")] == 0
    (replica,) = [name for name in seen if name[0] == "syncbn_replica_silent_seconds"]
    assert seen[replica] < 10


def test_counters_of_usage_leave_out_running_attempts():
    used, ended = Usage(gpu_seconds=30, cpu_seconds=50), Usage(gpu_seconds=10, cpu_seconds=20)
    totals = Totals({}, {}, None, {"ann": used, "bob": used}, {"ann": ended})
    samples = [
        each for family in _Snapshot(totals, {}, datetime.now(UTC)).collect() for each in family.samples
    ]
    found = {(each.name, each.labels["owner"]): each.value for each in samples if "owner" in each.labels}
    assert found == {
        ("syncbn_gpu_seconds_total", "ann"): 10,
        ("syncbn_gpu_seconds_total", "bob"): 0,
        ("syncbn_running_gpu_seconds", "ann"): 20,
        ("syncbn_running_gpu_seconds", "bob"): 30,
        ("syncbn_cpu_seconds_total", "ann"): 20,
        ("syncbn_cpu_seconds_total", "bob"): 0,
        ("syncbn_running_cpu_seconds", "ann"): 30,
        ("syncbn_running_cpu_seconds", "bob"): 50,
    }


async def test_dispatch_and_tick_durations_are_exported(client):
    await submit(client)
    async with asyncio.timeout(60):
        while not (seen := await read(client))["syncbn_dispatch_seconds_count",]:
            await asyncio.sleep(0.1)
    assert 0 < seen["syncbn_dispatch_seconds_sum",] < 60
    assert seen["syncbn_tick_seconds_count",] > 0


async def test_only_an_admin_reads_them(anonymous, client):
    del client.headers["Authorization"]
    assert (await anonymous.get("/metrics")).status_code == 401


def expressions():
    """All expressions of the dashboard and of the alerts."""
    dashboard = json.loads((MONITORING / "grafana/syncbn.json").read_text())
    alerts = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    yield from (rule["expr"] for group in alerts["groups"] for rule in group["rules"])


async def test_dashboard_and_alerts_use_metrics_that_exist(client):
    text = (await client.get("/metrics")).text
    families = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    used = {name for expression in expressions() for name in re.findall(r"syncbn_\w+", expression)}
    assert used
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} <= families
