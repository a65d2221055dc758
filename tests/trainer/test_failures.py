"""Faults of all kinds, each classified where it happens, and the first of several found among its consequences."""

import errno
import signal

import pytest
import torch
import torch.distributed as dist

from syncbn import DesyncError
from tests.dist import run_on_ranks
from tests.trainer.factories import make_spec, run_here
from trainer import failures
from trainer.driver.supervisor import ProcessExit
from trainer.errors import ConfigurationError, DataError, DataTimeoutError, Diverged, Preempted, StorageError
from trainer.failure_kinds import MAX_MESSAGE_CHARS, classify, classify_exit, printable
from trainer.failures import Death
from trainer.jobspec import Outcome


def gloo_error(kind):
    """What gloo says when a peer is gone, or stays away."""
    words = {
        "closed": "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5000",
        "reset": "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:5000: Connection reset by peer",
        "timeout": "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for recv",
        "application": "[../third_party/gloo/gloo/transport/tcp/pair.cc:161] Application timeout caused pair closure",
    }
    return RuntimeError(words[kind])


def caused(error, cause):
    """Return an error as `raise error from cause` makes it."""
    error.__cause__ = cause
    return error


def ray_error(name):
    """An error as Ray's workers raise it, made without importing Ray, which other tests do in an environment of theirs."""
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
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. "), "user_code", False),
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
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory", False),
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
                "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
            ),
            "worker_lost",
            True,
        ),
        (dist.DistNetworkError("Broken pipe"), "worker_lost", True),
        (caused(StorageError("a checkpoint was not written"), gloo_error("closed")), "worker_lost", True),
        (caused(StorageError("a checkpoint was not written"), OSError(errno.EIO, "")), "worker_lost", False),
        (DesyncError("layer norm1 waits for ranks 1", "norm1", "forward", 3, (1,)), "hang", True),
    ],
)
def test_causes(error, cause, is_consequence):
    assert classify(error) == (cause, is_consequence)


def test_a_process_group_that_was_destroyed_meanwhile():
    with pytest.raises(ValueError, match="process group") as error:
        dist.barrier()
    assert classify(error.value) == ("worker_lost", True)


def test_a_real_allocation_that_is_too_large():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert classify(error.value)[0] == "out_of_memory"


def record_all(folder, *errors):
    """Record one worker's error after the other's."""
    for rank, error in errors:
        failures.record(folder, error, rank, step=5 + rank)
    return failures.read(folder)


def explain(folder, *errors, deaths=None):
    return failures.explain(record_all(folder, *errors), deaths or {}, step=3)


def test_the_first_failure_is_told_and_not_what_it_drew_after_it(tmp_path):
    outcome = explain(tmp_path, (0, gloo_error("closed")), (1, KeyError("weights")), (2, ValueError("later")))
    assert (outcome.cause, outcome.rank, outcome.step) == ("user_code", 1, 6)
    assert outcome.reason == "worker 1: KeyError: 'weights'"
    assert "KeyError: 'weights'" in outcome.traceback


def test_a_death_comes_before_the_errors_of_those_that_noticed(tmp_path):
    outcome = explain(
        tmp_path, (0, gloo_error("reset")), (2, gloo_error("timeout")), deaths={1: Death("The actor died")}
    )
    assert (outcome.cause, outcome.rank, outcome.step) == ("worker_lost", 1, 3)
    assert "The actor died" in outcome.reason


def exited(status, *, seconds=1.0, **more):
    return ProcessExit(host="a", pid=7, status=status, seconds=seconds, **more)


@pytest.mark.parametrize(
    ("death", "cause", "reason"),
    [
        (Death("The actor died", exit=exited(0)), "user_code", "worker 1: its process ended with status 0"),
        (Death("The actor died", exit=exited(7)), "user_code", "worker 1: its process ended with status 7"),
        (
            Death("The actor died", exit=exited(-signal.SIGSEGV)),
            "user_code",
            "worker 1: its process was killed by signal 11 (Segmentation fault)",
        ),
        (
            Death("The actor died", exit=exited(-signal.SIGKILL, out_of_memory=True)),
            "out_of_memory",
            "worker 1: its process was killed by signal 9 (Killed): the node was out of memory",
        ),
        (
            Death("Ray's monitor", out_of_memory=True, exit=exited(-signal.SIGKILL)),
            "out_of_memory",
            "worker 1: its process was killed by signal 9 (Killed): the node was out of memory",
        ),
        (Death("Ray's monitor", out_of_memory=True), "out_of_memory", "worker 1 was lost: Ray's monitor"),
        (
            Death("The actor died", exit=exited(-signal.SIGKILL)),
            "worker_lost",
            "worker 1: its process was killed by signal 9 (Killed)",
        ),
        (
            Death("The process receives a SIGTERM.", exit=exited(0)),
            "worker_lost",
            "worker 1: its process ended with status 0 upon signal 15 (Terminated)",
        ),
        (
            Death("The actor died", exit=exited(1, orphaned=True)),
            "worker_lost",
            "worker 1: its process ended with status 1 after its node's Ray had ended",
        ),
        (
            Death("The actor died", exit=exited(-signal.SIGABRT)),
            "unknown",
            "worker 1: its process was killed by signal 6",
        ),
        (Death("The node died"), "worker_lost", "worker 1 was lost: The node died"),
    ],
)
def test_kinds_of_deaths(tmp_path, death, cause, reason):
    outcome = explain(tmp_path, (0, gloo_error("closed")), deaths={1: death})
    assert (outcome.cause, outcome.rank) == (cause, 1)
    assert outcome.reason.startswith(reason)


