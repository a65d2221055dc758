"""Listing, counting and preparation of rows, as in tasks of Ray Data, without Ray."""

import errno
import shutil
import tarfile
import zlib
from pathlib import Path

import fsspec
import pyarrow.parquet
import pytest

from tests.trainer.data.image_files import make_stream, truncate, write_images
from tests.trainer.data.sources import list_train
from trainer.data.class_folders import ClassFolders, path_below
from trainer.data.files import is_broken, list_files
from trainer.data.folders import open_folders
from trainer.errors import DataError
from trainer.jobspec import ImageFolderSpec, RayDataSpec


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("kind", "rows"), [("parquet", [7, 8, 6]), ("webdataset", [7, 8, 6]), ("images", [1] * 21)]
)
def test_rows_are_counted_once_per_version_of_the_files(kind, rows, tmp_path, monkeypatch):
    data = make_stream(kind, tmp_path)
    files = list_train(data)
    assert (files.rows.tolist(), files.samples) == (rows, 21)
    assert files.paths == sorted(files.paths)
    assert files.digest != list_files("data.test", data.test, data).digest
    monkeypatch.setattr("trainer.data.files._count", lambda *_: pytest.fail("counted again"))
    assert list_train(data).digest == files.digest


def test_files_are_found_at_fsspec_addresses(tmp_path):
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
            "must have files of format 'webdataset' .*tar.*; there are none",
        ),
        (
            "parquet",
            {"label_column": "y"},
            r"data.label_column: must be a column of .*0.parquet: image, label",
        ),
        (
            "webdataset",
            {"input_column": "jpg"},
            r"data.input_column: must be a column of .*0.tar: png, cls; the key of a sample",
        ),
    ],
)
def test_missing_files_are_named(kind, changes, message, tmp_path):
    data = make_stream(kind, tmp_path)
    with pytest.raises(DataError, match=message):
        list_train(RayDataSpec.model_validate(data.model_dump() | changes))


@pytest.mark.parametrize(("kind", "name"), [("parquet", "1.parquet"), ("webdataset", "1.tar")])
def test_an_unreadable_file_is_named(kind, name, tmp_path):
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
def test_corrupt_and_unreachable_files_are_distinguished(error, expected):
    assert is_broken(error) is expected


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


@pytest.mark.parametrize("address", ["{}", "file://{}", "{}/", "memory:/{}"])
def test_folders_and_streams_label_images_by_the_same_folder(tmp_path, address):
    """The folder directly below the root counts at any depth; images outside class folders are omitted."""
    root = write_images(tmp_path / "data", classes=("a/x", "b/x", "b/y", "b"))
    shutil.copy(root / "train" / "b" / "0.png", root / "train" / "loose.png")
    parts = open_folders(ImageFolderSpec(root=str(root)))
    if address.startswith("memory"):
        fsspec.filesystem("memory").put(str(root / "train"), str(root / "train"), recursive=True)
    root_address = address.format(root / "train")
    files = list_train(make_stream("images", tmp_path / "other", train=root_address, classes=2))
    classes = ClassFolders(files.folder, files.class_names)
    expected = {
        path.removeprefix("train/"): label
        for path, label in zip(parts.training.paths, parts.training.numbers.tolist(), strict=True)
    }
    found = {path_below(path, files.folder): classes.label(path) for path in files.paths}
    assert found == expected
    assert files.class_names == list(parts.class_names) == ["a", "b"]
    assert classes.label(f"https://host{root}/train/b/x/0.png") == 1


def test_position_of_a_row_in_its_file(tmp_path):
    files = list_train(make_stream("parquet", tmp_path))  # of 7, 8 and 6 rows
    order = [files.paths[number] for number in (2, 0, 1)]
    assert [files.row_in_file(order, row) for row in (0, 5, 6, 12, 13, 20)] == [0, 5, 0, 6, 0, 7]
