"""Classification of faults where they happen, and selection of the first among its consequences."""

import signal

import pytest
import torch.distributed as dist

from tests.dist import run_on_ranks
from tests.trainer.factories import make_spec, run_here
from tests.trainer.faults import gloo_error
from trainer import failures
from trainer.driver.supervisor import ProcessExit
from trainer.failure_kinds import MAX_MESSAGE_CHARS
from trainer.failures import Death
from trainer.jobspec import Outcome


def record_all(folder, *errors):
    """Record the errors of several workers in order."""
    for rank, error in errors:
        failures.record(folder, error, rank, step=5 + rank)
    return failures.read(folder)


def explain(folder, *errors, deaths=None):
    return failures.explain(record_all(folder, *errors), deaths or {}, step=3)


def test_the_first_failure_is_reported_and_not_its_consequences(tmp_path):
    outcome = explain(tmp_path, (0, gloo_error("closed")), (1, KeyError("weights")), (2, ValueError("later")))
    assert (outcome.cause, outcome.rank, outcome.step) == ("user_code", 1, 6)
    assert outcome.reason == "worker 1: KeyError: 'weights'"
    assert "KeyError: 'weights'" in outcome.traceback


def test_a_death_precedes_the_errors_of_other_workers(tmp_path):
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
def test_failure_kinds_of_exit_statuses(tmp_path, death, cause, reason):
    outcome = explain(tmp_path, (0, gloo_error("closed")), deaths={1: death})
    assert (outcome.cause, outcome.rank) == (cause, 1)
    assert outcome.reason.startswith(reason)


def test_the_first_death_is_the_cause(tmp_path):
    first, second = Death("", exit=exited(7, seconds=1.0)), Death("", exit=exited(1, seconds=2.0))
    assert explain(tmp_path, deaths={0: second, 1: first, 2: Death("")}).reason.startswith("worker 1")


def test_a_hang_is_reported_if_no_worker_died(tmp_path):
    outcome = explain(tmp_path, (1, gloo_error("closed")), (0, gloo_error("timeout")))
    assert (outcome.cause, outcome.rank) == ("hang", 0)


def test_without_a_record_the_failure_is_unknown(tmp_path):
    assert explain(tmp_path).cause == "unknown"
    assert explain(tmp_path, (1, gloo_error("closed"))).cause == "worker_lost"


def test_an_error_is_recorded_before_its_context_exits(tmp_path):
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
    failures.record(tmp_path, gloo_error("closed"), 1, 9)  # during unwinding
    assert failures.read(tmp_path) == seen


def test_an_incomplete_record_is_skipped(tmp_path):
    tmp_path.joinpath("rank-00000.json").write_text('{"rank": 0')
    assert explain(tmp_path, (1, KeyError("weights"))).rank == 1


def test_a_long_traceback_is_truncated_at_the_start(tmp_path):
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
            "worker 0: UnprintableError: <UnprintableError that cannot be shown: its __str__ raised "
            "KeyError>",
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


def test_an_unwritable_folder_does_not_hide_the_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert failures.record(tmp_path / "file", KeyError("weights"), 0, 1) == "worker 0: KeyError: 'weights'"
    assert "could not write the failure record" in capsys.readouterr().out


class Fault:
    """Metrics logger that fails its rank after four steps."""

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
    """Train until some rank fails, and record the error of this rank, as a worker does."""
    try:
        run_here(spec, metrics_logger=Fault(rank))
    except Exception as error:
        failures.record(folder, error, dist.get_rank(), 4)
        raise


@pytest.mark.dist
@pytest.mark.parametrize("norm", ["none", "sync"])
def test_an_error_of_one_rank_is_the_first_failure(tmp_path, norm):
    spec = make_spec(num_workers=3, norm=norm)
    with pytest.raises(KeyError, match="weights"):
        run_on_ranks(train_with_fault, 3, spec, tmp_path, 1, timeout_seconds=20)
    outcome = failures.explain(failures.read(tmp_path), {}, step=4)
    assert (outcome.cause, outcome.rank, outcome.step) == ("user_code", 1, 4)
    assert [failure.is_consequence for failure in failures.read(tmp_path)] == [False, True, True]
