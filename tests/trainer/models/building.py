"""Library models for tests."""

from trainer.jobspec import LibraryModelSpec, Norm

IMAGE = (3, 32, 32)


MODELS = [
    ("torchvision:resnet18", IMAGE, {}, Norm.BATCH),
    ("torchvision:googlenet", IMAGE, {}, Norm.BATCH),
    ("torchvision:inception_v3", (3, 75, 75), {}, Norm.BATCH),
    ("torchvision:mobilenet_v3_small", IMAGE, {}, Norm.BATCH),
    ("torchvision:swin_t", IMAGE, {}, Norm.LAYER),
    ("timm:resnet10t", IMAGE, {}, Norm.BATCH),
    ("timm:inception_v3", (3, 75, 75), {}, Norm.BATCH),
    ("timm:efficientnet_b0", IMAGE, {}, Norm.BATCH),
    ("timm:vit_tiny_patch16_224", IMAGE, {"img_size": 32, "depth": 2, "qk_norm": True}, Norm.LAYER),
    ("timm:convnext_atto", IMAGE, {}, Norm.LAYER),
]
"""Models with their default norm."""


def library_model(name, **values):
    return LibraryModelSpec(name=name, **values)


def kinds_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]
