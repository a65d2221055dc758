"""Calls that torch.distributed would pair although they are not of one kind: other widths, other dtypes,
other callers.

gloo ends a process which receives more bytes than it waits for (std::terminate). Nobody ends here, and nobody
gets a result.
"""

import time

import pytest
import torch
import torch.distributed as dist

from syncbn import DesyncError, SyncBatchNorm
from tests.dist import Pool, run_on_ranks
from tests.syncbn.collective_recorder import record_collectives

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


@pytest.mark.parametrize("widths", [[WIDE, NARROW], [NARROW, WIDE, WIDE]], ids=str)
def test_ranks_in_layers_of_different_widths_all_raise(widths):
    for rank, error in enumerate(run_on_ranks(meet_another_width, len(widths), widths)):
        assert error.layer == f"of {widths[rank]}"
        assert error.missing_ranks == tuple(
            other for other, channels in enumerate(widths) if channels != widths[rank]
        )
        assert all(
            f"Rank {other} is in of {widths[other]}, forward, call 1" in str(error)
            for other in error.missing_ranks
        )


def skip_a_wide_layer(wide_first):
    """Have rank 0's backward, or its next forward, stand opposite the forward of the layer that it skips."""
    layers = [make_layer(NARROW, "narrow"), make_layer(NARROW, "last")]
    widen, narrow = torch.nn.Linear(NARROW, WIDE), torch.nn.Linear(WIDE, NARROW)
    wide = torch.nn.Sequential(widen, make_layer(WIDE, "wide"), narrow)

    def step(skip):
        x = torch.randn(3, NARROW, requires_grad=True)
        parts = [wide, *layers] if wide_first else [*layers, wide]
        for part in parts:
            x = x if part is wide and skip else part(x)
        x.square().sum().backward()

    norms = [
        module for part in (wide, *layers) for module in part.modules() if isinstance(module, SyncBatchNorm)
    ]
    for norm in norms:
        norm.timeout_seconds = 30
    step(skip=False)
    for norm in norms:
        norm.timeout_seconds = TIMEOUT_SECONDS
    return catch(step, dist.get_rank() == 0)


@pytest.mark.parametrize("wide_first", [True, False])
def test_a_skipped_layer_of_another_width_is_named_on_every_rank(wide_first):
    skipper, *others = run_on_ranks(skip_a_wide_layer, 3, wide_first)
    assert (skipper.layer, skipper.phase) == (("narrow", "forward") if wide_first else ("last", "backward"))
    assert skipper.missing_ranks == (1, 2)
    for error in others:
        assert (error.layer, error.phase, error.call_number, error.missing_ranks) == (
            "wide",
            "forward",
            2,
            (0,),
        )


def meet_another_dtype():
    layer = make_layer(NARROW, "norm")
    return catch(layer, torch.randn(3, NARROW, dtype=[torch.float64, torch.float32][dist.get_rank()]))


def test_ranks_whose_inputs_differ_in_dtype_do_not_pair():
    for rank, error in enumerate(run_on_ranks(meet_another_dtype, 2)):
        phase = ["forward in float64", "forward"][rank]
        assert (error.layer, error.phase, error.call_number) == ("norm", phase, 1)
        assert error.missing_ranks == (1 - rank,)


def test_all_ranks_raise_where_torch_compares_the_calls():
    pool = Pool(outcome_grace_seconds=TIMEOUT_SECONDS + 2, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    try:
        errors = pool.run(meet_another_width, 2, ([NARROW, WIDE],), 30.0) + pool.run(
            meet_another_dtype, 2, (), 30.0
        )
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
        ("second", "forward in float64", 2),
    ]
    assert [error.missing_ranks for error in errors] == [(1,), (0,)]


def meet_a_collective_of_somebody_else(length):
    layer = make_layer(NARROW, "norm")
    with record_collectives() as issued:
        layer(torch.randn(3, NARROW))
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(length or issued[0][1] // 8, dtype=torch.float64), async_op=True)
        time.sleep(
            TIMEOUT_SECONDS + 1
        )  # stays, so that the other rank is not told by the end of the connection
        return None
    return catch(layer, torch.randn(3, NARROW))


@pytest.mark.parametrize("length", [None, 1, 1000])
def test_a_collective_of_somebody_else_is_not_taken_for_the_layers(length):
    pool = Pool()
    try:
        _, error = pool.run(meet_a_collective_of_somebody_else, 2, (length,), 30.0)
    finally:
        pool.close()
    assert (error.layer, error.phase, error.missing_ranks) == ("norm", "forward", (0,))
