import pytest
import torch
from torch import nn

from trainer.checkpoint.state_dict import (
    gather_model_state,
    gather_optimizer_state,
    load_model_state,
    load_optimizer_state,
)

OPTIMIZERS = [
    lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.NAdam(parameters),
    lambda parameters: torch.optim.ASGD(parameters),
]


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_restored_optimizer_takes_the_same_steps(make):
    torch.manual_seed(0)
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    ours = make(first.parameters())
    step(first, ours)
    theirs = make(second.parameters())
    step(second, theirs)  # another state, which must be replaced
    load_model_state(second, gather_model_state(first, keep=True))
    load_optimizer_state(theirs, gather_optimizer_state(ours, keep=True))
    for _ in range(2):
        step(first, ours)
        step(second, theirs)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_copy_is_kept_only_on_request():
    model = nn.Linear(3, 2)
    kept = gather_model_state(model, keep=True)
    with torch.no_grad():
        model.weight.zero_()
    assert kept["weight"].abs().sum() > 0
    assert gather_model_state(model, keep=False) == {}
