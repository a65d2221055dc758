"""Settings of memory allocation, CUDA and NCCL for the workers of a job.

Those of CUDA and NCCL have not run on a GPU yet; their reasons are from the documentation of torch and NCCL.
"""

from trainer.driver.supervisor import DEFAULT_PREFIX
from trainer.jobspec import JobSpec

CPU_VARIABLES = {
    # glibc keeps freed tensors of up to 32 MB, 128 MB at the end of its heap, for the next step. Otherwise it
    # returns them to the system, and each page of 4 KB costs a fault when it is used again.
    # `benchmarks/allocation.py` measures it.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
}
GPU_VARIABLES = {
    # Batches of other sizes (the last one, evaluation) otherwise split the memory into pieces.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # cuBLAS needs a fixed workspace to add in the same order in each call.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # The worker's log then names the failed call and the peer, instead of "unhandled system error".
    "NCCL_DEBUG": "WARN",
    # A lost rank aborts the communicator in all others, which end with an error and not as a hang.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}
"""Variables that must be set before a worker starts. Of both, a node's own values take precedence."""


def worker_variables(spec: JobSpec) -> dict[str, str]:
    """Return the variables for a job's workers, as defaults of their nodes."""
    variables = GPU_VARIABLES if spec.use_gpu else CPU_VARIABLES
    return {f"{DEFAULT_PREFIX}{name}": value for name, value in variables.items()}


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
