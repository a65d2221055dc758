import errno
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import FakeData, VisionDataset

from tests.trainer.data.image_files import CPU, assert_same, make_spec, take, take_test
from trainer.data.dataloader import ImageDataset
from trainer.data.dataset import Splits
from trainer.data.torchvision import LibraryImages, open_library
from trainer.errors import ConfigurationError, DataError
from trainer.jobspec import ImageTransformSpec, TorchvisionDataSpec

MNIST = "torchvision:MNIST"


def write_mnist(folder, parts, labels):
    """Write files in the format of MNIST."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in parts.items():
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, count, 28, 28) + images.tobytes()
        )
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 2049, count) + (np.arange(count) % labels).astype(np.uint8).tobytes()
        )


@pytest.fixture
def mnist(tmp_path):
    """Folder with files in the format and under the names of MNIST: 30 training and 10 test images."""
    write_mnist(tmp_path / "MNIST" / "raw", {"train": 30, "t10k": 10}, labels=10)
    return tmp_path


def open_here(spec, world_size=1):
    return [
        ImageDataset(spec, spec.data, open_library(spec.data), rank, world_size, CPU, torch.float32, 0)
        for rank in range(world_size)
    ]


def test_a_dataset_of_local_files(mnist):
    spec = make_spec(TorchvisionDataSpec(name=MNIST, root=str(mnist)), gradient_accumulation_steps=2)
    alone = open_here(spec)
    assert (alone[0].shape, alone[0].classes) == ((1, 28, 28), 10)
    assert [len(labels) for _, labels in take_test(alone)] == [4, 4, 2]
    workers = open_here(spec, 2)
    assert_same(take(workers, 1, 2), take(alone, 1, 2))
    assert workers[1].digest == alone[0].digest


@pytest.mark.parametrize(("split", "classes"), [("balanced", 47), ("digits", 10), ("letters", 27)])
def test_emnist_is_read_by_the_split_of_the_spec(tmp_path, split, classes):
    write_mnist(
        tmp_path / "EMNIST" / "raw",
        {f"emnist-{split}-train": 60, f"emnist-{split}-test": 20},
        labels=min(classes, 47),
    )
    data = TorchvisionDataSpec(name="torchvision:EMNIST", root=str(tmp_path), split=split)
    parts = open_library(data)
    assert (len(parts.training), len(parts.testing), parts.classes) == (60, 20, classes)
    assert len(parts.class_names) == classes
    assert parts.training[9][1] == 9
    (alone,) = open_here(make_spec(data))
    assert (alone.shape, alone.classes) == ((1, 28, 28), classes)
    with pytest.raises(
        DataError, match=r"data.root: must be the folder with the files of torchvision:EMNIST"
    ):
        open_library(data.model_copy(update={"split": "mnist"}))


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (
            "EMNIST",
            "balance",
            "must be one of balanced, byclass, bymerge, digits, letters, mnist for torchvision:EMNIST",
        ),
        ("MNIST", "balanced", "must be null for torchvision:MNIST, whose parts are selected automatically"),
        ("SVHN", "train", "must be null for torchvision:SVHN"),
        ("FakeData", "train", "must be null for torchvision:FakeData"),
    ],
)
def test_an_unknown_split_is_rejected(tmp_path, name, split, message):
    with pytest.raises(ConfigurationError, match=f"data.split: {message}.*got '{split}'"):
        open_library(TorchvisionDataSpec(name=f"torchvision:{name}", root=str(tmp_path), split=split))


def test_by_label_uses_the_labels_of_the_dataset(mnist):
    data = TorchvisionDataSpec(name=MNIST, root=str(mnist))
    spec = make_spec(data, data_partition="by_label", num_workers=2)
    first, second = (
        {label for _ in range(5) for part in next(stream) for label in part.labels.tolist()}
        for stream in (dataset.train(0) for dataset in open_here(spec, 2))
    )
    assert max(first) < 5 <= min(second)


def test_fake_data_needs_no_files():
    data = TorchvisionDataSpec(
        name="torchvision:FakeData", transform=ImageTransformSpec(random_resized_crop=True, crop=8)
    )
    spec = make_spec(data, evaluation={"batch_size": 50})
    alone = open_here(spec)
    assert (alone[0].shape, alone[0].classes) == ((3, 8, 8), 10)
    assert_same(take(open_here(spec, 2), 1, 1), take(alone, 0, 2)[1:])
    assert len(open_library(data).testing) == 200


def test_a_label_out_of_range_is_named_with_its_image():
    data = TorchvisionDataSpec(
        name="torchvision:FakeData", transform=ImageTransformSpec(crop=4), corrupt_images="skip"
    )
    fakes = open_library(data)
    few = Splits(fakes.training, fakes.testing, 2, "")
    dataset = ImageDataset(make_spec(data), data, few, 0, 1, CPU, torch.float32, 0)
    with pytest.raises(
        DataError,
        match=r"must have labels from 0 to 1: image \d+ of FakeData, train has another \(got [2-9]\)",
    ):
        next(dataset.train(0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR11", "data.name: must be a dataset of torchvision, such as CIFAR10"),
        ("os", "data.name: must be a dataset of torchvision"),
        ("VisionDataset", "with labelled images for training and testing"),
        ("ImageFolder", "with labelled images for training and testing"),
        ("SBU", "with labelled images for training and testing"),
        ("Kinetics", "with labelled images for training and testing"),
        ("Kinetics", "Kinetics needs frames_per_clip, which a spec cannot give"),
        ("EMNIST", "data.split: must be one of balanced, byclass, .* for torchvision:EMNIST"),
        (
            "EuroSAT",
            "EuroSAT has no such parts; `imagefolder` reads images from folders `train` and `val`",
        ),
        ("Caltech101", "Caltech101 has no such parts; `imagefolder` reads"),
    ],
)
def test_classes_that_are_no_training_datasets_are_rejected(name, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        open_library(TorchvisionDataSpec(name=f"torchvision:{name}", root=str(tmp_path)))


@pytest.mark.parametrize(
    "name", ["MNIST", "CIFAR10", "SVHN", "STL10", "Food101", "ImageNet", "GTSRB", "FGVCAircraft", "DTD"]
)
def test_missing_files_are_not_downloaded(name, tmp_path):
    with pytest.raises(
        DataError, match=f"data.root: must be the folder with the files of torchvision:{name}"
    ):
        open_library(TorchvisionDataSpec(name=f"torchvision:{name}", root=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def write_turned(path, mode="RGB"):
    """Write an image, white above and black below, whose EXIF orientation rotates it clockwise."""
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)


def assert_is_turned(image):
    found = np.asarray(image)
    assert found[:, 8:].min() > 200
    assert found[:, :8].max() < 50


def test_images_of_a_dataset_are_rotated_as_their_exif_orientation_says(tmp_path):
    folder = tmp_path / "food-101"
    (folder / "meta").mkdir(parents=True)
    for part in ("train", "test"):
        (folder / "meta" / f"{part}.json").write_text('{"pie": ["pie/1"]}')
    write_turned(folder / "images" / "pie" / "1.jpg")
    image, label = open_library(TorchvisionDataSpec(name="torchvision:Food101", root=str(tmp_path))).training[
        0
    ]
    assert (image.mode, label) == ("RGB", 0)
    assert_is_turned(image)


class Opened(VisionDataset):
    """One opened but unread image."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return Image.open(self.root), 0


