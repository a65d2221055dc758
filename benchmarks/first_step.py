"""Time to the first step of a job through this service, compared with a bare script submitted to Ray.

The bare script is minimal: it trains the same network on the same data with Ray Train, two workers and
TorchTrainer, for one step. Both run alternately on one embedded stack. Prints medians and ranges in
seconds from the submission to the end of the first step, the ratio (goal: at most 1.15), and the time of
each milestone of the service.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from ray.job_submission import JobStatus, JobSubmissionClient

from service.client import Client
from service.local.stack import LocalStack

TIMEOUT_SECONDS = 180
SPEC = {
    "model": {"name": "mlp", "hidden": [100, 100, 100]},
    "data": {"name": "digits"},
    "num_workers": 2,
    "global_batch_size": 60,
    "steps": 1,
    "eval_every": 1,
}
BARE = """
import time
import ray.train
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

def work():
    import torch
    import torch.nn.functional as F
    from ray.train.torch import prepare_model
    from sklearn.datasets import load_digits
    from torch import nn

    inputs, labels = load_digits(return_X_y=True)
    inputs, labels = torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(labels)
    layers = [layer for width in (64, 100, 100) for layer in (nn.Linear(width, 100), nn.Sigmoid())]
    model = prepare_model(nn.Sequential(*layers, nn.Linear(100, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rank = ray.train.get_context().get_world_rank()
    F.cross_entropy(model(inputs[rank * 30 : rank * 30 + 30]), labels[rank * 30 : rank * 30 + 30]).backward()
    optimizer.step()
    if rank == 0:
        print("first step at", time.time(), flush=True)

TorchTrainer(work, scaling_config=ScalingConfig(num_workers=2)).fit()
"""


def bare(client: JobSubmissionClient, script: Path) -> float:
    """Submit the bare script and return the seconds to its first step."""
    began = time.time()
    job_id = client.submit_job(entrypoint=f"{sys.executable} {script}")
    while (status := client.get_job_status(job_id)) != JobStatus.SUCCEEDED:
        assert status in (JobStatus.PENDING, JobStatus.RUNNING), client.get_job_logs(job_id)
        assert time.time() - began < TIMEOUT_SECONDS, client.get_job_logs(job_id)
        time.sleep(0.2)
    return float(client.get_job_logs(job_id).rpartition("first step at ")[2].split()[0]) - began


def ours(client: Client, storage: Path) -> dict[str, float]:
    """Submit a job and return the seconds to each milestone, the last of which is the first step."""
    began = time.time()
    job_id = client.submit_job("first step", SPEC).id
    while not (job := client.job(job_id)).state.is_terminal:
        assert time.time() - began < TIMEOUT_SECONDS, client.logs(job_id)
        time.sleep(0.2)
    assert job.state == "succeeded", client.logs(job_id)
    submitted = next(event.at for event in client.events(job_id).events if event.state == "submitted")
    lines = [json.loads(line) for line in (storage / job_id / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["timestamp"] / 1e3 for line in lines if line["kind"] == "evaluation"}
    history = json.loads((storage / job_id / "checkpoints" / "run.json").read_text())
    return {
        "queue and MLflow run": submitted.timestamp() - began,
        "Ray job and driver": history["worker_group_runs"][0]["began_seconds"] - began,
        "workers, data, model, evaluation": steps[0] - began,
        "first step": steps[1] - began,
    }


def main(rounds: int) -> None:
    """Time both alternately."""
    with tempfile.TemporaryDirectory() as folder:
        script, data_dir = Path(folder) / "bare.py", Path(folder) / "data"
        script.write_text(BARE)
        with LocalStack(data_dir, cpus=2) as stack:
            token = (data_dir / "ray-token").read_text().strip()
            headers = {"Authorization": f"Bearer {token}"}
            ray_client = JobSubmissionClient(stack.connection.ray_address, headers=headers)
            times: dict[str, list[float]] = {"bare": [], "service": []}
            stages: list[dict[str, float]] = []
            with Client(stack.connection.url, stack.connection.token) as client:
                for number in range(rounds + 1):
                    seconds, milestones = bare(ray_client, script), ours(client, data_dir / "storage")
                    if number > 0:  # the first round warms up
                        times["bare"].append(seconds)
                        times["service"].append(milestones["first step"])
                        stages.append(milestones)
    for name, values in times.items():
        print(
            f"{name:8} {statistics.median(values):5.1f} s to the first step ({min(values):.1f} to "
            f"{max(values):.1f})"
        )
    ratios = sorted(s / b for s, b in zip(times["service"], times["bare"], strict=True))
    print(f"service / bare: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), goal 1.15")
    for before, name in pairwise(["", *stages[0]]):
        spent = [milestones[name] - milestones.get(before, 0) for milestones in stages]
        print(f"  {name}: {statistics.median(spent):.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args().rounds)
