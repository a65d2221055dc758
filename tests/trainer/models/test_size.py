"""Size of library models on the meta device, compared with the tensors that torch saves in a real forward
pass.
"""

import pytest
import torch
from torch import nn

from trainer.jobspec import LibraryModelSpec, ModelSize
from trainer.models.size import measure_size
from trainer.models.torchvision_timm import build_library_model

SHAPE = (3, 64, 64)


def build(name, shape=SHAPE, classes=10, **changes):
    return build_library_model(LibraryModelSpec(name=name, **changes), shape, classes).train()


def measure(name, shape=SHAPE, *, has_norms=True, **changes):
    with torch.device("meta"):
        return measure_size(build(name, shape or SHAPE, **changes), shape, has_norms=has_norms)


def count_really(model, samples):
    """Return the number of floats alive for backward, by storage, in a real forward pass."""
    inputs, saved = torch.randn(samples, *SHAPE), {}
    given = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers(), inputs)}

    def pack(value):
        if value.is_floating_point() and value.untyped_storage().data_ptr() not in given:
            saved[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        outputs = model(inputs)
    del outputs
    return sum(value.untyped_storage().nbytes() // value.element_size() for value in saved.values())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("torchvision:resnet18", {}),
        ("torchvision:resnet18", {"activation": "gelu"}),
        ("torchvision:densenet121", {}),
        ("torchvision:googlenet", {}),
        ("timm:convnext_atto", {}),
        ("timm:resnetv2_50", {}),  # weights are standardised once per batch
    ],
)
def test_saved_activations_of_convolutional_networks_are_counted_exactly(name, changes):
    model = build(name, **changes)
    found = measure(name, **changes)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.sample_activations == count_really(model, 3) - count_really(model, 2)


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "torchvision:vit_b_16"])
def test_attention_counts_as_a_fused_kernel(name):
    changes = {"arguments": {"img_size" if name.startswith("timm") else "image_size": 64}}
    model = build(name, **changes)
    really = count_really(model, 3) - count_really(model, 2)
    assert 0.99 * really < measure(name, **changes).sample_activations <= really


def test_resnet50_has_its_published_number_of_parameters():
    found = measure("torchvision:resnet50", (3, 224, 224), classes=1_000)
    assert found.parameters == 25_557_032
    assert found.sample_activations * 4 == pytest.approx(83.7e6, rel=0.001)  # bytes, of float32


def test_inputs_of_norms_are_not_counted_without_norms():
    """They are more than half of the activations of a resnet, whose activation modules work in place."""
    model = build("torchvision:resnet18")
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(path, nn.Identity())
    found = measure("torchvision:resnet18", has_norms=False).sample_activations
    assert found == count_really(model, 3) - count_really(model, 2)
    assert found < 0.55 * measure("torchvision:resnet18").sample_activations


def test_unknown_sizes_count_as_zero():
    class Reads(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) * float(inputs.sum())  # which the meta device cannot compute

    assert measure("torchvision:resnet18", None).sample_activations == 0
    model = Reads(4, 3, device="meta")
    assert measure_size(model, (4,), has_norms=True) == ModelSize(parameters=15, sample_activations=0)
