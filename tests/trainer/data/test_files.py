"""Listing, counting and preparing rows, which Ray's tasks do, without Ray."""

import contextlib
import errno
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet
import pytest

from tests.trainer.data.image_files import draw, encode, make_stream, truncate, write_images, write_parquet
from trainer.data.class_folders import ClassFolders, path_below
from trainer.data.corrupt import CORRUPT
from trainer.data.files import is_broken, list_files
from trainer.data.folders import open_folders
from trainer.data.preprocess import Preparation
from trainer.errors import DataError
from trainer.jobspec import ImageFolderSpec, RayDataSpec


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def list_train(data):
    return list_files("data.train", data.train, data)


@pytest.mark.parametrize(("kind", "rows"), [("parquet", [7, 8, 6]), ("webdataset", [7, 8, 6]), ("images", [1] * 21)])
def test_rows_are_counted_once_for_each_state_of_the_files(kind, rows, tmp_path, monkeypatch):
    data = make_stream(kind, tmp_path)
    files = list_train(data)
    assert (files.rows.tolist(), files.samples) == (rows, 21)
    assert files.paths == sorted(files.paths)
    assert files.digest != list_files("data.test", data.test, data).digest
    monkeypatch.setattr("trainer.data.files._count", lambda *_: pytest.fail("counted again"))
    assert list_train(data).digest == files.digest


def test_files_are_found_at_any_address_of_fsspec(tmp_path):
    data = make_stream("parquet", tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(data.train, "/bucket/train", recursive=True)
    there = list_files("data.train", "memory://bucket/train", data)
    assert there.rows.tolist() == [7, 8, 6]
    assert there.digest == list_train(data).digest
    one = list_files("data.train", "memory://bucket/train/1.parquet", data)
    assert one.rows.tolist() == [8]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("parquet", {"train": "/nowhere"}, "data.train: must have files of format 'parquet'"),
        ("parquet", {"train": "nowhere://x"}, "data.train: must be a readable path or fsspec address"),
        (
            "parquet",
            {"format": "webdataset"},
            "must have files of format 'webdataset', which end in .tar; there are none",
        ),
        ("parquet", {"label_column": "y"}, r"data.label_column: must be a column of .*0.parquet: image, label"),
        (
            "webdataset",
            {"input_column": "jpg"},
            r"data.input_column: must be a column of .*0.tar: png, cls; the key of a sample",
        ),
    ],
)
def test_what_is_not_there_is_named(kind, changes, message, tmp_path):
    data = make_stream(kind, tmp_path)
    with pytest.raises(DataError, match=message):
        list_train(RayDataSpec.model_validate(data.model_dump() | changes))


@pytest.mark.parametrize(("kind", "name"), [("parquet", "1.parquet"), ("webdataset", "1.tar")])
def test_a_file_that_cannot_be_read_is_named(kind, name, tmp_path):
    data = make_stream(kind, tmp_path)
    truncate(tmp_path / "train" / name)
    with pytest.raises(DataError, match=f"data.train: must be readable files.*{name}"):
        list_train(data)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (pyarrow.ArrowInvalid("no match"), True),
        (OSError("corrupt snappy data"), True),
        (tarfile.ReadError("unexpected end of data"), True),
        (zlib.error("invalid block"), True),
        (EOFError(), True),
        (KeyError("cls"), True),
        (pyarrow.ArrowMemoryError("malloc failed"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (ConnectionResetError("by peer"), False),
        (TimeoutError("too late"), False),
        (TypeError("no number"), False),
    ],
    ids=repr,
)
def test_a_broken_file_is_told_from_one_that_is_out_of_reach(error, expected):
    assert is_broken(error) is expected


@pytest.mark.parametrize("way", ["train/cat/0.png", "train/cat"])
def test_links_out_of_the_folder_are_refused(tmp_path, way):
    data = make_stream("images", tmp_path)
    outside = write_images(tmp_path / "outside")
    os.symlink(outside / way, tmp_path / "data" / "train" / "a" / "way.png")
    with pytest.raises(DataError, match="must contain only links that stay below"):
        list_train(data)


@pytest.mark.parametrize("kind", ["images", "parquet"])
def test_hidden_and_system_folders_and_files_are_ignored(kind, tmp_path):
    data = make_stream(kind, tmp_path)
    before = list_train(data)
    name = Path(before.paths[0]).name
    for folder in (".ipynb_checkpoints", "__MACOSX/a", "a/.hidden"):
        (Path(data.train) / folder).mkdir(parents=True)
        shutil.copy(before.paths[0], Path(data.train) / folder / name)
    shutil.copy(before.paths[0], Path(data.train) / f"._{name}")
    assert list_train(data).digest == before.digest


def test_a_broken_link_is_named(tmp_path):
    data = make_stream("images", tmp_path)
    path = tmp_path / "data" / "train" / "a" / "x.png"
    path.symlink_to("gone")
    with pytest.raises(DataError, match=rf"data.train: must be a link to a file that exists \(got '{path}'\)"):
        list_train(data)


