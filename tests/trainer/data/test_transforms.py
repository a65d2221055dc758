import pytest
import torch

from trainer.data.transforms import normalize
from trainer.jobspec import ImageTransformSpec

MEAN_AND_STD = ImageTransformSpec(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", [ImageTransformSpec(), MEAN_AND_STD])
def test_scaling_does_not_change_its_input(spec, dtype, kind):
    images = (torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).to(kind)
    before = images.clone()
    mean, std = (torch.tensor(values, dtype=dtype)[:, None, None] for values in (spec.mean, spec.std))
    values = images.to(dtype) / 255 if kind == torch.uint8 else images.to(dtype)
    assert torch.equal(normalize(spec, images, dtype), (values - mean) / std)
    assert torch.equal(images, before)


def test_scaling_of_images_allocates_one_tensor():
    """One tensor of floats, not one per operation."""
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        normalize(MEAN_AND_STD, images, torch.float32)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated < 1.5 * 4 * images.numel()
