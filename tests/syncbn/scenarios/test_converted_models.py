"""Models of timm and torchvision: a step on two ranks against one of the plain model in one process."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.converted_models import CASES, RANKS, make_target, measure
from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm
from tests.dist import run_on_ranks

MAX_DEVIATION = 1e-9
"""Or three times the deviation of the plain model when its samples are in another order: rounding alone."""
SMALL = {
    "timm mobilenetv3_small_100",
    "timm regnety_002",
    "timm test_resnet",
    "torchvision shufflenet_v2_x0_5",
    "torchvision ssdlite320_mobilenet_v3_large",
}


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_two_ranks_train_a_converted_model_as_one_process_trains_the_plain_one(name):
    for row in run_on_ranks(measure, RANKS, name, timeout_seconds=280):
        assert row.layers > 0
        assert row.deviation <= max(MAX_DEVIATION, 3 * row.rounding)
        assert row.reverted


def test_frozen_layers_of_a_detector_stay():
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d)
    head = FastRCNNConvFCHead((256, 7, 7), [16], [32], norm_layer=nn.BatchNorm2d)
    model = FasterRCNN(
        backbone, min_size=64, max_size=64, box_head=head, box_predictor=FastRCNNPredictor(32, 3)
    )
    classes = [type(module) for module in model.modules()]
    convert_sync_batchnorm(model)
    kinds = [type(module) for module in model.modules() if "BatchNorm" in type(module).__name__]
    assert kinds == [FrozenBatchNorm2d] * 20 + [SyncBatchNorm]
    frozen = {name: value.clone() for name, value in backbone.named_buffers()}
    target = {name: value.float() if name == "boxes" else value for name, value in make_target(0).items()}
    sum(model(list(torch.rand(2, 3, 64, 64)), [target, target]).values()).backward()
    assert head[0][1].num_batches_tracked == 1
    torch.testing.assert_close(dict(backbone.named_buffers()), frozen, rtol=0, atol=0)
    assert [type(module) for module in revert_sync_batchnorm(model).modules()] == classes
