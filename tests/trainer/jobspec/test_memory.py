import pytest
import torch
from torch import nn

from trainer.jobspec import JobSpec, ModelSize, min_worker_bytes
from trainer.jobspec.memory import _own_size, _state_copies
from trainer.jobspec.optimizers import TORCH_OPTIMIZERS
from trainer.models import build_model
from trainer.models.size import measure_size
from trainer.training.optim import build_optimizer


def need(**changes):
    return min_worker_bytes(
        JobSpec.model_validate({"steps": 1, "num_workers": 1, "data": {"name": "digits"}} | changes)
    )


MLP = {"name": "mlp", "hidden": [100]}
WEIGHTS = (64 * 100 + 100 * 10) * 4
SAMPLES = 60
BATCH = SAMPLES * 64 * 4
KEPT = SAMPLES * 200 * 4
"""Kept for backward: inputs of the norm and outputs of the activation."""
CNN = {"name": "cnn", "channels": [8, 16], "activation": "relu"}
CNN_WEIGHTS = ((8 + 8 * 16) * 9 + 16 * 10) * 4
CNN_KEPT = SAMPLES * (8 * 64 + 16 * 16) * 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": MLP}, WEIGHTS + KEPT + BATCH),
        (
            {"model": MLP, "norm": "none"},
            WEIGHTS + WEIGHTS + BATCH,
        ),  # its gradients are larger than its activations
        ({"model": MLP | {"activation": "gelu"}}, WEIGHTS + KEPT * 3 // 2 + BATCH),
        ({"model": MLP, "optimizer": {"name": "sgd", "momentum": 0.9}}, WEIGHTS * 2 + KEPT + BATCH),
        ({"model": MLP, "optimizer": {"name": "adamw"}}, WEIGHTS * 3 + KEPT + BATCH),
        ({"model": MLP, "precision": "fp64"}, 2 * (WEIGHTS + KEPT + BATCH)),
        ({"model": MLP, "precision": "bf16"}, WEIGHTS * 2 + BATCH),
        ({"model": MLP, "num_workers": 2}, WEIGHTS * 2 + BATCH // 2),
        ({"model": MLP, "num_workers": 2, "parallel": "fsdp"}, WEIGHTS // 2 + KEPT // 2 + BATCH // 2),
        ({"model": MLP, "gradient_accumulation_steps": 3}, WEIGHTS * 2 + BATCH // 3),
        ({"model": MLP, "compile": True}, WEIGHTS * 2 + BATCH),
        ({"model": MLP, "use_gpu": True, "optimizer": {"name": "adamw"}}, WEIGHTS),
        ({"model": CNN}, CNN_WEIGHTS + 2 * CNN_KEPT + BATCH),
        ({"model": CNN, "norm": "none"}, CNN_WEIGHTS + CNN_KEPT + BATCH),
        ({"model": {"name": "timm:resnet26"}}, BATCH),
    ],
)
def test_memory_counts_weights_state_batch_and_gradients_or_activations(changes, expected):
    assert need(**changes) == expected


def test_a_librarys_model_counts_by_its_measured_size():
    spec = JobSpec.model_validate(
        {"steps": 1, "num_workers": 1, "data": {"name": "digits"}, "model": {"name": "torchvision:resnet18"}}
    )
    size = ModelSize(parameters=1_000, sample_activations=300)
    assert min_worker_bytes(spec, size) == 4 * (1_000 + SAMPLES * 300) + BATCH
    checkpointed = spec.model_copy(update={"activation_checkpointing": True})
    assert min_worker_bytes(checkpointed, size) == 4 * 2 * 1_000 + BATCH


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "gelu"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_saved_activations_of_built_in_networks_match_the_estimate(name, activation, norm):
    """A cnn also keeps the outputs of its pooling, and each network the inputs of its last layer."""
    data = {"name": "synthetic", "shape": [3, 16, 16], "classes": 4, "train_samples": 8, "test_samples": 8}
    spec = JobSpec.model_validate(
        {
            "steps": 1,
            "global_batch_size": 8,
            "model": {"name": name, "activation": activation},
            "data": data,
            "norm": norm,
        }
    )
    model = build_model(spec.model, spec.norm, (3, 16, 16), 4, seed=0).to("meta")
    found = measure_size(model, (3, 16, 16), has_norms=norm != "none").sample_activations
    counted = _own_size(spec, (3, 16, 16)).sample_activations
    assert counted <= found <= 1.35 * counted


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((name, {}) for name in sorted(TORCH_OPTIMIZERS)),
        *((name, {"amsgrad": True}) for name in ("Adam", "AdamW")),
        ("RMSprop", {"momentum": 0.9, "centered": True}),
        ("SGD", {"momentum": 0.9}),
    ],
)
def test_the_optimizer_state_estimate_matches_torch(name, arguments):
    spec = JobSpec.model_validate(
        {"steps": 1, "optimizer": {"name": f"torch:{name}", "arguments": arguments}}
    )
    model = nn.Linear(30, 40)
    optimizer = build_optimizer(spec.optimizer, model)
    model(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    numbers = sum(
        value.numel() for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    copies = numbers / model.weight.numel()
    assert _state_copies(spec) == int(copies)  # Adafactor keeps only a row and a column


def test_generated_data_is_counted():
    data = {
        "name": "synthetic",
        "shape": [3, 8, 8],
        "classes": 2,
        "train_samples": 1_000,
        "test_samples": 500,
    }
    assert need(model={"name": "timm:resnet26"}, data=data) == (1_500 + 60) * 3 * 8 * 8 * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "mlp", "hidden": [65_536] * 64}},
        {
            "model": {"name": "timm:resnet26"},
            "data": {"name": "synthetic", "shape": [65_536] * 4, "classes": 2},
        },
        {
            "data": {"name": "imagefolder", "root": "/x", "transform": {"crop": 224}},
            "global_batch_size": 10**9,
        },
    ],
)
def test_the_estimate_of_impossible_specs_exceeds_any_machine(changes):
    assert need(**changes) > 10**12 / 4
