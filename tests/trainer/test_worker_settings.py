"""Settings of memory allocation, CUDA and NCCL."""

import pytest
import torch

from tests.trainer.factories import make_spec
from trainer.driver.supervisor import DEFAULT_PREFIX, with_defaults
from trainer.worker_settings import CPU_VARIABLES, GPU_VARIABLES, configure, worker_variables


@pytest.fixture
def kernels():
    """Restore the choice of kernels."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    yield
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("use_gpu", "variables", "of_node"),
    [
        (True, GPU_VARIABLES, {"NCCL_DEBUG": "INFO"}),
        (False, CPU_VARIABLES, {"MALLOC_TRIM_THRESHOLD_": "131072"}),
    ],
)
def test_workers_get_the_variables_that_their_node_lacks(use_gpu, variables, of_node):
    defaults = worker_variables(make_spec(use_gpu=use_gpu))
    assert defaults == {f"{DEFAULT_PREFIX}{name}": value for name, value in variables.items()}
    assert with_defaults(defaults | of_node).items() >= (variables | of_node).items()


@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_are_deterministic_unless_the_spec_says_otherwise(kernels, deterministic):
    configure(make_spec(use_gpu=True, deterministic=deterministic))
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.deterministic == deterministic
    assert torch.backends.cudnn.benchmark != deterministic
