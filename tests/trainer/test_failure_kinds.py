import errno
import signal

import pytest
import torch
import torch.distributed as dist

from syncbn import DesyncError
from tests.trainer.faults import gloo_error
from trainer.errors import ConfigurationError, DataError, DataTimeoutError, Diverged, Preempted, StorageError
from trainer.failure_kinds import classify, classify_exit, printable


def caused(error, cause):
    """Return an error like `raise error from cause`."""
    error.__cause__ = cause
    return error


def ray_error(name):
    """Return an error of Ray without importing Ray, which other tests do in their own environment."""
    return type(name, (Exception,), {"__module__": "ray.exceptions"})("of Ray")


@pytest.mark.parametrize(
    ("error", "cause", "is_consequence"),
    [
        (KeyError("weights"), "user_code", False),
        (ValueError("Expected input batch_size (3) to match target batch_size (4)."), "user_code", False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), "user_code", False),
        (AttributeError("'NoneType' object has no attribute 'shape'"), "user_code", False),
        (TypeError("the request timed out of its type"), "user_code", False),
        (ConfigurationError("model.name", "torchvision:resnet19", "must be a model"), "configuration", False),
        (DataError("data.root", "/nowhere", "must be a folder"), "data", False),
        (Diverged(7, "the training loss is not finite"), "diverged", False),
        (Preempted(7), "preempted", False),
        (StorageError("the checkpoint of step 2 could not be written"), "worker_lost", False),
        (RuntimeError("DataLoader timed out after 120 seconds"), "hang", False),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "out_of_memory", False),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "unknown", False),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. "),
            "user_code",
            False,
        ),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), "out_of_memory", False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory", False),
        (RuntimeError("std::bad_alloc"), "out_of_memory", False),
        (OSError(errno.ENOSPC, "No space left on device"), "worker_lost", False),
        (OSError(errno.ESTALE, "Stale file handle"), "worker_lost", False),
        (FileNotFoundError(errno.ENOENT, "No such file", "weights.pt"), "user_code", False),
        (ValueError("ran out of memory slots"), "user_code", False),
        (SystemExit(7), "user_code", False),
        (KeyboardInterrupt(), "user_code", False),
        (RuntimeError("CUDA error: device-side assert triggered"), "user_code", False),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "worker_lost", False),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory", False),
        (ray_error("RayTaskError"), "unknown", False),
        (DataTimeoutError("Ray Data had no batch within 300 seconds"), "hang", False),
        (TimeoutError("read timed out"), "user_code", False),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "user_code", False),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "user_code", False),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "user_code", False),
        (RuntimeError("could not reach feature store: request timeout"), "user_code", False),
        (RuntimeError("feature store: connection reset by peer"), "user_code", False),
        (RuntimeError("rendezvous with the licence server timed out"), "user_code", False),
        (ray_error("ActorDiedError"), "worker_lost", False),
        (ray_error("OutOfMemoryError"), "out_of_memory", False),
        (MemoryError(), "out_of_memory", False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory", False),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "out_of_memory",
            False,
        ),
        (gloo_error("closed"), "worker_lost", True),
        (gloo_error("reset"), "worker_lost", True),
        (gloo_error("timeout"), "hang", True),
        (gloo_error("application"), "hang", True),
        (ValueError("Default process group has not been initialized, please make sure"), "worker_lost", True),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), "worker_lost", True),
        (
            RuntimeError("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3) ran for 30000 ms"),
            "hang",
            True,
        ),
        (
            dist.DistNetworkError("The client socket has timed out after 60000ms while connecting to store"),
            "hang",
            True,
        ),
        (dist.DistStoreError("wait timeout after 2000ms, keys: /x"), "hang", True),
        (
            dist.DistNetworkError(
                "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown "
                "or crash?"
            ),
            "worker_lost",
            True,
        ),
        (dist.DistNetworkError("Broken pipe"), "worker_lost", True),
        (caused(StorageError("a checkpoint was not written"), gloo_error("closed")), "worker_lost", True),
        (caused(StorageError("a checkpoint was not written"), OSError(errno.EIO, "")), "worker_lost", False),
        (DesyncError("layer norm1 waits for ranks 1", "norm1", "forward", 3, (1,)), "hang", True),
        (
            DesyncError(f"broken after 0.2 s ({gloo_error('reset')})", "1", "forward", 3, ()),
            "worker_lost",
            True,
        ),
    ],
)
def test_failure_kinds_of_errors(error, cause, is_consequence):
    assert classify(error) == (cause, is_consequence)


def test_a_destroyed_process_group_is_a_lost_worker():
    with pytest.raises(ValueError, match="process group") as error:
        dist.barrier()
    assert classify(error.value) == ("worker_lost", True)


def test_a_real_allocation_that_is_too_large():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert classify(error.value)[0] == "out_of_memory"


def test_a_signal_without_a_rule_is_unknown():
    assert classify_exit(-signal.SIGUSR1) == "unknown"


def test_text_is_sanitised():
    assert printable("é \U0001f600 \ud83d\ude00") == "é \U0001f600 \U0001f600"