@pytest.mark.parametrize(("mode", "expected"), [("L", "L"), ("RGB", "RGB"), ("RGBA", "RGB"), ("1", "RGB")])
def test_images_of_any_mode_are_rotated_and_grey_ones_keep_one_channel(tmp_path, mode, expected):
    write_turned(tmp_path / "x.png", mode)
    image, _ = LibraryImages(Opened(str(tmp_path / "x.png")), "a dataset", skip=False)[0]
    assert image.mode == expected
    assert_is_turned(image)


def test_grey_images_keep_their_values(mnist):
    images = open_library(TorchvisionDataSpec(name=MNIST, root=str(mnist))).training
    for index in range(3):
        assert np.array_equal(np.asarray(images[index][0]), images.dataset.data[index].numpy())


@pytest.mark.parametrize("of_folder", [True, False])
def test_links_out_of_the_root_are_refused_by_name(mnist, tmp_path_factory, of_folder):
    outside = tmp_path_factory.mktemp("outside") / "files"
    path = mnist / "MNIST" / "raw" if of_folder else mnist / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(
        DataError, match=rf"data.root: must contain only links that stay below {mnist} .*got '{path}'"
    ):
        open_library(TorchvisionDataSpec(name=MNIST, root=str(mnist)))


def test_links_within_the_root_are_followed(mnist):
    (mnist / "MNIST" / "raw").rename(mnist / "files")
    (mnist / "MNIST" / "raw").symlink_to(mnist / "files")
    (mnist.parent / "link").symlink_to(mnist)
    for root in (mnist, mnist.parent / "link"):
        assert len(open_library(TorchvisionDataSpec(name=MNIST, root=str(root))).training) == 30


def test_an_unreadable_folder_is_rejected(mnist, monkeypatch):
    """Its files can be opened by name, and may be links."""

    def deny(folder):
        raise PermissionError(errno.EACCES, "Permission denied", folder)

    monkeypatch.setattr("os.scandir", deny)
    with pytest.raises(
        DataError, match=r"data.root: must contain only folders that can be listed: .*Permission denied"
    ):
        open_library(TorchvisionDataSpec(name=MNIST, root=str(mnist)))


def test_files_need_a_root():
    with pytest.raises(
        ConfigurationError, match=r"data.root: must be the folder with the files of torchvision:MNIST"
    ):
        open_library(TorchvisionDataSpec(name=MNIST))


def test_fake_data_equals_that_of_torchvision():
    image, label = open_library(TorchvisionDataSpec(name="torchvision:FakeData")).testing[3]
    expected, expected_label = FakeData(size=200, random_offset=1_000)[3]
    assert (np.asarray(image) == np.asarray(expected)).all()
    assert label == int(expected_label)
