"""Conversion of models of timm and torchvision: a training step on two ranks against one process.

Prints a table with a row per model: the number of converted layers, the largest deviation of loss, gradients
and buffers from those of the plain model on the concatenated batch in one process, the same deviation of the
plain model with its samples in another order, which is rounding alone, and whether reversal restored the
model. A small model with batch normalisation of each architecture is taken, in float64,
with small images and without random layers. `docs/converted-models.md` has the table.
"""

# ruff: noqa: SIM905 - a list of names is easier to read without quotes

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
import torchvision
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves
from torchvision.ops import StochasticDepth

from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

RANKS = 2
SAMPLES_PER_RANK = 2
CLASSES = 5
GRADIENT_FLOOR = 1e-5
"""Deviations of gradients are relative to the largest value of the tensor, but at least to this fraction of
the largest gradient of the model: gradients that are zero but for rounding, such as those of biases before a
normalisation, have no scale.
"""

TIMM = {
    64: (
        "lambda_resnet26t test_byobnet convmixer_768_32 cpubone_nano cs3darknet_focus_s cspnext_tiny "
        "densenet121 dla46x_c dpn48b efficientnet_b0 efficientvit_b0 fasternet_t0 fastvit_t8 "
        "ghostnet_050 hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto "
        "lcnetv2_small lowformer_b0 mobilenetv3_small_100 mobilevit_xxs nextvit_small regnety_002 "
        "repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 "
        "legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 tiny_vit_5m_224 tresnet_m vgg11_bn "
        "ese_vovnet19b_slim_dw xception41p efficientvim_m1 swiftformer_xs"
    ).split(),
    96: "inception_resnet_v2 inception_v3 inception_v4 legacy_xception nasnetalarge pnasnet5large".split(),
    160: ["test_coatnet"],
    224: (
        "efficientformer_l1 efficientformerv2_s0 efficientvit_m0 levit_128s visformer_tiny "
        "vit_small_resnet50d_s16_224 volo_d1_224 xcit_nano_12_p8_224"
    ).split(),
}
"""Names by image size: the size that a model needs if it is not free."""
CLASSIFICATION = {
    64: (
        "densenet121 efficientnet_b0 efficientnet_v2_s mnasnet0_5 mobilenet_v2 mobilenet_v3_small "
        "regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 vgg11_bn "
        "wide_resnet50_2 googlenet"
    ).split(),
    224: ["maxvit_t"],
    299: ["inception_v3"],
}
SEGMENTATION = (
    "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 deeplabv3_resnet101 fcn_resnet50 fcn_resnet101 "
    "lraspp_mobilenet_v3_large"
).split()
DETECTION = (
    "fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn "
    "fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn "
    "maskrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 ssdlite320_mobilenet_v3_large"
).split()
VIDEO = ["mc3_18", "r2plus1d_18", "r3d_18", "s3d"]
IMAGE = 64
FRAMES = 8
BOXES = 16
"""Proposals per image that heads of detectors are trained on."""
HEADS = (
    "rpn.head roi_heads.box_predictor roi_heads.mask_predictor roi_heads.keypoint_predictor head"
).split()


@dataclass(frozen=True)
class Row:
    """Result of a model."""

    layers: int
    deviation: float
    rounding: float
    reverted: bool


@dataclass(frozen=True)
class Step:
    """Loss, gradients and buffers after a forward and a backward pass."""

    loss: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def make_model(name: str, **options: Any) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)
    return model


def make_video_classifier(name: str) -> nn.Module:
    model = make_model(name)
    model.avgpool = nn.AdaptiveAvgPool3d(1)  # that of s3d needs large images
    return model


def make_segmenter(name: str) -> nn.Module:
    return make_model(name, weights_backbone=None)


def make_detector(name: str) -> nn.Module:
    model = make_segmenter(name)
    model.transform.min_size, model.transform.max_size = (IMAGE,), IMAGE
    if model.transform.fixed_size is not None:
        model.transform.fixed_size = (IMAGE, IMAGE)
    if hasattr(model, "roi_heads"):
        model.roi_heads.fg_bg_sampler.batch_size_per_image = BOXES
    return model


