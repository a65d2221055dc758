"""Settings of CUDA and NCCL."""

import os

import pytest
import torch

from tests.trainer.factories import make_spec
from trainer.driver.supervisor import with_defaults
from trainer.gpu import VARIABLES, configure, worker_variables


@pytest.fixture
def kernels():
    """Restore the choice of kernels."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
    torch.use_deterministic_algorithms(False)


def test_workers_get_the_variables_that_their_node_lacks(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert worker_variables(make_spec()) == {}
    for name, value in worker_variables(make_spec(use_gpu=True)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")  # of the node
    assert with_defaults(os.environ).items() >= (VARIABLES | {"NCCL_DEBUG": "INFO"}).items()


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_are_deterministic_unless_the_spec_says_otherwise(kernels, deterministic):
    configure(make_spec(use_gpu=True, deterministic=deterministic))
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.deterministic == deterministic
    assert torch.backends.cudnn.benchmark != deterministic
