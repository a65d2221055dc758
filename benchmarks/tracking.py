"""Cost of tracking for a training step, with a working MLflow and with one that does not answer.

Three processes make the same steps of some milliseconds in turn, with metrics in every tenth one: without
tracking, with a working MLflow, and with a server that accepts connections and never answers, which is the
worst kind of outage. Prints for each the median step, the steps over 50 ms and the maximum; the ratio to
the process without tracking (goal: at most 1.01); and whether MLflow holds each step once, also after the
outbox of the third process was sent to a server that answers.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from mlflow import MlflowClient
from torch import nn

import trainer.tracking.uploader
from service.local.stack import LocalStack
from trainer.tracking.outbox import Outbox
from trainer.tracking.uploader import MlflowUploader, TrackingProcess

EVERY = 10
METRICS = {"accuracy": 0.5, "test_loss": 1.0, "train_loss": 1.0, "learning_rate": 0.1}


@contextmanager
def silent_server() -> Iterator[str]:
    """Run a server that accepts connections and never answers."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    taken: list[socket.socket] = []

    def take() -> None:
        try:
            while True:
                taken.append(listener.accept()[0])
        except OSError:
            return

    threading.Thread(target=take, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    for connection in taken:
        connection.close()


def serve(turns: Connection, folder: Path, url: str | None, run_id: str, steps: int) -> None:
    """Make a block of steps in each turn of this process, and send their seconds."""
    torch.set_num_threads(1)
    trainer.tracking.uploader.FINISH_TIMEOUT_SECONDS = 10.0
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs, labels = torch.rand(256, 784), torch.randint(10, (256,))
    outbox, step = Outbox(folder), 0
    for _ in range(200):  # warms up
        F.cross_entropy(model(inputs), labels).backward()
    with TrackingProcess(folder, url, run_id):
        while turns.recv():
            seconds = []
            for _ in range(steps):
                began = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                if url is not None and step % EVERY == 0:
                    outbox.log(step, METRICS)
                step += 1
                seconds.append(time.perf_counter() - began)
            turns.send(seconds)
    outbox.close()


def is_whole(client: MlflowClient, run_id: str, steps: int) -> str:
    """Return whether a run holds each logged step once."""
    held = sorted(point.step for point in client.get_metric_history(run_id, "accuracy"))
    return f"{held == list(range(0, steps, EVERY))} ({len(held)} of {len(range(0, steps, EVERY))})"


def main(seconds: float, steps: int) -> None:
    """Let the three processes take turns until the time is over."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as name,
        LocalStack(Path(name) / "stack", api=False, cpus=1) as stack,
        silent_server() as deaf,
    ):
        url, os.environ["MLFLOW_TRACKING_TOKEN"] = stack.mlflow
        client = MlflowClient(url)
        runs = {name: client.create_run("0").info.run_id for name in ("without", "up", "down")}
        urls = {"without": None, "up": url, "down": deaf}
        turns, processes = {}, []
        for kind, run_id in runs.items():
            (Path(name) / kind).mkdir()
            turns[kind], there = context.Pipe()
            process = context.Process(
                target=serve, args=(there, Path(name) / kind, urls[kind], run_id, steps), daemon=True
            )
            process.start()
            processes.append(process)
        spent: dict[str, list[float]] = {kind: [] for kind in runs}
        taken = dict.fromkeys(runs, 0)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            for kind, turn in turns.items():
                turn.send(True)
                block = turn.recv()
                taken[kind] += steps
                spent[kind] += block
        for turn in turns.values():
            turn.send(False)
        for process in processes:
            process.join(60)
        for kind, values in spent.items():
            middle = statistics.median(values)
            late = sum(value > 0.05 for value in values)
            print(
                f"{kind:8} {middle * 1e3:.3f} ms a step, "
                f"{middle / statistics.median(spent['without']):.4f} x without;"
                f" {late} of {len(values)} steps over 50 ms, the longest {max(values) * 1e3:.0f} ms"
            )
        print(f"up: MLflow holds each logged step once: {is_whole(client, runs['up'], taken['up'])}")
        outbox = Outbox(Path(name) / "down")
        outbox.close()
        with MlflowUploader(outbox.path, url, runs["down"]):
            pass
        print(
            "down, then up again: MLflow holds each logged step once: "
            f"{is_whole(client, runs['down'], taken['down'])}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="that the third MLflow is down")
    parser.add_argument("--steps", type=int, default=50, help="in a block")
    arguments = parser.parse_args()
    main(arguments.seconds, arguments.steps)
