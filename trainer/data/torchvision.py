"""Classification datasets of torchvision in a local folder; no download."""

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

from trainer.data.corrupt import read, reading
from trainer.data.decoding import decode, to_rgb
from trainer.data.digest import digest
from trainer.data.images import Parts
from trainer.data.links import check_links
from trainer.data.sampler import Indices
from trainer.errors import ConfigurationError, DataError
from trainer.jobspec import TorchvisionDataSpec

TRAIN_SPLITS = ("train", "trainval", "train-standard")
TEST_SPLITS = ("test", "val", "valid")
"""Names that datasets with a `split` have for their parts, in order of preference."""

FAKE_TRAIN_SAMPLES, FAKE_TEST_SAMPLES = 1_000, 200


@dataclass(frozen=True)
class LibraryImages:
    """One part of a dataset of torchvision."""

    dataset: VisionDataset
    title: str
    skip: bool
    """Whether corrupt images are left out, where all are read for their labels."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """See Images."""
        with reading("data.root", self.name(index)):
            image, label = self.dataset[index]
            if isinstance(image, Image.Image):
                image.load()  # some datasets have but opened it
                rgb = to_rgb(image)
                image = (
                    rgb.getchannel(0) if image.mode == "L" else rgb
                )  # grey images, as those of MNIST, keep one channel
        return image, self._check(label, index)

    def name(self, index: int) -> str:
        """See Images."""
        return f"image {index} of {self.title}"

    def labels(self) -> Indices:
        """See Images. If the dataset has no list of labels, all images are read; a corrupt one has the label of its replacement."""
        for attribute in ("targets", "labels"):
            if (labels := getattr(self.dataset, attribute, None)) is not None:
                return torch.as_tensor(labels, dtype=torch.int64).numpy()
        return np.array([read(self, index, skip=self.skip).label for index in range(len(self))])

    def _check(self, label: Any, index: int) -> int:
        if isinstance(label, Tensor) and label.ndim == 0:
            label = label.item()
        if not isinstance(label, int | np.integer):
            raise DataError(
                "data.name", label, f"must be a dataset with one whole number as label; {self.name(index)} has none"
            )
        return int(label)


def find_dataset(full_name: str) -> type[VisionDataset]:
    """Find a dataset's class by its name in a spec. Raises ConfigurationError."""
    name = full_name.removeprefix("torchvision:")
    kind = getattr(torchvision.datasets, name, None) if name in torchvision.datasets.__all__ else None
    if not (inspect.isclass(kind) and issubclass(kind, VisionDataset)):
        close = difflib.get_close_matches(name, torchvision.datasets.__all__) or ["CIFAR10"]
        raise ConfigurationError(
            "data.name", full_name, f"must be a dataset of torchvision, such as {' or '.join(close)}"
        )
    return kind


def find_parts(spec: TorchvisionDataSpec) -> dict[str, list[dict[str, Any]]]:
    """List the arguments that may open a dataset's parts `train` and `test`, apart from its root; no file is read.

    Raises ConfigurationError for what cannot be opened whatever its files.
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
            "data.split", spec.split, f"must be null for {spec.name}, whose parts are found by themselves"
        )
    if "split" in needed and spec.split not in splits:
        raise ConfigurationError("data.split", spec.split, f"must be one of {', '.join(splits)} for {spec.name}")
    if issubclass(kind, FakeData):
        test = {"size": FAKE_TEST_SAMPLES, "random_offset": FAKE_TRAIN_SAMPLES}
        return {"train": [{"size": FAKE_TRAIN_SAMPLES, "random_offset": 0}], "test": [test]}
    if spec.root is None:
        raise ConfigurationError("data.root", None, f"must be the folder with the files of {spec.name}")
    if needed == {"split"}:  # of EMNIST: which of its ways to divide the characters into classes
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
        "`imagefolder` reads its images once they are in folders `train` and `val`, with a folder per class below",
    )


def open_library(spec: TorchvisionDataSpec) -> Parts:
    """Open both parts of a dataset.

    Raises ConfigurationError for a name that torchvision does not have, or that is not a dataset with a part to train and one to
    test on; DataError if its files are missing or broken, or if a link below the root leads out of it. Since torchvision follows
    links, all folders below the root are listed before anything is read: once in each process that opens the dataset.
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
    return Parts(training, testing, classes, digest(name, classes, samples), _class_names(training, classes))


def _open(spec: TorchvisionDataSpec, choices: Sequence[dict[str, Any]]) -> VisionDataset:
    """Open one part by the first of `choices` of arguments that the dataset knows."""
    kind = find_dataset(spec.name)
    if issubclass(kind, FakeData):
        return FakeData(**choices[0])
    for choice in choices:
        try:
            dataset = kind(root=spec.root, **choice)
        except (ValueError, RuntimeError, OSError) as error:
            if isinstance(error, ValueError) and "Unknown value" in str(error):  # it calls this part otherwise
                continue
            missing = str(error).splitlines()[0] if str(error) else type(error).__name__
            takes = f"must be the folder with the files of {spec.name}, which is not downloaded: {missing}"
            raise DataError("data.root", spec.root, takes) from error
        if isinstance(dataset, DatasetFolder):
            dataset.loader = decode  # as images of other folders are read
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
    return [" / ".join(name) if isinstance(name, tuple) else str(name) for name in names]  # ImageNet has synonyms


def _fingerprint(images: LibraryImages) -> str:
    sample = read(images, 0, skip=images.skip)
    return digest(np.asarray(sample.image).tobytes(), sample.label)
