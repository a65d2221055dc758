import pytest

from trainer.spec import JobSpec, min_worker_bytes


def need(**changes):
    return min_worker_bytes(
        JobSpec.model_validate({"steps": 1, "num_workers": 1, "data": {"name": "digits"}} | changes)
    )


MLP = {"name": "mlp", "hidden": [100]}
WEIGHTS = 64 * 100 + 100 * 10
BATCH = 60 * 64 * 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": MLP}, WEIGHTS * 4 * 2 + BATCH),
        ({"model": MLP, "optimizer": {"name": "sgd", "momentum": 0.9}}, WEIGHTS * 4 * 3 + BATCH),
        ({"model": MLP, "optimizer": {"name": "adamw"}}, WEIGHTS * 4 * 4 + BATCH),
        ({"model": MLP, "precision": "fp64"}, 2 * (WEIGHTS * 4 * 2 + BATCH)),
        ({"model": MLP, "num_workers": 2}, WEIGHTS * 4 * 2 + BATCH // 2),
        ({"model": MLP, "num_workers": 2, "parallel": "fsdp"}, WEIGHTS * 4 + BATCH // 2),
        ({"model": MLP, "accumulate": 3}, WEIGHTS * 4 * 2 + BATCH // 3),
        ({"model": {"name": "cnn", "channels": [8, 16]}}, ((8 + 8 * 16) * 9 + 16 * 10) * 4 * 2 + BATCH),
        ({"model": {"name": "timm:resnet26"}}, BATCH),
    ],
)
def test_weights_gradients_state_and_a_batch_are_counted(changes, expected):
    assert need(**changes) == expected


def test_generated_data_is_counted():
    data = {"name": "synthetic", "shape": [3, 8, 8], "classes": 2, "train_samples": 1_000, "test_samples": 500}
    assert need(model={"name": "timm:resnet26"}, data=data) == (1_500 + 60) * 3 * 8 * 8 * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"name": "mlp", "hidden": [65_536] * 64}},
        {"model": {"name": "timm:resnet26"}, "data": {"name": "synthetic", "shape": [65_536] * 4, "classes": 2}},
        {"data": {"name": "imagefolder", "root": "/x", "transform": {"crop": 224}}, "global_batch_size": 10**9},
    ],
)
def test_what_no_machine_has_is_more_than_a_terabyte(changes):
    assert need(**changes) > 10**12 / 4
