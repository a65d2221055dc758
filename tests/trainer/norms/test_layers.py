import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from torch import nn

from tests.trainer.norms.normed import TOKENS, switch
from trainer.jobspec import Norm


def test_modules_with_similar_names_are_not_norms():
    weight_normalised = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(
        weight_normalised, nn.LocalResponseNorm(5), GlobalResponseNorm(8, channels_last=False)
    )
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in switch(model, Norm.BATCH, 3, 4, 4).modules()] == kinds


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_transformer_of_torch_calls_the_replaced_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = switch(nn.TransformerEncoder(layer, 2), Norm.NONE, *TOKENS)
    x = torch.randn(2, *TOKENS)
    trained = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(x), trained)
