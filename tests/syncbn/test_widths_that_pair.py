"""Calls that torch.distributed pairs although they are not of one kind: other widths, other dtypes, other callers.

gloo ends a process which receives more bytes than it waits for (std::terminate), and no code of ours runs in it any more.
What is tested is that nobody hangs and nobody gets a result, and that all ranks raise where torch compares the calls first.
"""

import time

import pytest
import torch
import torch.distributed as dist

from syncbn import DesyncError, SyncBatchNorm
from tests.dist import Pool, run_on_ranks
from tests.syncbn.counting import record_collectives

pytestmark = pytest.mark.dist
TIMEOUT_SECONDS = 1.5
NARROW, WIDE = 4, 8


def make_layer(channels, name):
    layer = SyncBatchNorm(channels)
    layer.layer_name = name
    layer.timeout_seconds = TIMEOUT_SECONDS
    return layer


def catch(function, *arguments):
    """Call a function that ends by DesyncError, in time; return the error."""
    started = time.monotonic()
    with pytest.raises(DesyncError) as caught:
        function(*arguments)
    assert time.monotonic() - started < TIMEOUT_SECONDS + 2
    return caught.value


def meet_another_width(widths):
    channels = widths[dist.get_rank()]
    layer = make_layer(channels, f"of {channels}")
    return catch(layer, torch.randn(3, channels))


def report_another_width(path, widths):
    error = meet_another_width(widths)
    (path / str(dist.get_rank())).write_text(f"{error.layer}, missing {error.missing_ranks}")


@pytest.mark.parametrize("widths", [[WIDE, NARROW], [NARROW, WIDE, WIDE]], ids=str)
def test_ranks_of_the_wider_layer_miss_the_one_of_the_narrower(widths, tmp_path):
    pool = Pool(grace_seconds=TIMEOUT_SECONDS + 2)
    try:
        pool.run(report_another_width, len(widths), (tmp_path, widths), 30.0)
    except EOFError as error:
        assert str(error) == f"rank {widths.index(NARROW)} died, exit code -6"
    finally:
        pool.close()
    for rank, channels in enumerate(widths):
        if channels == WIDE:
            assert (tmp_path / str(rank)).read_text() == f"of {WIDE}, missing ({widths.index(NARROW)},)"


def meet_another_dtype():
    layer = make_layer(NARROW, "norm")
    return catch(layer, torch.randn(3, NARROW, dtype=[torch.float64, torch.float32][dist.get_rank()]))


def test_ranks_whose_inputs_differ_in_dtype_do_not_pair():
    for error in run_on_ranks(meet_another_dtype, 2):
        assert (error.layer, error.phase, error.call_number) == ("norm", "forward", 1)


def test_all_ranks_raise_where_torch_compares_the_calls(monkeypatch):
    monkeypatch.setenv("TORCH_DISTRIBUTED_DEBUG", "DETAIL")
    pool = Pool(grace_seconds=TIMEOUT_SECONDS + 2)
    try:
        errors = pool.run(meet_another_width, 2, ([NARROW, WIDE],), 30.0) + pool.run(meet_another_dtype, 2, (), 30.0)
    finally:
        pool.close()
    for error in errors:
        assert "Detected mismatch between collectives on ranks" in str(error)


def skip_a_layer_of_float64(channels):
    """Have rank 0's reduction of gradients stand opposite the gathering of the layer that it skips."""
    first, second = (make_layer(channels, name) for name in ("first", "second"))

    def step(last):
        x = torch.randn(3, channels, dtype=torch.float64, requires_grad=True)
        last(first(x)).square().sum().backward()

    step(second)
    return catch(step, second if dist.get_rank() else torch.nn.Identity())


def test_gathering_and_reducing_do_not_pair():
    errors = run_on_ranks(skip_a_layer_of_float64, 2, NARROW)
    assert [(error.layer, error.phase, error.call_number) for error in errors] == [
        ("first", "backward", 2),
        ("second", "forward", 2),
    ]
    assert [error.missing_ranks for error in errors] == [(1,), (0,)]


def meet_a_collective_of_the_same_length():
    layer = make_layer(NARROW, "norm")
    with record_collectives() as issued:
        layer(torch.randn(3, NARROW))
    if dist.get_rank() == 0:
        ((_, length),) = issued
        dist.all_reduce(torch.ones(length // 8, dtype=torch.float64), async_op=True)
        time.sleep(TIMEOUT_SECONDS + 1)  # stays, so that the other rank is not told by the end of the connection
        return None
    return catch(layer, torch.randn(3, NARROW))


def test_a_collective_of_somebody_else_is_not_taken_for_the_layers():
    pool = Pool()
    try:
        _, error = pool.run(meet_a_collective_of_the_same_length, 2, (), 30.0)
    finally:
        pool.close()
    assert (error.layer, error.phase, error.missing_ranks) == ("norm", "forward", (0,))