@pytest.mark.parametrize("address", ["{}", "file://{}", "{}/", "memory:/{}"])
def test_folders_and_streams_label_images_by_the_same_folder(tmp_path, address):
    """By the one directly below the root, however deep the image lies; what lies in none is left out."""
    root = write_images(tmp_path / "data", classes=("a/x", "b/x", "b/y", "b"))
    shutil.copy(root / "train" / "b" / "0.png", root / "train" / "loose.png")
    parts = open_folders(ImageFolderSpec(root=str(root)))
    if address.startswith("memory"):
        fsspec.filesystem("memory").put(str(root / "train"), str(root / "train"), recursive=True)
    place = address.format(root / "train")
    files = list_train(make_stream("images", tmp_path / "other", train=place, classes=2))
    classes = ClassFolders(files.folder, files.class_names)
    expected = {
        path.removeprefix("train/"): label
        for path, label in zip(parts.training.paths, parts.training.numbers.tolist(), strict=True)
    }
    found = {path_below(path, files.folder): classes.label(path) for path in files.paths}
    assert found == expected
    assert files.class_names == list(parts.class_names) == ["a", "b"]
    assert classes.label(f"https://host{root}/train/b/x/0.png") == 1


def prepare(data, columns, seed=None, classes=None):
    count = len(next(iter(columns.values())))
    return Preparation(data, classes, seed)({"path": np.array(["file"] * count), **columns})


def spec_of(shape, /, **changes):
    values = {"name": "ray", "format": "parquet", "train": "x", "test": "x", "classes": 3, "shape": shape}
    return RayDataSpec.model_validate(values | changes)


@pytest.mark.parametrize(
    ("column", "shape", "expected"),
    [
        (encode, [3, 12, 10], lambda images: images.transpose(0, 3, 1, 2)),
        (
            lambda image: {"bytes": encode(image), "path": None},
            [3, 12, 10],
            lambda images: images.transpose(0, 3, 1, 2),
        ),
        (lambda image: image, [3, 12, 10], lambda images: images.transpose(0, 3, 1, 2)),
        (lambda image: (image.reshape(-1) / 510).tolist(), [12, 10, 3], lambda images: images / 510),
        (lambda image: image[:, :, 0].tolist(), [12, 10], lambda images: images[:, :, :, 0]),
    ],
)
def test_columns_hold_files_of_images_or_numbers(tmp_path, column, shape, expected):
    """As they come from a parquet file, but for arrays, which Ray Data keeps in a type of its own."""
    images, labels = draw(4)
    cells = np.empty(4, dtype=object)
    for number, image in enumerate(images):
        cells[number] = column(image)
    if not isinstance(cells[0], np.ndarray):
        table = pyarrow.parquet.read_table(write_parquet(tmp_path / "x", [4], column))
        cells = table.to_pandas()["image"].to_numpy()
    prepared = prepare(spec_of(shape), {"image": cells, "label": labels})
    assert prepared["error"].tolist() == [""] * 4
    assert prepared["label"].tolist() == labels.tolist()
    assert np.allclose(prepared["input"], expected(images), atol=1e-6)


def test_augmentation_depends_on_seed_and_content_alone():
    images, labels = draw(4)
    data = spec_of([3, 6, 6], transform={"crop": 6})
    cells = np.array([encode(image) for image in images], dtype=object)
    together = prepare(data, {"image": cells, "label": labels}, [1, 2])["input"]
    apart = prepare(data, {"image": cells[2:3], "label": labels[2:3]}, [1, 2])["input"]
    assert (together[2:3] == apart).all()
    assert (prepare(data, {"image": cells, "label": labels}, [1, 3])["input"] != together).any()
    centre = images.transpose(0, 3, 1, 2)[:, :, 3:9, 2:8]
    assert (prepare(data, {"image": cells, "label": labels})["input"] == centre).all()


