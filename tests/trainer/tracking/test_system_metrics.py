from trainer.jobspec import OUTBOX_FILE
from trainer.tracking.outbox import Outbox, read_lines
from trainer.tracking.system_metrics import SystemMetrics


def test_system_metrics_are_sampled_at_least_once(tmp_path):
    outbox = Outbox(tmp_path)
    with SystemMetrics(outbox):
        pass
    outbox.close()
    samples = [line for line in read_lines((tmp_path / OUTBOX_FILE).read_bytes()) if line["kind"] == "system"]
    assert samples
    assert all(name.startswith("system/") for name in samples[0]["metrics"])
    assert "system/cpu_utilization_percentage" in samples[0]["metrics"]
