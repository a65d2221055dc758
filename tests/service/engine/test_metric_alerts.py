import json

from service.domain.lifecycle import RayStatus
from service.domain.webhooks import Threshold
from tests.service.engine.webhook_fixtures import make, only_message
from trainer.jobspec import OUTBOX_FILE, OUTCOME_FILE, Outcome


async def test_a_threshold_alerts_once_per_job_even_across_a_restart(replica, webhooks):
    thresholds = (
        Threshold(metric="accuracy", relation="at_least", bound=0.9),
        Threshold(metric="test_loss", relation="at_most", bound=0.1),
    )
    hook = await make(webhooks, "https://a", states=(), thresholds=thresholds)
    job = await replica.add()
    await replica.tick()
    replica.ray.set(job.submission_id, RayStatus.RUNNING)
    outbox = replica.files.job_folder(job.id) / OUTBOX_FILE
    outbox.parent.mkdir(parents=True, exist_ok=True)

    def measure(step, accuracy, end="\n"):
        line = json.dumps(
            {"kind": "evaluation", "step": step, "metrics": {"accuracy": accuracy, "test_loss": 1.0}}
        )
        with outbox.open("a") as file:
            file.write(line + end)

    async def sent():
        found, _ = await webhooks.deliveries_of(hook.id, 10, None)
        return [
            (delivery.about, json.loads(delivery.body)["data"]["threshold"]["step"]) for delivery in found
        ]

    measure(0, 0.1)
    measure(10, 0.95, end="")  # an incomplete line
    await replica.tick()
    assert await sent() == []
    with outbox.open("a") as file:
        file.write("\nhalf a li\n")
    measure(20, 0.97)
    await replica.tick()
    assert await sent() == [("accuracy at least 0.9", 10)]
    replica.reopen()
    await replica.tick()
    assert await sent() == [("accuracy at least 0.9", 10)]


async def test_the_last_metrics_of_a_job_are_evaluated(replica, webhooks):
    hook = await make(
        webhooks, "https://a", thresholds=(Threshold(metric="accuracy", relation="at_least", bound=0.9),)
    )
    job = await replica.add()
    await replica.tick()
    line = json.dumps({"kind": "evaluation", "step": 10, "metrics": {"accuracy": 0.99}})
    replica.write(job, OUTCOME_FILE, Outcome(state="succeeded", reason="finished"))
    (replica.files.job_folder(job.id) / OUTBOX_FILE).write_text(line + "\n")
    replica.ray.set(job.submission_id, RayStatus.SUCCEEDED)
    await replica.tick()
    assert await replica.state(job) == "succeeded"
    found, _ = await webhooks.deliveries_of(hook.id, 10, None)
    assert [delivery.about for delivery in found] == ["succeeded", "accuracy at least 0.9"]


async def test_a_new_webhook_is_alerted_of_earlier_metrics_and_offsets_are_deleted(
    replica, webhooks, monkeypatch
):
    threshold = Threshold(metric="accuracy", relation="at_least", bound=0.9)
    await make(webhooks, "https://a", states=(), thresholds=(threshold,))
    job = await replica.add()
    await replica.tick()
    outbox = replica.files.job_folder(job.id) / OUTBOX_FILE
    outbox.parent.mkdir(parents=True, exist_ok=True)
    measured = {"step": 10, "metrics": {"accuracy": 0.99}}
    others = [
        {"metrics": {"accuracy": 1.0}},
        {"step": 5, "metrics": {"accuracy": "high"}},
        {"step": None, "metrics": {}},
    ]
    outbox.write_text("".join(json.dumps(line) + "\n" for line in [*others, measured]))
    await replica.alerts.refresh()
    await replica.alerts.poll(job)
    late = await make(webhooks, "https://b", states=(), thresholds=(threshold,))
    await replica.alerts.refresh()
    await replica.alerts.poll(job)
    assert json.loads((await only_message(webhooks, late)).body)["data"]["threshold"]["step"] == 10
    assert len(replica.alerts._offsets) == 2
    monkeypatch.setattr("service.engine.metric_alerts.FORGET_SECONDS", 0)
    await replica.alerts.refresh()
    assert replica.alerts._offsets == {}
