"""Exact resume as a property: any interrupted spec ends with the bytes of an uninterrupted run.

Each case is drawn from a seed. `make test` runs one per optimizer and a few on several workers, `make
test-slow` many more.
"""

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.dist import run_on_ranks
from tests.trainer.factories import InterruptedRunError, Interrupting, make_spec, run_here
from trainer.jobspec.optimizers import TORCH_OPTIMIZERS

OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9, "nesterov": True},
    {"name": "adamw"},
    *({"name": f"torch:{name}"} for name in TORCH_OPTIMIZERS),
    {"name": "torch:SGD", "arguments": {"momentum": 0.9, "dampening": 0.1, "fused": True}},
    {"name": "torch:Adam", "arguments": {"amsgrad": True, "foreach": False}},
    {"name": "torch:AdamW", "arguments": {"fused": True}},
    {"name": "torch:ASGD", "arguments": {"foreach": False, "t0": 3, "lambd": 0.01}},
    {"name": "torch:NAdam", "arguments": {"decoupled_weight_decay": True, "foreach": True}},
    {"name": "torch:RMSprop", "arguments": {"momentum": 0.5, "centered": True}},
    {"name": "torch:Adagrad", "arguments": {"initial_accumulator_value": 0.1, "lr_decay": 0.01}},
]
SCHEDULES = [
    {"name": "constant", "warmup_steps": 3},
    {"name": "step", "steps": [4, 9], "factor": 0.5},
    {"name": "exponential", "factor": 0.9},
    {"name": "cosine", "warmup_steps": 2, "final_factor": 0.1},
]
STEPS = 14


def can_be_sharded(optimizer):
    is_fused_sgd = optimizer["name"] == "torch:SGD" and "fused" in optimizer.get("arguments", {})
    return optimizer["name"] != "torch:Adafactor" and not is_fused_sgd


def draw_case(seed, optimizer=None, world_size=1, parallel="ddp"):
    """Draw a spec, and the steps after which its run is interrupted."""
    choose = random.Random(seed)
    if optimizer is None:
        optimizer = choose.choice([one for one in OPTIMIZERS if parallel == "ddp" or can_be_sharded(one)])
    norm = choose.choice(["none", "batch", "sync", "group", "layer"])
    changes = {
        "optimizer": {"lr": 0.02, "weight_decay": choose.choice([0.0, 0.01])} | optimizer,
        "norm": norm,
        "lr_schedule": choose.choice(SCHEDULES),
        "precision": choose.choice(["fp32", "bf16", "fp16", "fp64"]),
        "gradient_accumulation_steps": choose.choice([1, 2, 3]),
        "max_grad_norm": choose.choice([None, 1.0]),
        "model": {
            "name": "mlp",
            "hidden": choose.choice([[16, 16], [7, 5, 9]]),
            "init_std": 0.3,
            "dropout": choose.choice([0.0, 0.3]),
        },
        "evaluation": {"statistics": choose.choice(["moving", "precise", "batch"]), "precise_batches": 3},
        "early_stop": choose.choice([None, {"patience": 50}]),
        "checkpoint": {"every": choose.choice([1, 2, 5]), "keep_best": choose.choice([None, "accuracy"])},
        "probes": choose.choice([{}, {"measure": ["drift", "percentiles"], "every": 3}]),
        "eval_every": choose.choice([3, 7]),
        "data_partition": choose.choice(["iid", "by_label"]),
        "parallel": parallel,
        "num_workers": world_size,
        "steps": STEPS,
        "seed": choose.randrange(1_000),
    }
    interruptions = sorted(choose.sample(range(1, STEPS), choose.choice([1, 2])))
    return make_spec(**changes), interruptions


def assert_resumes_exactly(folder, spec, interruptions):
    """Compare the last checkpoints of an uninterrupted and an interrupted run."""
    run_here(spec, folder / "whole")
    for step in interruptions:
        with pytest.raises(InterruptedRunError):
            run_here(spec, folder / "cut", metrics_logger=Interrupting(step))
    _, notes = run_here(spec, folder / "cut")
    every, before = spec.checkpoint.every, interruptions[-1] - 1
    assert (notes.resumed_from or 0) >= before // every * every  # `keep_best` saves more often
    if not dist.is_initialized() or dist.get_rank() == 0:
        whole, cut = read_last_checkpoint(folder / "whole"), read_last_checkpoint(folder / "cut")
        assert whole.keys() == cut.keys()
        assert {name for name in whole if whole[name] != cut[name]} == set()


def read_last_checkpoint(folder):
    """Return all content of a run's last checkpoint by path; tensors as dtype and bytes."""
    last = max(path.parent for path in folder.glob(f"step-{STEPS:012d}-*/manifest.json"))
    content: dict[str, Any] = {}

    def collect(path, value):
        if isinstance(value, dict):
            for name, part in value.items():
                collect(f"{path}/{name}", part)
        elif isinstance(value, (list, tuple)):
            for number, part in enumerate(value):
                collect(f"{path}/{number}", part)
        elif isinstance(value, torch.Tensor):
            content[path] = (value.dtype, value.numpy().tobytes())
        else:
            content[path] = value

    for file in last.glob("*.pt"):
        collect(file.name, torch.load(file, weights_only=True))
    del content["shared.pt/position/seconds"]
    return content


# torch warns where a loss scale skips the very first step.
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step:UserWarning")


@pytest.mark.parametrize("number", range(len(OPTIMIZERS)), ids=lambda number: OPTIMIZERS[number]["name"])
def test_every_optimizer_resumes_exactly(tmp_path, number):
    assert_resumes_exactly(tmp_path, *draw_case(number, OPTIMIZERS[number]))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("parallel", "optimizer"),
    [
        ("ddp", {"name": "sgd"}),
        ("ddp", {"name": "torch:NAdam"}),
        ("fsdp", {"name": "sgd"}),
        ("fsdp", {"name": "torch:ASGD"}),
        ("fsdp", {"name": "adamw"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_optimizers_resume_exactly_on_two_workers(tmp_path, parallel, optimizer):
    case = draw_case(7, optimizer, world_size=2, parallel=parallel)
    run_on_ranks(assert_resumes_exactly, 2, tmp_path, *case)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_any_spec_resumes_exactly(tmp_path, seed):
    assert_resumes_exactly(tmp_path, *draw_case(seed))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("seed", range(100, 140))
def test_any_spec_resumes_exactly_on_several_workers(tmp_path, seed, world_size, parallel):
    run_on_ranks(assert_resumes_exactly, world_size, tmp_path, *draw_case(seed, None, world_size, parallel))
