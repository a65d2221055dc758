"""Settings of CUDA and NCCL for the workers of a job.

None of them has run on a GPU yet; the reasons are from the documentation of torch and NCCL.
"""

from trainer.driver.supervisor import DEFAULT_PREFIX
from trainer.jobspec import JobSpec

VARIABLES = {
    # Batches of other sizes (the last one, evaluation) otherwise split the memory into pieces.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # cuBLAS needs a fixed workspace to add in the same order in each call.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # The worker's log then names the failed call and the peer, instead of "unhandled system error".
    "NCCL_DEBUG": "WARN",
    # A lost rank aborts the communicator in all others, which end with an error and not as a hang.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}
"""Variables that must be set before a worker starts; a node's own values take precedence."""


def worker_variables(spec: JobSpec) -> dict[str, str]:
    """Return the variables for a job's workers, as defaults of their nodes."""
    return {f"{DEFAULT_PREFIX}{name}": value for name, value in VARIABLES.items()} if spec.use_gpu else {}


def configure(spec: JobSpec) -> None:
    """Choose the kernels of this worker.

    With `deterministic`, the same spec gives the same bits on the same GPUs, as exact resume requires.
    Otherwise cuDNN measures which kernels are fastest for the sizes that it meets.
    """
    import torch

    torch.backends.cudnn.benchmark = not spec.deterministic
    torch.backends.cudnn.deterministic = spec.deterministic
    # Operators without a deterministic kernel warn, and run; with them the bits may differ.
    torch.use_deterministic_algorithms(spec.deterministic, warn_only=True)
