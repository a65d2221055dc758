import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import DesyncError, SyncBatchNorm
from syncbn.collectives import reduce
from syncbn.collectives.context import LayerCollectives
from tests.dist import Pool, run_on_ranks
from tests.processes import wait_for_file

pytestmark = pytest.mark.dist
TIMEOUT_SECONDS = 2.5
CULPRIT = 1


class Lost(Exception):  # noqa: N818 - not an error of the package's
    """Raised on purpose by the rank at fault."""


def make_layers():
    layers = nn.ModuleList(SyncBatchNorm(4) for _ in range(3))
    for number, layer in enumerate(layers):
        layer.layer_name = f"norm{number}"
        layer.timeout_seconds = TIMEOUT_SECONDS
    return layers


def step(layers, order=(0, 1, 2), requires_grad=True):
    h = torch.randn(3, 4)
    h = h.requires_grad_(requires_grad)
    for number in order:
        h = layers[number](h)
    if h.requires_grad:
        h.square().sum().backward()


def skip_a_layer(layers):
    step(layers, (0, 2))


def skip_the_last_layer(layers):
    step(layers, (0, 1))


def swap_two_layers(layers):
    step(layers, (1, 0, 2))


def end_early(layers):
    pass


def evaluate(layers):
    layers.eval()
    step(layers)


def fail(layers):
    layers[0](torch.randn(3, 4))
    raise Lost


def need_no_gradient(layers):
    layers.requires_grad_(False)
    step(layers, requires_grad=False)


def commit(fault):
    """Do one good step and a bad one; return the error met, and how long the bad step took."""
    layers = make_layers()
    step(layers)
    dist.barrier()
    started = time.monotonic()
    try:
        if dist.get_rank() == CULPRIT:
            fault(layers)
        else:
            step(layers)
            step(layers)
    except (DesyncError, Lost) as error:
        return error, time.monotonic() - started
    return None, time.monotonic() - started


@pytest.mark.parametrize("world_size", [3])
@pytest.mark.parametrize(
    ("fault", "layer", "phase", "number"),
    [
        (skip_a_layer, "norm1", "forward", 2),
        (skip_the_last_layer, "norm2", "forward", 2),
        (swap_two_layers, "norm0", "forward", 2),
        (end_early, "norm0", "forward", 2),
        (evaluate, "norm0", "forward", 2),
        (fail, "norm1", "forward", 2),
        (need_no_gradient, "norm2", "backward", 2),
    ],
)
def test_every_surviving_rank_says_where_it_waited_and_who_was_missing(
    fault, layer, phase, number, world_size
):
    results = run_on_ranks(commit, world_size, fault)
    for rank, (error, seconds) in enumerate(results):
        if rank == CULPRIT:
            continue
        assert isinstance(error, DesyncError)
        assert (error.layer, error.phase, error.call_number) == (layer, phase, number)
        assert error.missing_ranks == (CULPRIT,)
        assert seconds < TIMEOUT_SECONDS + 2
        for words in (f"layer '{layer}'", phase, f"call {number}", f"not in this call: [{CULPRIT}]"):
            assert words in str(error)


def arrive(delays):
    """Call a layer for the first time, each rank at another moment; None means never."""
    layers = make_layers()
    dist.barrier()
    delay = delays[dist.get_rank()]
    # An absent rank stays until the others have raised; otherwise broken connections would end their waits.
    time.sleep(max(filter(None, delays), default=0) + TIMEOUT_SECONDS + 2 if delay is None else delay)
    if delay is None:
        return None, 0.0
    started = time.monotonic()
    with pytest.raises(DesyncError) as caught:
        step(layers)
    return caught.value.missing_ranks, time.monotonic() - started


@pytest.mark.parametrize("delays", [(0, None, 0), (0, 1.0, 2.0, None)], ids=str)
def test_the_first_call_keeps_to_the_limit_too(delays):
    for rank, (missing, seconds) in enumerate(run_on_ranks(arrive, len(delays), delays)):
        if delays[rank] is not None:
            assert len(delays) - 1 in missing or CULPRIT in missing
            assert seconds < TIMEOUT_SECONDS + 2


def survive(path, destroy_after):
    def die(layers):
        (path / "died").touch()
        os._exit(3)

    def destroy():
        wait_for_file(path / "died")
        time.sleep(destroy_after)
        dist.destroy_process_group()

    if destroy_after is not None and dist.get_rank() != CULPRIT:
        threading.Thread(target=destroy, daemon=True).start()
    error, seconds = commit(die)
    assert isinstance(error, DesyncError)
    (path / "survivor").write_text(f"{error.layer} {error.missing_ranks} {seconds < TIMEOUT_SECONDS + 2}")


@pytest.mark.parametrize("destroy_after", [None, 0.5])
def test_a_rank_that_dies_is_missed_at_once_and_also_where_the_launcher_then_destroys_the_group(
    tmp_path, destroy_after
):
    pool = Pool(outcome_grace_seconds=4)
    with pytest.raises(EOFError, match="rank 1 died"):
        pool.run(survive, 2, (tmp_path, destroy_after), 40.0)
    assert (tmp_path / "survivor").read_text() == "norm0 (1,) True"


def destroy_and_tell():
    call = LayerCollectives("norm0").next_call("forward", dist.group.WORLD)
    dist.destroy_process_group()
    return reduce._desync(call, "broken")


def test_a_call_whose_group_is_gone_is_still_named():
    error = run_on_ranks(destroy_and_tell, 1)[0]
    assert (error.layer, error.phase, error.call_number, error.missing_ranks) == ("norm0", "forward", 1, ())
    assert "the process group was destroyed" in str(error)


def call_in_order():
    """Take far longer than a rank's patience, but less than the limit, and go on as if nothing had been."""
    layers = make_layers()
    for _ in range(2):
        if dist.get_rank() == CULPRIT:
            time.sleep(1.5)
        step(layers)
    return layers.state_dict()


def test_a_slow_rank_is_waited_for():
    first, second = run_on_ranks(call_in_order, 2)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_limit_comes_from_the_environment(monkeypatch):
    assert SyncBatchNorm(3).timeout_seconds == 300
    monkeypatch.setenv("SYNCBN_TIMEOUT_SECONDS", "7.5")
    assert SyncBatchNorm(3).timeout_seconds == 7.5


def name_layers_before_and_after():
    names = {SyncBatchNorm(3).layer_name for _ in range(2)}
    dist.destroy_process_group()
    names_without = [SyncBatchNorm(3).layer_name for _ in range(2)]
    return len(names), len({*names, *names_without})


def test_layers_made_before_and_with_a_process_group_have_different_names():
    assert run_on_ranks(name_layers_before_and_after, 1) == [(2, 4)]
