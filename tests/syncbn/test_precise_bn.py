import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn import InputError, SyncBatchNorm, update_population_statistics
from tests.dist import run_on_ranks


def take_statistics(batches):
    torch.manual_seed(0)
    dropout = nn.Dropout(0.0).eval()
    model = nn.Sequential(
        nn.Linear(3, 4, dtype=torch.float64), SyncBatchNorm(4, dtype=torch.float64), dropout
    )
    parameters = [parameter.clone() for parameter in model.parameters()]
    own = [batch.tensor_split([2])[dist.get_rank()] for batch in batches]
    update_population_statistics(model, own)
    assert (model.training, dropout.training) == (True, False)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), parameters, strict=True))
    return model.state_dict()


@pytest.mark.dist
def test_batches_count_by_the_values_that_all_ranks_have():
    batches = [torch.randn(count, 3, dtype=torch.float64) for count in (6, 2, 5, 0)]
    torch.manual_seed(0)
    linear = nn.Linear(3, 4, dtype=torch.float64)
    hidden = [linear(batch) for batch in batches[:3]]
    mean = sum(len(h) * h.mean(0) for h in hidden) / 13
    variance = sum(len(h) * h.var(0) for h in hidden) / 13
    for state in run_on_ranks(take_statistics, 2, batches):
        torch.testing.assert_close(state["1.running_mean"], mean.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state["1.running_var"], variance.detach(), rtol=1e-12, atol=1e-12)
        assert state["1.num_batches_tracked"] == 3


def test_without_a_batch_nothing_changes():
    model = nn.Sequential(SyncBatchNorm(3), SyncBatchNorm(3, track_running_stats=False)).eval()
    with pytest.raises(InputError, match="at least one batch"):
        update_population_statistics(model, [])
    assert not model.training
    torch.testing.assert_close(model.state_dict()["0.running_var"], torch.ones(3))


def test_an_error_midway_leaves_the_buffers():
    layer = SyncBatchNorm(3)
    with pytest.raises(InputError, match=r"2 for an input of shape \(4, 2\)"):
        update_population_statistics(layer, [torch.randn(4, 3), torch.randn(4, 2)])
    torch.testing.assert_close(layer.state_dict(), SyncBatchNorm(3).state_dict(), rtol=0, atol=0)
