"""Corrupt images in data that is read by index."""

import errno
import io
import pickle
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.dist import run_on_ranks
from tests.trainer.data.image_files import (
    CPU,
    assert_same,
    make_spec,
    take,
    take_test,
    truncate,
    write_images,
)
from tests.trainer.factories import here, run_here
from tests.trainer.factories import make_spec as make_run
from trainer.data import batch_indices, open_dataset
from trainer.data.corrupt import MAX_CORRUPT_IN_A_ROW, image_errors, read_or_replace
from trainer.data.dataloader import ImageDataset
from trainer.data.dataset import Splits
from trainer.data.folders import open_folders
from trainer.data.torchvision import open_library
from trainer.errors import CorruptImage, DataError
from trainer.jobspec import ImageFolderSpec, ImageTransformSpec, RayDataSpec, TorchvisionDataSpec
from trainer.worker import count_skipped, identity

CROPPED = ImageTransformSpec(crop=6)


def folder(root, **changes):
    return ImageFolderSpec(root=str(root / "country211"), test_folder="test", **changes)


def library(root, **changes):
    return TorchvisionDataSpec(name="torchvision:Country211", root=str(root), **changes)


KINDS = [folder, library]


@pytest.fixture
def root(tmp_path):
    """Two classes of five training and three test images, in the file layout of Country211."""
    images = write_images(tmp_path / "country211")
    (images / "val").rename(images / "test")
    return tmp_path


@pytest.fixture
def paths(root):
    """The training images in the order of their indices, and the test images."""
    return [sorted((root / "country211" / part).glob("*/*")) for part in ("train", "test")]


def open_parts(data):
    return open_folders(data) if isinstance(data, ImageFolderSpec) else open_library(data)


def open_here(spec, world_size=1, processes=0):
    return [
        ImageDataset(spec, spec.data, open_parts(spec.data), rank, world_size, CPU, torch.float32, processes)
        for rank in range(world_size)
    ]


def all_skipped(datasets):
    return frozenset().union(*(dataset.skipped_images for dataset in datasets))


@pytest.mark.parametrize(
    ("kind", "name"),
    [(folder, "train/cat/3.png"), (library, "image 3 of Country211, train")],
    ids=["folder", "library"],
)
def test_the_first_corrupt_image_is_rejected_by_name(root, paths, kind, name):
    truncate(paths[0][3])
    [dataset] = open_here(make_spec(kind(root), global_batch_size=10))
    with pytest.raises(CorruptImage, match=rf"data.root.*`corrupt_images: skip` skips such images.*{name}"):
        next(dataset.train(0))
    assert len(take_test([dataset])) == 2
    truncate(paths[1][1])
    with pytest.raises(CorruptImage, match=name.replace("train", "test").replace("3", "1")):
        list(dataset.test())


@pytest.mark.parametrize("kind", KINDS)
def test_a_corrupt_training_image_is_replaced_by_the_next_readable_one(root, paths, kind, capsys):
    for number in (4, 5, 9):
        truncate(paths[0][number])
    [dataset] = open_here(make_spec(kind(root, corrupt_images="skip"), global_batch_size=10))
    assert dataset.skipped_images == frozenset()
    for inputs, labels in take([dataset], 0, 2):  # two passes
        expected = Counter()
        for place in (0, 1, 2, 3, 6, 6, 6, 7, 8, 0):
            expected[np.asarray(Image.open(paths[0][place])).tobytes(), place // 5] += 1
        pixels = (inputs * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        assert (
            Counter((x.numpy().tobytes(), y) for x, y in zip(pixels, labels.tolist(), strict=True))
            == expected
        )
    assert len(dataset.skipped_images) == 3
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped a corrupt image: ")
    ]
    assert {line.removeprefix("skipped a corrupt image: ") for line in lines} == dataset.skipped_images
    assert len(lines) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_samples_and_counts_do_not_depend_on_workers_or_resumption(root, paths, kind):
    for number in (0, 4, 5, 9):
        truncate(paths[0][number])
    spec = make_spec(
        kind(root, corrupt_images="skip", transform=CROPPED),
        global_batch_size=7,
        gradient_accumulation_steps=2,
    )
    alone = open_here(spec)
    whole = take(alone, 0, 4)
    assert [len(labels) for _, labels in whole] == [4, 3] * 4
    for world_size in (2, 3):
        workers = open_here(spec, world_size)
        assert_same(take(workers, 0, 4), whole)
        assert all_skipped(workers) == all_skipped(alone)
        assert_same(take(open_here(spec, world_size), 2, 2), whole[4:])
    assert len(all_skipped(alone)) == 4


def test_loader_processes_replace_and_report_the_same_images(root, paths):
    for number in (4, 9):
        truncate(paths[0][number])
    truncate(paths[1][0])
    spec = make_spec(folder(root, corrupt_images="skip", transform=CROPPED), global_batch_size=10)
    [alone], [loaded] = open_here(spec), open_here(spec, processes=1)
    assert_same(take([loaded], 0, 1), take([alone], 0, 1))
    assert_same(take_test([loaded]), take_test([alone]))
    assert loaded.skipped_images == alone.skipped_images
    assert len(loaded.skipped_images) == 3
    loaded.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_corrupt_test_image_is_omitted(root, paths, kind, world_size):
    for number in (0, 4):
        truncate(paths[1][number])
    datasets = open_here(make_spec(kind(root, corrupt_images="skip")), world_size)
    batches = take_test(datasets)
    assert [labels.tolist() for _, labels in batches] == [[0, 0, 1], [1]]
    pixels = (torch.cat([inputs for inputs, _ in batches]) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    for image, number in zip(pixels, (1, 2, 3, 5), strict=True):
        assert (image.numpy() == np.asarray(Image.open(paths[1][number]))).all()
    assert len(all_skipped(datasets)) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
        (lambda path: Image.new("RGB", (30, 30)).save(path), "data.transform.crop"),
    ],
)
def test_only_corrupt_images_are_skipped(root, paths, kind, spoil, message):
    [dataset] = open_here(make_spec(kind(root, corrupt_images="skip"), global_batch_size=10))
    spoil(paths[0][3])
    with pytest.raises(DataError, match=message) as caught:
        next(dataset.train(0))
    assert not isinstance(caught.value, CorruptImage)