@pytest.mark.parametrize(
    ("image", "label", "changes", "error"),
    [
        (b"no image", 3, {}, ["data.label_column", "label", "must be a column of labels from 0 to 2: "]),
        (encode(draw(1)[0][0]), 3, {}, ["data.label_column", "label", "must be a column of labels from 0 to 2: "]),
        (encode(draw(1)[0][0]), b"x", {}, ["data.label_column", "label", "must be a column of labels from 0 to 2: "]),
        (encode(draw(1)[0][0]), 0, {"shape": [3, 9, 9]}, ["data.shape", "[3, 9, 9]", "must be the shape"]),
        (np.zeros(5), 0, {"transform": {"crop": 2}}, ["data.transform", "file", "must be used with images"]),
        ("text", 0, {}, ["data.input_column", "image", "must be a column of images or of arrays of numbers"]),
        (None, 0, {"corrupt_images": "skip"}, ["data.input_column", "image", "must hold a value in every row"]),
        ({"bytes": None, "path": "x"}, 0, {}, ["data.input_column", "image", "must hold a value in every row"]),
        (np.nan, 0, {"shape": [1]}, ["data.input_column", "image", "must hold a value in every row"]),
        (
            np.array([1, np.nan]),
            0,
            {"shape": [2]},
            ["data.input_column", "image", "must be a column of images or of arr"],
        ),
        (
            np.array([1, np.inf]),
            0,
            {"shape": [2]},
            ["data.input_column", "image", "must be a column of images or of arr"],
        ),
        (np.ones(2), None, {"shape": [2]}, ["data.label_column", "label", "must hold a value in every row"]),
        (np.ones(2), np.float64("nan"), {"shape": [2]}, ["data.label_column", "label", "must hold a value in every"]),
        (
            np.ones(2),
            0.5,
            {"shape": [2]},
            ["data.label_column", "label", "must be a column of labels from 0 to 2: 0.5"],
        ),
        (
            np.ones(2),
            True,
            {"shape": [2]},
            ["data.label_column", "label", "must be a column of labels from 0 to 2: True"],
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_named(image, label, changes, error):
    cells = np.empty(1, dtype=object)
    cells[0] = image
    labels = np.array([label], dtype=object)
    prepared = prepare(spec_of([3, 12, 10], **changes), {"image": cells, "label": labels})
    assert prepared["label"] != CORRUPT
    field, value, takes = json.loads(prepared["error"][0])
    assert [field, value] == error[:2]
    assert takes.startswith(error[2])


def test_whole_numbers_of_floating_type_are_labels():
    """As a null in another row makes them of integers."""
    cells = np.empty(2, dtype=object)
    cells[:] = [np.ones(2), np.ones(2)]
    prepared = prepare(spec_of([2]), {"image": cells, "label": np.array([0.0, 2.0])})
    assert (prepared["label"].tolist(), prepared["error"].tolist()) == ([0, 2], ["", ""])


@pytest.mark.parametrize("missing", [None, np.nan])
def test_a_sample_of_an_archive_without_a_member_is_named_with_those_that_it_has(missing):
    data = spec_of([3, 12, 10], format="webdataset", input_column="png", label_column="cls")
    columns = {"png": missing, "jpg": b"x", "v1.png": missing, "cls": b"0", "__key__": "b"}
    cells = {name: np.array([value], dtype=object) for name, value in columns.items()}
    field, value, takes = json.loads(prepare(data, cells)["error"][0])
    assert (field, value) == ("data.input_column", "png")
    assert takes.startswith("must hold a value in every row; there is none in file, b, which has jpg, cls; the key of")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            ["0", "1"],
            r"data.label_column: must hold values of one kind .* numbers in .*0.parquet and text in .*2.parquet",
        ),
        (pyarrow.array([0, 1], pyarrow.int8()), None),
        (pyarrow.array([None, None]), None),
        ([0.0, 1.0], None),
    ],
)
def test_columns_whose_kind_differs_between_files_are_refused_by_name(other, message, tmp_path):
    """Ray Data reads the others together."""
    data = make_stream("parquet", tmp_path)
    images = pyarrow.array([encode(image) for image in draw(2)[0]])
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": other}), tmp_path / "train" / "2.parquet")
    with pytest.raises(DataError, match=message) if message else contextlib.nullcontext():
        assert list_train(data).rows.tolist() == [7, 8, 2]


def test_the_place_of_a_row_in_its_file(tmp_path):
    files = list_train(make_stream("parquet", tmp_path))  # of 7, 8 and 6 rows
    order = [files.paths[number] for number in (2, 0, 1)]
    assert [files.row_in_file(order, row) for row in (0, 5, 6, 12, 13, 20)] == [0, 5, 0, 6, 0, 7]


@pytest.mark.parametrize(
    ("changes", "place", "name"),
    [
        ({}, {}, "file, crc32 d90ea798"),
        ({"format": "webdataset", "input_column": "png"}, {"__key__": "007"}, "file, 007"),
    ],
)
def test_a_corrupt_image_is_marked_and_told_from_others_of_its_file(changes, place, name):
    data = spec_of([3, 12, 10], **changes)
    columns = {data.input_column: [b"no image", encode(draw(1)[0][0])], "label": [2, 1]}
    columns |= {column: [value, value] for column, value in place.items()}
    prepared = prepare(data, {column: np.array(values, dtype=object) for column, values in columns.items()})
    assert prepared["label"].tolist() == [CORRUPT, 1]
    field, value, takes = json.loads(prepared["error"][0])
    assert (field, value, prepared["error"][1]) == ("data.input_column", name, "")
    assert takes.startswith("must be a readable image: ")
    assert prepared["input"].shape == (2, 3, 12, 10)
