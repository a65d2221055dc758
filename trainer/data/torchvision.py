"""Classification datasets of torchvision in a local folder; no downloads."""

import difflib
import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.datasets
from PIL import Image
from torch import Tensor
from torchvision.datasets import DatasetFolder, FakeData, VisionDataset

from trainer.data.cache import digest
from trainer.data.corrupt import image_errors, read_or_replace
from trainer.data.dataset import Splits
from trainer.data.decoding import decode, to_rgb
from trainer.data.links import check_links
from trainer.data.sampler import Indices
from trainer.errors import ConfigurationError, DataError
from trainer.jobspec import TorchvisionDataSpec

TRAIN_SPLITS = ("train", "trainval", "train-standard")
TEST_SPLITS = ("test", "val", "valid")
"""Names of the parts in datasets with a `split` argument, in order of preference."""

FAKE_TRAIN_SAMPLES, FAKE_TEST_SAMPLES = 1_000, 200


@dataclass(frozen=True)
class LibraryImages:
    """Part of a torchvision dataset."""

    dataset: VisionDataset
    title: str
    skip: bool
    """Whether to skip corrupt images when all images are read for their labels."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """See Images."""
        with image_errors("data.root", self.name(index)):
            image, label = self.dataset[index]
            if isinstance(image, Image.Image):
                image.load()  # some datasets only open the file
                rgb = to_rgb(image)
                image = rgb.getchannel(0) if image.mode == "L" else rgb  # grey images keep one channel
        return image, self._check(label, index)

    def name(self, index: int) -> str:
        """See Images."""
        return f"image {index} of {self.title}"

    def labels(self) -> Indices:
        """See Images.

        Datasets without a list of labels are read completely; a corrupt image has the label of its
        replacement.
        """
        for attribute in ("targets", "labels"):
            if (labels := getattr(self.dataset, attribute, None)) is not None:
                return torch.as_tensor(labels, dtype=torch.int64).numpy()
        return np.array([read_or_replace(self, index, skip=self.skip).label for index in range(len(self))])

    def _check(self, label: Any, index: int) -> int:
        if isinstance(label, Tensor) and label.ndim == 0:
            label = label.item()
        if not isinstance(label, int | np.integer):
            raise DataError(
                "data.name",
                label,
                f"must be a dataset with one integer label per image; {self.name(index)} has none",
            )
        return int(label)


def find_dataset(full_name: str) -> type[VisionDataset]:
    """Return the class of a dataset by its name. Raises ConfigurationError."""
    name = full_name.removeprefix("torchvision:")
    kind = getattr(torchvision.datasets, name, None) if name in torchvision.datasets.__all__ else None
    if not (inspect.isclass(kind) and issubclass(kind, VisionDataset)):
        close = difflib.get_close_matches(name, torchvision.datasets.__all__) or ["CIFAR10"]
        raise ConfigurationError(
            "data.name", full_name, f"must be a dataset of torchvision, such as {' or '.join(close)}"
        )
    return kind


def find_parts(spec: TorchvisionDataSpec) -> dict[str, list[dict[str, Any]]]:
    """Return possible arguments for the parts `train` and `test` of a dataset.

    The root is not included, and no file is read. Raises ConfigurationError if the dataset cannot be opened
    with any files.
    """
    kind = find_dataset(spec.name)
    parameters = inspect.signature(kind).parameters
    needed = {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    } - {"root"}
    splits = sorted(getattr(kind, "splits", ()))
    if spec.split is not None and "split" not in needed:
        raise ConfigurationError(
            "data.split", spec.split, f"must be null for {spec.name}, whose parts are selected automatically"
        )
    if "split" in needed and spec.split not in splits:
        raise ConfigurationError(
            "data.split", spec.split, f"must be one of {', '.join(splits)} for {spec.name}"
        )
    if issubclass(kind, FakeData):
        test = {"size": FAKE_TEST_SAMPLES, "random_offset": FAKE_TRAIN_SAMPLES}
        return {"train": [{"size": FAKE_TRAIN_SAMPLES, "random_offset": 0}], "test": [test]}
    if spec.root is None:
        raise ConfigurationError("data.root", None, f"must be the folder with the files of {spec.name}")
    if needed == {"split"}:  # EMNIST: the division of characters into classes
        return {part: [{"split": spec.split, "train": part == "train"}] for part in ("train", "test")}
    if not needed and "train" in parameters:
        return {part: [{"train": part == "train"}] for part in ("train", "test")}
    if not needed and "split" in parameters:
        names = {"train": TRAIN_SPLITS, "test": TEST_SPLITS}
        return {part: [{"split": split} for split in splits] for part, splits in names.items()}
    raise _has_no_parts(spec.name, needed)


def _has_no_parts(full_name: str, needed: Collection[str] = ()) -> ConfigurationError:
    name = full_name.removeprefix("torchvision:")
    why = f"needs {', '.join(sorted(needed))}, which a spec cannot give" if needed else "has no such parts"
    return ConfigurationError(
        "data.name",
        full_name,
        f"must be a dataset with labelled images for training and testing; {name} {why}; "
        "`imagefolder` reads images from folders `train` and `val`, each with one folder per class",
    )


def open_library(spec: TorchvisionDataSpec) -> Splits:
    """Open both parts of a dataset.

    Raises ConfigurationError for a name that torchvision does not have, and for a dataset without a training
    and a test part; DataError for missing or damaged files, and for a link out of the root. Since torchvision
    follows links, all folders below the root are listed before anything is read, once per process that opens
    the dataset.
    """
    name, choices = spec.name.removeprefix("torchvision:"), find_parts(spec)
    if spec.root is not None:
        check_links(Path(spec.root))
    skip = spec.corrupt_images == "skip"
    training, testing = (
        LibraryImages(_open(spec, choices[part]), f"{name}, {part}", skip) for part in ("train", "test")
    )
    classes = _count_classes(training)
    samples = [(len(part), _fingerprint(part)) for part in (training, testing)]
    return Splits(training, testing, classes, digest(name, classes, samples), _class_names(training, classes))


def _open(spec: TorchvisionDataSpec, choices: Sequence[dict[str, Any]]) -> VisionDataset:
    """Open one part with the first of `choices` that the dataset supports."""
    kind = find_dataset(spec.name)
    if issubclass(kind, FakeData):
        return FakeData(**choices[0])
    for choice in choices:
        try:
            dataset = kind(root=spec.root, **choice)
        except (ValueError, RuntimeError, OSError) as error:
            # The dataset has another name for this part.
            if isinstance(error, ValueError) and "Unknown value" in str(error):
                continue
            missing = str(error).splitlines()[0] if str(error) else type(error).__name__
            rule = f"must be the folder with the files of {spec.name}, which is not downloaded: {missing}"
            raise DataError("data.root", spec.root, rule) from error
        if isinstance(dataset, DatasetFolder):
            dataset.loader = decode  # the same decoder as for image folders
        return dataset
    raise _has_no_parts(spec.name)


def _count_classes(images: LibraryImages) -> int:
    for attribute in ("classes", "num_classes"):
        if (found := getattr(images.dataset, attribute, None)) is not None:
            return found if isinstance(found, int) else len(found)
    return int(images.labels().max()) + 1


def _class_names(images: LibraryImages, classes: int) -> list[str]:
    names = getattr(images.dataset, "classes", None)
    if not isinstance(names, Sequence) or len(names) != classes:
        return []
    # ImageNet has tuples of synonyms.
    return [" / ".join(name) if isinstance(name, tuple) else str(name) for name in names]


def _fingerprint(images: LibraryImages) -> str:
    sample = read_or_replace(images, 0, skip=images.skip)
    return digest(np.asarray(sample.image).tobytes(), sample.label)