def test_an_invalid_label_is_rejected_even_if_corrupt_images_are_skipped(root, paths):
    truncate(paths[0][4])
    data = folder(root, corrupt_images="skip")
    parts = open_folders(data)
    one_class = Splits(parts.training, parts.testing, 1, "")
    dataset = ImageDataset(
        make_spec(data, global_batch_size=10), data, one_class, 0, 1, CPU, torch.float32, 0
    )
    with pytest.raises(
        DataError, match=r"must have labels from 0 to 0: .*train/dog/\d.png has another \(got 1\)"
    ):
        next(dataset.train(0))


def test_labels_found_by_reading_are_those_of_the_replacement(root, paths):
    truncate(paths[0][4])
    for choice in ("skip", "refuse"):
        images = open_library(library(root, corrupt_images=choice)).training
        assert images.labels().tolist() == [0] * 5 + [1] * 5
        del images.dataset.targets
        if choice == "skip":
            assert images.labels().tolist() == [0] * 4 + [1] * 6
        else:
            with pytest.raises(CorruptImage, match="image 4 of Country211, train"):
                images.labels()


def test_a_lazily_opened_image_is_read_immediately(root, paths):
    truncate(paths[0][4])
    images = open_library(library(root)).training
    images.dataset.loader = lambda path: Image.open(io.BytesIO(Path(path).read_bytes()))
    with pytest.raises(CorruptImage, match="image 4 of Country211, train"):
        images[4]


def test_too_many_consecutive_corrupt_images_end_training(tmp_path):
    root = write_images(tmp_path, train=52, size=(2, 2))
    parts = open_folders(ImageFolderSpec(root=str(root), corrupt_images="skip"))
    for path in parts.training.paths[1 : 1 + MAX_CORRUPT_IN_A_ROW]:
        (root / path).write_bytes(b"no image")
    assert read_or_replace(parts.training, 2, skip=True).place == MAX_CORRUPT_IN_A_ROW + 1
    with pytest.raises(
        DataError, match=r"100 in a row; all are corrupt: .*train/cat/1.png.* and 95 more"
    ) as caught:
        read_or_replace(parts.training, 1, skip=True)
    assert (caught.value.field, type(caught.value)) == ("data.corrupt_images", DataError)
    for path in parts.testing.paths:
        (root / path).write_bytes(b"no image")
    with pytest.raises(DataError, match="6 in a row"):
        read_or_replace(parts.testing, 4, skip=True)


@pytest.mark.parametrize("world_size", [1, 2])
def test_too_many_consecutive_corrupt_images_end_an_evaluation(tmp_path, world_size):
    """Two workers have half of the test data each."""
    root = write_images(tmp_path, test=52, size=(2, 2))
    data = ImageFolderSpec(root=str(root), corrupt_images="skip")
    *corrupt, last = open_folders(data).testing.paths[1 : 1 + MAX_CORRUPT_IN_A_ROW]
    for path in corrupt:
        (root / path).write_bytes(b"no image")
    datasets = open_here(make_spec(data), world_size)
    assert sum(len(labels) for _, labels in take_test(datasets)) == 5
    (root / last).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"100 in a row; all are corrupt: .*val/cat/1.png.* and 95 more"):
        take_test(datasets)


