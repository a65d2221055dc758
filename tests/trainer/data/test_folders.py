import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.data.image_files import make_spec, take, take_test
from tests.trainer.data.image_folders import folder, open_here
from tests.trainer.factories import here
from trainer.data.folders import open_folders
from trainer.errors import ConfigurationError, DataError
from trainer.jobspec import ImageTransformSpec
from trainer.tracking.outbox import Outbox, read_lines
from trainer.worker import describe


def test_images_have_the_class_of_their_folder(root):
    [dataset] = open_here(make_spec(folder(root), global_batch_size=10))
    assert (dataset.shape, dataset.classes, dataset.skipped_images) == ((3, 10, 12), 2, frozenset())
    [(inputs, labels)] = take([dataset], 0, 1)
    expected = {}
    for number, name in enumerate(["cat", "dog"]):
        for path in (root / "train" / name).iterdir():
            expected[np.asarray(Image.open(path)).tobytes()] = number
    for image, label in zip(inputs, labels.tolist(), strict=True):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        assert expected.pop(pixels.numpy().tobytes()) == label
    assert not expected
    assert torch.cat([labels for _, labels in take_test([dataset])]).tolist() == [0, 0, 0, 1, 1, 1]


def test_a_folder_of_one_class_is_refused(root):
    for part in ("train", "val"):
        shutil.rmtree(root / part / "dog")
    with pytest.raises(
        DataError, match=r"data.root: must have two classes or more below 'train'; there is one"
    ):
        open_here(make_spec(folder(root)))


def test_by_label_gives_each_worker_one_class(root):
    spec = make_spec(folder(root), data_partition="by_label", num_workers=2)
    shares = [
        [next(stream) for _ in range(3)] for stream in (dataset.train(0) for dataset in open_here(spec, 2))
    ]
    assert [
        {label for step in steps for part in step for label in part.labels.tolist()} for steps in shares
    ] == [
        {0},
        {1},
    ]


def test_the_fingerprint_is_independent_of_the_location(root, tmp_path):
    shutil.copytree(root, tmp_path / "copy")
    first = open_folders(folder(root)).digest
    assert open_folders(folder(tmp_path / "copy")).digest == first
    (tmp_path / "copy" / "train" / "cat" / "1.png").unlink()
    assert open_folders(folder(tmp_path / "copy")).digest != first


def test_images_of_several_sizes_need_a_crop(root):
    Image.new("L", (30, 30)).save(root / "train" / "cat" / "wide.png")
    [dataset] = open_here(make_spec(folder(root), global_batch_size=11))
    with pytest.raises(
        DataError, match=r"data.transform.crop.*wide.png has shape \(3, 30, 30\), others \(3, 10, 12\)"
    ):
        next(dataset.train(0))
    [dataset] = open_here(
        make_spec(folder(root, transform=ImageTransformSpec(crop=16)), global_batch_size=11)
    )
    assert next(dataset.train(0))[0].inputs.shape == (11, 3, 16, 16)


def remove(path):
    shutil.rmtree(path)


def move_out(path):
    path.rename(path.parent.parent / "outside")
    path.symlink_to(path.parent.parent / "outside")


def empty(path):
    for image in path.iterdir():
        image.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: remove(root), "data.root: must be a folder that contains 'train'"),
        (lambda root: remove(root / "val"), "data.root: must be a folder that contains 'val'"),
        (
            lambda root: [remove(root / "val" / name) for name in ("cat", "dog")],
            "must contain a folder of images per class",
        ),
        (
            lambda root: empty(root / "train" / "dog"),
            "must have images .* in every class; there are none in dog",
        ),
        (
            lambda root: remove(root / "train" / "dog"),
            "data.test_folder: must have the classes of 'train'; not among them: dog",
        ),
        (
            lambda root: (root / "train" / "cat" / "x.png").symlink_to("gone"),
            "must be a link to a file.*cat/x.png",
        ),
        (
            lambda root: (root / "train" / "fox").symlink_to("gone"),
            "must be a link to a file that exists.*train/fox",
        ),
        (
            lambda root: (root / "train" / "fox").symlink_to("fox"),
            "must be a link to a file that exists.*train/fox",
        ),
        (
            lambda root: (root / "train" / "cat" / "x.png").symlink_to("/etc/hosts"),
            "must contain only links that stay below",
        ),
        (lambda root: move_out(root / "val"), "must contain only links that stay below"),
        (lambda root: (root / "train" / "fox").symlink_to("/etc"), "must contain only links that stay below"),
        (
            lambda root: (root / "train" / "cat" / "loop").symlink_to(root / "train"),
            "form no cycle",
        ),
    ],
)
def test_errors_of_a_folder_are_named(root, spoil, message):
    spoil(root)
    with pytest.raises(DataError, match=message):
        open_folders(folder(root))


def test_classes_are_listed_in_the_log_and_in_mlflow(root, tmp_path, capsys):
    spec = make_spec(folder(root))
    [dataset] = open_here(spec)
    outbox = Outbox(tmp_path)
    describe(outbox, spec, here(), dataset, tmp_path)
    outbox.close()
    assert "2 classes in label order: cat, dog" in capsys.readouterr().out
    [line] = [line for line in read_lines(outbox.path.read_bytes()) if line["kind"] == "artifact"]
    assert json.loads(Path(line["path"]).read_text()) == ["cat", "dog"]


def test_a_class_without_images_lists_the_accepted_suffixes(root):
    for path in (root / "train" / "dog").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(DataError, match=r"images \(.*\.gif, .*\.jpg.*none in dog"):
        open_folders(folder(root))


def test_links_within_the_root_are_followed(root):
    (root / "train" / "cat" / "again.png").symlink_to(root / "val" / "cat" / "0.png")
    assert len(open_folders(folder(root)).training) == 11


def test_a_batch_larger_than_the_data_is_refused(root):
    with pytest.raises(ConfigurationError, match="global_batch_size: must be at most 10"):
        open_here(make_spec(folder(root), global_batch_size=11))
