"""System metrics of rank 0's machine, sampled by MLflow's monitors."""

import threading
from contextlib import suppress

from trainer.tracking.outbox import Outbox

SAMPLE_INTERVAL_SECONDS = 10.0


class SystemMetrics:
    """Context manager that samples system metrics in a thread.

    Metrics are named `system/…`, as by MLflow, and numbered by sample.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system-metrics", daemon=True)

    def __enter__(self) -> "SystemMetrics":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self._thread.join(SAMPLE_INTERVAL_SECONDS)

    def _sample(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, RuntimeError):  # no GPU
            monitors.append(GPUMonitor())
        is_last = False
        while not is_last:
            sample: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                sample |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            self._outbox.log(self._outbox.next_step("system"), sample, "system")
            is_last = self._finished.wait(SAMPLE_INTERVAL_SECONDS)
