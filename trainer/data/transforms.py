"""Image transforms of torchvision, seeded per sample."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.errors import ConfigurationError
from trainer.jobspec import ImageTransformSpec


def is_random(spec: ImageTransformSpec) -> bool:
    """Return whether training images are augmented at random."""
    return bool(spec.crop or spec.flip or spec.color_jitter or spec.auto_augment != "none")


class PixelTransform:
    """Transform of the pixels of an image; `normalize` scales whole batches later."""

    def __init__(self, spec: ImageTransformSpec, *, training: bool) -> None:
        self._spec, self._training = spec, training

    @cached_property
    def _transform(self) -> Any:
        # At the first image: the import takes a second, and the feeder only passes this object on.
        from torchvision.transforms import v2

        spec, training = self._spec, self._training
        steps: list[Any] = [v2.ToImage()]
        if spec.channels is not None:
            steps.append(v2.Grayscale() if spec.channels == 1 else v2.RGB())
        if training and spec.random_resized_crop:
            # A random part of the original image: `resize` applies only to testing.
            steps.append(v2.RandomResizedCrop(spec.crop, antialias=True))
        else:
            if spec.resize is not None:
                steps.append(v2.Resize(spec.resize, antialias=True))
            if spec.crop is not None and training:
                # Images smaller than the crop are padded with black, as by CenterCrop.
                steps.append(v2.RandomCrop(spec.crop, padding=spec.padding or None, pad_if_needed=True))
            elif spec.crop is not None:
                steps.append(v2.CenterCrop(spec.crop))
        if training:
            steps.extend(_augmentations(spec))
        return v2.Compose(steps)

    def __call__(self, image: Any) -> Tensor:
        """Transform a PIL image or tensors (..., C, H, W), all in the same way.

        The dtype of pixels is kept; that of PIL images is uint8.
        """
        pixels: Tensor = self._transform(image)
        return pixels.as_subclass(Tensor)

    def at_random(self, image: Any, *seed: int) -> Tensor:
        """Transform one image under `seed`, without changing the global random state."""
        with seeded(*seed):
            return self(image)


def _augmentations(spec: ImageTransformSpec) -> Iterator[Any]:
    from torchvision.transforms import v2

    if spec.flip:
        yield v2.RandomHorizontalFlip()
    if spec.auto_augment == "randaugment":
        yield v2.RandAugment()
    elif spec.auto_augment == "trivialaugment":
        yield v2.TrivialAugmentWide()
    if spec.color_jitter:
        yield v2.ColorJitter(spec.color_jitter, spec.color_jitter, spec.color_jitter)


@contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Seed the CPU generator, which torchvision uses, and restore it afterwards.

    The generators of GPUs are not changed.
    """
    before = torch.default_generator.get_state()
    number = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    torch.default_generator.manual_seed(int(number >> np.uint64(1)))
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


def normalize(spec: ImageTransformSpec, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale images (n, C, H, W) to (x - mean) / std in `dtype`; uint8 becomes [0, 1].

    Raises ConfigurationError if mean and std are for another number of channels.
    """
    scaled = images.to(dtype)
    if images.dtype == torch.uint8:
        scaled.div_(255)  # in place, as below: allocation would cost more than the arithmetic
    if spec.mean == [0.0] and spec.std == [1.0]:
        return scaled
    for field, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) not in (1, images.shape[1]):
            raise ConfigurationError(
                f"data.transform.{field}",
                values,
                f"must be 1 number or one for each of {images.shape[1]} channels",
            )
    mean, std = (scaled.new_tensor(values)[:, None, None] for values in (spec.mean, spec.std))  # (C, 1, 1)
    centred = scaled - mean if scaled is images else scaled.sub_(mean)
    return centred.div_(std)