def test_a_replacement_is_from_the_shard_of_the_worker(root, paths):
    """Under `by_label` the second worker has only the second class; the successor of its last image is its
    first.
    """
    truncate(paths[0][4])
    truncate(paths[0][9])
    data = folder(root, corrupt_images="skip")
    datasets = open_here(make_spec(data, global_batch_size=10, data_partition="by_label", num_workers=2), 2)
    for rank, dataset in enumerate(datasets):
        [batch] = next(dataset.train(0))
        assert batch.labels.tolist() == [rank] * 5
        pixels = (batch.inputs * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        expected = Counter(
            np.asarray(Image.open(paths[0][5 * rank + place])).tobytes() for place in (0, 1, 2, 3, 0)
        )
        assert Counter(image.numpy().tobytes() for image in pixels) == expected


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tiff", "ppm"])
@pytest.mark.parametrize("kept", [0, 5, 0.5])
def test_a_truncated_image_is_corrupt_in_every_format(tmp_path, suffix, kept):
    """Truncated to nothing, within the header, and in the middle; for a PPM Pillow then raises ValueError."""
    root = write_images(tmp_path, size=(64, 48), suffix=suffix)
    images = open_folders(ImageFolderSpec(root=str(root))).training
    assert len([images[index] for index in range(10)]) == 10
    path = root / "train" / "cat" / f"1.{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(CorruptImage, match=f"train/cat/1.{suffix}"):
        images[images.paths.index(f"train/cat/1.{suffix}")]


@pytest.mark.parametrize("error", [ValueError("no image's"), MemoryError(), KeyError("label")])
def test_errors_not_raised_by_pillow_pass(error):
    with pytest.raises(type(error)) as caught, image_errors("data.root", "x"):
        raise error
    assert caught.value is error


def test_a_storage_error_is_not_a_corrupt_image(monkeypatch, root):
    """Even if raised by Pillow: the image may be intact and readable the next time."""
    images = open_folders(folder(root, corrupt_images="skip")).training

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(DataError, match="Input/output error") as caught:
        read_or_replace(images, 0, skip=True)
    assert type(caught.value) is DataError


def test_the_error_can_be_pickled():
    error = CorruptImage("data.root", "x.png", "must be an image")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (CorruptImage, "data.root: must be an image (got 'x.png')")


def count_here(data):
    """Train on all 10 images in one step, as one of the ranks or alone, and count."""
    spec, worker = make_spec(data, global_batch_size=10, num_workers=here().world_size), here()
    dataset = ImageDataset(
        spec, data, open_parts(data), worker.rank, worker.world_size, CPU, torch.float32, processes=0
    )
    next(dataset.train(0))
    return len(dataset.skipped_images), count_skipped(dataset, worker)


@pytest.mark.dist
def test_skipped_images_are_counted_over_all_workers(root, paths):
    for number in (0, 4, 5, 9):
        truncate(paths[0][number])
    data = library(root, corrupt_images="skip")
    assert count_here(data) == (4, 4)
    (first, count), (second, again) = run_on_ranks(count_here, 2, data)
    assert count == again == 4
    assert max(first, second) < 4 <= first + second


def test_a_run_resumed_with_skipping_equals_one_that_skipped_from_the_start(
    root, paths, tmp_path, monkeypatch
):
    """The final weights have the bits of a run that skipped from the start."""
    monkeypatch.setattr("trainer.data.dataloader.count_processes", lambda _: 0)
    run = partial(make_run, global_batch_size=2, steps=6, eval_every=6, checkpoint={"every": 1})
    truncate(paths[0][batch_indices(10, 2, 3, run().seed)[1]])
    refusing, skipping = (run(data=folder(root, corrupt_images=choice)) for choice in ("refuse", "skip"))
    with pytest.raises(CorruptImage):
        run_here(refusing, tmp_path / "checkpoints")
    resumed, notes = run_here(skipping, tmp_path / "checkpoints")
    whole, _ = run_here(skipping, tmp_path / "others")
    assert notes.resumed_from == 3
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name])


def test_the_policy_for_corrupt_images_is_not_in_the_resume_key(root):
    stream = partial(RayDataSpec, format="images", train="a", test="b", classes=2, shape=[3, 8, 8])
    for kind in (partial(folder, root), partial(library, root), stream):
        refusing, skipping = (make_spec(kind(corrupt_images=choice)) for choice in ("refuse", "skip"))
        assert identity(refusing, "x") == identity(skipping, "x")
        assert identity(refusing, "x") != identity(make_spec(kind(transform=CROPPED)), "x")


def test_open_dataset_passes_the_policy_for_corrupt_images(root, paths):
    truncate(paths[1][0])
    for data in (folder(root), library(root)):
        with pytest.raises(CorruptImage):
            open_dataset(make_spec(data), 0, 1, CPU, torch.float32)
        skipping = data.model_copy(update={"corrupt_images": "skip"})
        assert open_dataset(make_spec(skipping), 0, 1, CPU, torch.float32).shape == (3, 10, 12)
