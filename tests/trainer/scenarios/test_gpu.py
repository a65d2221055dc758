"""Training on GPUs: exact resume, shared statistics, and NCCL with one rank per GPU.

`make test-gpu` runs it on one GPU or more, and prints what it measured. It has never run on one; with
`SYNCBN_TEST_DEVICE=cpu` the same tests run on this machine's CPUs, by gloo.
"""

import json
import re
import subprocess
import sys
import time

import pytest
import torch
import yaml

from tests.dist import run_on_ranks
from tests.trainer.factories import DEVICE, InterruptedRunError, Interrupting, make_spec, run_here, train_here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1_200),
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WORKERS = max(1, torch.cuda.device_count()) if DEVICE == "cuda" else 2
IMAGES = {"name": "synthetic", "shape": [3, 32, 32], "classes": 10, "train_samples": 2_048}
CNN = {"name": "cnn", "channels": [32, 64]}


def state_bytes(result):
    return {name: value.cpu().numpy().tobytes() for name, value in result.model.state_dict().items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize("norm", ["sync", "batch"])
def test_an_interrupted_run_resumes_with_the_same_bits(tmp_path, norm, precision):
    spec = make_spec(
        model=CNN, data=IMAGES, norm=norm, precision=precision, checkpoint={"every": 3}, channels_last=True
    )
    whole, _ = run_here(spec)
    with pytest.raises(InterruptedRunError):
        run_here(spec, tmp_path, metrics_logger=Interrupting(14))
    resumed, notes = run_here(spec, tmp_path)
    assert notes.resumed_from == 12
    assert state_bytes(resumed) == state_bytes(whole)


@pytest.mark.dist
def test_two_ranks_with_shared_statistics_train_as_one():
    spec = make_spec(model=CNN, data=IMAGES)
    alone, _, _ = train_here(spec)
    [(state, _, _), _] = run_on_ranks(train_here, 2, spec, timeout_seconds=300)
    for name, value in state.items():
        assert (value.double().cpu() - alone[name].double().cpu()).abs().max() <= 1e-9, name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_job_trains_with_one_rank_per_gpu(tmp_path, capsys, parallel):
    spec = {
        "model": CNN,
        "data": IMAGES,
        "num_workers": WORKERS,
        "use_gpu": DEVICE == "cuda",
        "parallel": parallel,
        "global_batch_size": 256,
        "steps": 200,
        "eval_every": 100,
        "optimizer": {"lr": 0.05, "momentum": 0.9},
    }
    results = []
    for name in ("first", "second"):
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
        command = [sys.executable, "-m", "trainer", "spec.yaml", "--output", name]
        began = time.monotonic()
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert run.returncode == 0, run.stdout + run.stderr
        folder = tmp_path / name / "attempt-1"
        progress = json.loads((folder / "progress.json").read_text())
        with capsys.disabled():
            print(
                f"\n{parallel}, {WORKERS} x {DEVICE}: {progress['samples_per_second']:.0f} samples/s, "
                f"{time.monotonic() - began:.0f} s with the start"
            )
        results.append(torch.load(folder / "model.pt", weights_only=True))
        assert len(re.findall(rf"worker \d of {WORKERS} on ", run.stdout)) == WORKERS
    first, second = results
    assert [name for name in first if first[name].numpy().tobytes() != second[name].numpy().tobytes()] == []