def test_the_first_death_is_the_cause(tmp_path):
    first, second = Death("", exit=exited(7, seconds=1.0)), Death("", exit=exited(1, seconds=2.0))
    assert explain(tmp_path, deaths={0: second, 1: first, 2: Death("")}).reason.startswith("worker 1")


def test_a_signal_without_a_rule_is_unknown():
    assert classify_exit(-signal.SIGUSR1) == "unknown"


def test_a_hang_is_told_where_nobody_died(tmp_path):
    outcome = explain(tmp_path, (1, gloo_error("closed")), (0, gloo_error("timeout")))
    assert (outcome.cause, outcome.rank) == ("hang", 0)


def test_what_nobody_recorded_is_unknown(tmp_path):
    assert explain(tmp_path).cause == "unknown"
    assert explain(tmp_path, (1, gloo_error("closed"))).cause == "worker_lost"


def test_an_error_is_recorded_before_what_is_around_it_is_left(tmp_path):
    from contextlib import ExitStack

    from trainer.checkpoint.state import TrainProgress

    seen = []

    def fail():
        with ExitStack() as stack:
            stack.callback(lambda: seen.extend(failures.read(tmp_path)))
            stack.enter_context(failures.recorded(tmp_path, 1, TrainProgress(step=3)))
            raise KeyError("weights")

    with pytest.raises(KeyError):
        fail()
    assert [(failure.cause, failure.rank, failure.step) for failure in seen] == [("user_code", 1, 3)]
    failures.record(tmp_path, gloo_error("closed"), 1, 9)  # on the way out
    assert failures.read(tmp_path) == seen


def test_half_a_record_is_passed_by(tmp_path):
    tmp_path.joinpath("rank-00000.json").write_text('{"rank": 0')
    assert explain(tmp_path, (1, KeyError("weights"))).rank == 1


def test_a_long_traceback_keeps_its_end(tmp_path):
    outcome = explain(tmp_path, (0, ValueError("x" * 100_000 + " the end")))
    assert outcome.traceback.endswith("the end\n")
    assert len(outcome.traceback) <= failures.MAX_TRACEBACK_CHARS
    assert Outcome.model_validate_json(outcome.model_dump_json()) == outcome


class UnprintableError(Exception):
    def __str__(self):
        raise KeyError("no text")


class Nameless(type):
    @property
    def __module__(cls):
        raise KeyError("no module")


class Strange(BaseException, metaclass=Nameless):
    @property
    def cause(self):
        raise KeyError("no cause")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("\ud800"), "worker 0: ValueError: \ufffd"),
        (ValueError("a\0b"), "worker 0: ValueError: a\ufffdb"),
        (SystemExit(7), "worker 0: SystemExit: exit code 7"),
        (SystemExit("\udcff"), "worker 0: SystemExit: exit code \ufffd"),
        (
            UnprintableError(),
            "worker 0: UnprintableError: <UnprintableError that cannot be shown: its __str__ raised KeyError>",
        ),
        (Strange(), "worker 0: an error that cannot be shown"),
        (ValueError(ValueError("\ud800")), "worker 0: ValueError: \ufffd"),
    ],
)
def test_every_error_can_be_recorded(tmp_path, error, reason):
    outcome = explain(tmp_path, (0, error))
    assert (outcome.cause, outcome.reason) == ("user_code", reason)
    assert Outcome.model_validate_json(outcome.model_dump_json()) == outcome


def test_a_huge_message_is_bounded(tmp_path):
    outcome = explain(tmp_path, (0, ValueError("begin" + "x" * 10_000_000 + "end")))
    assert len(outcome.reason) <= MAX_MESSAGE_CHARS + 100
    assert outcome.reason.startswith("worker 0: ValueError: begin")
    assert outcome.reason.endswith("end")


def test_a_folder_that_cannot_be_written_hides_no_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert failures.record(tmp_path / "file", KeyError("weights"), 0, 1) == "worker 0: KeyError: 'weights'"
    assert "could not be written" in capsys.readouterr().out


def test_text_keeps_what_can_be_kept():
    assert printable("é \U0001f600 \ud83d\ude00") == "é \U0001f600 \U0001f600"


class Fault:
    """A journal that makes its rank fail after four steps."""

    def __init__(self, rank):
        self.rank = rank

    def resume(self, *_):
        pass

    def log(self, *_):
        pass

    def update(self, step):
        if step != 4 or dist.get_rank() != self.rank:
            return
        raise KeyError("weights")


def train_with_fault(spec, folder, rank):
    """Train until some rank fails, and record what this one meets, as a worker does."""
    try:
        run_here(spec, journal=Fault(rank))
    except Exception as error:
        failures.record(folder, error, dist.get_rank(), 4)
        raise


@pytest.mark.dist
@pytest.mark.parametrize("norm", ["none", "sync"])
def test_an_error_on_one_rank_is_told_apart_from_those_of_the_others(tmp_path, norm):
    spec = make_spec(num_workers=3, norm=norm)
    with pytest.raises(KeyError, match="weights"):
        run_on_ranks(train_with_fault, 3, spec, tmp_path, 1, timeout_seconds=20)
    outcome = failures.explain(failures.read(tmp_path), {}, step=4)
    assert (outcome.cause, outcome.rank, outcome.step) == ("user_code", 1, 4)
    assert [failure.is_consequence for failure in failures.read(tmp_path)] == [False, True, True]