def make_cases() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Return the constructor and the shape of a sample per model."""
    cases: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}
    for size, names in TIMM.items():
        for name in names:
            cases[f"timm {name}"] = (partial(timm.create_model, name, num_classes=CLASSES), (3, size, size))
    for size, names in CLASSIFICATION.items():
        for name in names:
            cases[f"torchvision {name}"] = (partial(make_model, name), (3, size, size))
    for make, names in ((make_segmenter, SEGMENTATION), (make_detector, DETECTION)):
        for name in names:
            cases[f"torchvision {name}"] = (partial(make, name), (3, IMAGE, IMAGE))
    for name in VIDEO:
        cases[f"torchvision {name}"] = (
            partial(make_video_classifier, name),
            (3, FRAMES, IMAGE // 2, IMAGE // 2),
        )
    return cases


CASES = make_cases()


def prepare(model: nn.Module) -> nn.Module:
    """Disable random layers, and draw the vectors that start at 0 or 1 and would hide layers."""
    for module in model.modules():
        if isinstance(module, _DropoutNd | StochasticDepth):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == max(parameter.shape, default=0):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().train()


def collect_outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Run the model; return its outputs or, of a detector, those of its heads before the losses.

    The losses of detectors divide by numbers of boxes of a batch, and their mean over ranks is another one
    than that of the whole batch.
    """
    if not hasattr(model, "roi_heads") and not hasattr(model, "anchor_generator"):
        return tree_leaves(model(images))
    outputs: list[Any] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for name, module in model.named_modules()
        if name in HEADS
    ]
    with mock.patch("torch.randperm", torch.arange):  # the sampler of boxes
        model(list(images), [make_target(number) for number in range(len(images))])
    for handle in handles:
        handle.remove()
    return tree_leaves(outputs)


def make_target(number: int) -> dict[str, Tensor]:
    """Return two objects of an image."""
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 50.0]], dtype=torch.float64) + number % 2
    masks = torch.zeros(2, IMAGE, IMAGE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    keypoints = torch.full((2, 17, 3), 25.0)
    keypoints[..., 2] = 1
    return {"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": keypoints}


def take_step(model: nn.Module, images: Tensor) -> Step:
    """Run forward and backward; the loss is a sum over samples, so that ranks' losses add up."""
    model.zero_grad()
    outputs = collect_outputs(model, images)
    loss = torch.stack([F.softplus(output).sum() / output[0].numel() for output in outputs]).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()})


def sum_over_ranks(step: Step) -> Step:
    """Return the step with loss and gradients of all ranks together."""
    for tensor in (step.loss, *step.gradients.values()):
        dist.all_reduce(tensor)
    return step


def largest_deviation(step: Step, expected: Step) -> float:
    """Return the largest deviation relative to the largest value of a tensor."""
    assert step.gradients.keys() == expected.gradients.keys()
    floor = GRADIENT_FLOOR * max(gradient.abs().max() for gradient in expected.gradients.values())
    pairs = [(step.loss, expected.loss, 0.0)]
    pairs += [(step.gradients[name], gradient, floor) for name, gradient in expected.gradients.items()]
    pairs += [
        (step.buffers[name], buffer, 0.0) for name, buffer in expected.buffers.items() if buffer.numel()
    ]
    deviations = [
        (actual - wanted).abs().max() / wanted.abs().max().clamp(min=max(least, 1e-300))
        for actual, wanted, least in pairs
    ]
    return float(torch.stack(deviations).max())  # which is NaN if any is


def describe(model: nn.Module) -> list[object]:
    """Return all that conversion and reversal must leave: classes, objects and keys."""
    state = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(name, type(module), id(module), module.training) for name, module in model.named_modules()],
        [(name, id(tensor)) for name, tensor in state],
        list(model.state_dict()),
    ]


def restore(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def measure(name: str) -> Row:
    """Compare a step of the converted model on all ranks with one of the plain model in this process."""
    build, shape = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        torch.manual_seed(0)
        model = prepare(build())
        images = torch.randn(RANKS * SAMPLES_PER_RANK, *shape, dtype=torch.float64)
        buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
        description = describe(model)
        norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
        expected = take_step(model, images)
        restore(model, buffers)
        rounding = largest_deviation(take_step(model, images.roll(SAMPLES_PER_RANK, 0)), expected)
        restore(model, buffers)
        convert_sync_batchnorm(model)
        layers = sum(isinstance(module, SyncBatchNorm) for module in model.modules())
        assert layers == norms > 0
        step = sum_over_ranks(take_step(model, images.chunk(RANKS)[dist.get_rank()]))
        deviation = largest_deviation(step, expected)
        return Row(layers, deviation, rounding, describe(revert_sync_batchnorm(model)) == description)


def work(rank: int, store: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for name in names:
        start = time.perf_counter()
        row = measure(name)
        if rank == 0:
            reverted = "yes" if row.reverted else "no"
            print(
                f"| {name} | {row.layers} | {row.deviation:.1e} | {row.rounding:.1e} | {reverted} |",
                flush=True,
            )
            print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="'timm NAME' or 'torchvision NAME'; all if none is given")
    names = parser.parse_args().names or list(CASES)
    print("| model | layers | deviation | rounding | reverted |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (f"{folder}/store", names), nprocs=RANKS)


if __name__ == "__main__":
    main()
