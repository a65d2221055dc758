"""Biases that a norm makes redundant, and biases that it does not."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import (
    StdConv2d,
)
from torch import nn
from torchvision.ops import Permute

from tests.trainer.norms.test_replace import Calling, randomise, switch
from trainer.jobspec import Norm


class Doubled(nn.Identity):
    """Module that returns its input in evaluation only, like dropout."""

    def forward(self, x):
        return (
            x * torch.tensor([[1.0], [2.0]]).repeat(len(x) // 2, 1)[..., None, None] if self.training else x
        )


BIAS_IS_CANCELLED = {
    "conv, norm": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
    "transposed conv, norm": nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8)),
    "linear, norm": nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8)),
    "conv, other layout, norm": nn.Sequential(nn.Conv2d(3, 8, 3), Permute([0, 2, 3, 1]), nn.LayerNorm(8)),
    "conv, tokens, norm": Calling(
        lambda self, x: self.norm(self.conv(x).flatten(2).transpose(1, 2)),
        conv=nn.Conv2d(3, 8, 2),
        norm=nn.LayerNorm(8),
    ),
    "linear on tokens, norm": nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), nn.LayerNorm(8)),
    "two norms": Calling(
        lambda self, x: (lambda y: self.norm1(y) * self.norm2(y))(self.conv(x)),
        conv=nn.Conv2d(3, 8, 3),
        norm1=nn.BatchNorm2d(8),
        norm2=nn.BatchNorm2d(8),
    ),
    "identities": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Identity(), nn.BatchNorm2d(8)),
    "questions for the shape": Calling(
        lambda self, x: (lambda y: self.norm(y) if y.dim() == 4 and y.shape[1] == 8 and y.size(0) else y)(
            self.conv(x)
        ),
        conv=nn.Conv2d(3, 8, 3),
        norm=nn.BatchNorm2d(8),
    ),
    "standardised weights": nn.Sequential(StdConv2d(3, 8, 3, bias=True), nn.BatchNorm2d(8)),
    "norm without scale": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False)),
}
BIAS_IS_USED = {
    "no norm": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)),
    "residual": Calling(
        lambda self, x: (lambda y: y + self.norm(y))(self.conv(x)),
        conv=nn.Conv2d(3, 8, 3),
        norm=nn.BatchNorm2d(8),
    ),
    "written to before": Calling(
        lambda self, x: self.norm(self.conv(x).relu_()), conv=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8)
    ),
    "assigned to before": Calling(
        lambda self, x: (lambda y: (y.__setitem__((slice(None), 0), 1.0), self.norm(y))[1])(self.conv(x)),
        conv=nn.Conv2d(3, 8, 3),
        norm=nn.BatchNorm2d(8),
    ),
    "returned too": Calling(
        lambda self, x: (lambda y: [y, self.norm(y)])(self.conv(x)),
        conv=nn.Conv2d(3, 8, 3),
        norm=nn.BatchNorm2d(8),
    ),
    "in a list": Calling(
        lambda self, x: (lambda y: torch.cat([y, self.norm(y)]))(self.conv(x)),
        conv=nn.Conv2d(3, 8, 3),
        norm=nn.BatchNorm2d(8),
    ),
    "dropout between": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.BatchNorm2d(8)),
    "a layer that does nothing in evaluation": nn.Sequential(
        nn.Conv2d(3, 8, 3), Doubled(), nn.BatchNorm2d(8)
    ),
    "channels elsewhere": nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), nn.BatchNorm1d(3)),
    "one of two calls": Calling(
        lambda self, x: self.norm(self.conv(x)) + self.conv(x),
        conv=nn.Conv2d(3, 8, 3),
        norm=nn.BatchNorm2d(8),
    ),
}


def producer(model):
    return next(
        module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    )


@pytest.mark.parametrize("case", BIAS_IS_CANCELLED)
def test_a_bias_that_the_norm_cancels_is_dropped(case):
    model = randomise(deepcopy(BIAS_IS_CANCELLED[case]).double())
    reference = switch(deepcopy(model), Norm.BATCH, 3, 4, 4, dtype=torch.float64)
    assert producer(reference).bias is None
    with torch.no_grad():
        producer(reference).bias = nn.Parameter(torch.randn(8, dtype=torch.float64))
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    with_bias = reference(x)
    producer(reference).bias = None
    torch.testing.assert_close(reference(x), with_bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", BIAS_IS_USED)
def test_a_bias_used_elsewhere_is_kept(case):
    model = deepcopy(BIAS_IS_USED[case])
    kept = producer(model).bias
    assert producer(switch(model, Norm.SYNC, 3, 4, 4)).bias is kept


@pytest.mark.parametrize("norm", [Norm.NONE, Norm.GROUP, Norm.LAYER])
def test_a_bias_replaced_by_batch_norm_is_restored(norm):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1, bias=False)
    ).double()
    switch(model, norm, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(model[0].bias, torch.zeros(8, dtype=torch.float64))
    assert model[0].bias.requires_grad
    assert model[2].bias is None


PARTS = st.lists(st.sampled_from(["conv", "norm", "relu", "dropout", "add", "keep"]), min_size=1, max_size=10)


@given(PARTS)
@settings(max_examples=60)
def test_dropping_biases_does_not_change_the_function_of_a_network(parts):
    kinds = {
        "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
        "norm": lambda: nn.BatchNorm2d(4),
        "relu": lambda: nn.ReLU(inplace=True),
        "dropout": lambda: nn.Dropout(0.5),
    }
    layers = nn.ModuleList([kinds[part]() for part in parts if part in kinds])

    def forward(self, x):
        remaining, kept = iter(self.layers), x
        for part in parts:
            if part == "keep":
                kept = x
            elif part == "add":
                x = x + kept
            else:
                x = next(remaining)(x)
        return x

    torch.manual_seed(0)
    model = randomise(Calling(forward, layers=layers).double())
    switched = switch(deepcopy(model), Norm.BATCH, 4, 4, 4, dtype=torch.float64)
    x = torch.randn(4, 4, 4, 4, dtype=torch.float64)
    outputs = []
    for each in (model, switched):
        torch.manual_seed(1)
        outputs.append(each(x.clone()))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
