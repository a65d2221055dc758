import contextlib
import json

import numpy as np
import pyarrow.parquet
import pytest

from tests.trainer.data.image_files import draw, encode, make_stream, write_parquet
from tests.trainer.data.sources import list_train
from trainer.data.corrupt import CORRUPT
from trainer.data.preprocess import Preprocessor
from trainer.errors import DataError
from trainer.jobspec import RayDataSpec


def prepare(data, columns, seed=None, classes=None):
    count = len(next(iter(columns.values())))
    return Preprocessor(data, classes, seed)({"path": np.array(["file"] * count), **columns})


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
    """As read from a parquet file, except arrays, for which Ray Data has its own type."""
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


def test_augmentation_depends_only_on_seed_and_content():
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
        (
            encode(draw(1)[0][0]),
            3,
            {},
            ["data.label_column", "label", "must be a column of labels from 0 to 2: "],
        ),
        (
            encode(draw(1)[0][0]),
            b"x",
            {},
            ["data.label_column", "label", "must be a column of labels from 0 to 2: "],
        ),
        (encode(draw(1)[0][0]), 0, {"shape": [3, 9, 9]}, ["data.shape", "[3, 9, 9]", "must be the shape"]),
        (np.zeros(5), 0, {"transform": {"crop": 2}}, ["data.transform", "file", "must be used with images"]),
        ("text", 0, {}, ["data.input_column", "image", "must be a column of images or of arrays of numbers"]),
        (
            None,
            0,
            {"corrupt_images": "skip"},
            ["data.input_column", "image", "must have a value in every row"],
        ),
        (
            {"bytes": None, "path": "x"},
            0,
            {},
            ["data.input_column", "image", "must have a value in every row"],
        ),
        (np.nan, 0, {"shape": [1]}, ["data.input_column", "image", "must have a value in every row"]),
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
        (np.ones(2), None, {"shape": [2]}, ["data.label_column", "label", "must have a value in every row"]),
        (
            np.ones(2),
            np.float64("nan"),
            {"shape": [2]},
            ["data.label_column", "label", "must have a value in every"],
        ),
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
def test_errors_of_a_row_are_named(image, label, changes, error):
    cells = np.empty(1, dtype=object)
    cells[0] = image
    labels = np.array([label], dtype=object)
    prepared = prepare(spec_of([3, 12, 10], **changes), {"image": cells, "label": labels})
    assert prepared["label"] != CORRUPT
    field, value, rule = json.loads(prepared["error"][0])
    assert [field, value] == error[:2]
    assert rule.startswith(error[2])


def test_whole_floats_are_labels():
    """A null in another row turns integers into floats."""
    cells = np.empty(2, dtype=object)
    cells[:] = [np.ones(2), np.ones(2)]
    prepared = prepare(spec_of([2]), {"image": cells, "label": np.array([0.0, 2.0])})
    assert (prepared["label"].tolist(), prepared["error"].tolist()) == ([0, 2], ["", ""])


@pytest.mark.parametrize("missing", [None, np.nan])
def test_a_sample_without_a_member_names_the_members_it_has(missing):
    data = spec_of([3, 12, 10], format="webdataset", input_column="png", label_column="cls")
    columns = {"png": missing, "jpg": b"x", "v1.png": missing, "cls": b"0", "__key__": "b"}
    cells = {name: np.array([value], dtype=object) for name, value in columns.items()}
    field, value, rule = json.loads(prepare(data, cells)["error"][0])
    assert (field, value) == ("data.input_column", "png")
    assert rule.startswith(
        "must have a value in every row; there is none in file, b, which has jpg, cls; the key of"
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            ["0", "1"],
            r"data.label_column: must have values of one kind .* numbers in .*0.parquet and text in "
            r".*2.parquet",
        ),
        (pyarrow.array([0, 1], pyarrow.int8()), None),
        (pyarrow.array([None, None]), None),
        ([0.0, 1.0], None),
    ],
)
def test_columns_with_different_types_in_files_are_rejected_by_name(other, message, tmp_path):
    """Ray Data reads the other files together."""
    data = make_stream("parquet", tmp_path)
    images = pyarrow.array([encode(image) for image in draw(2)[0]])
    pyarrow.parquet.write_table(
        pyarrow.table({"image": images, "label": other}), tmp_path / "train" / "2.parquet"
    )
    with pytest.raises(DataError, match=message) if message else contextlib.nullcontext():
        assert list_train(data).rows.tolist() == [7, 8, 2]


@pytest.mark.parametrize(
    ("changes", "extra_columns", "name"),
    [
        ({}, {}, "file, crc32 d90ea798"),
        ({"format": "webdataset", "input_column": "png"}, {"__key__": "007"}, "file, 007"),
    ],
)
def test_a_corrupt_image_is_marked_within_its_file(changes, extra_columns, name):
    data = spec_of([3, 12, 10], **changes)
    columns = {data.input_column: [b"no image", encode(draw(1)[0][0])], "label": [2, 1]}
    columns |= {column: [value, value] for column, value in extra_columns.items()}
    prepared = prepare(data, {column: np.array(values, dtype=object) for column, values in columns.items()})
    assert prepared["label"].tolist() == [CORRUPT, 1]
    field, value, rule = json.loads(prepared["error"][0])
    assert (field, value, prepared["error"][1]) == ("data.input_column", name, "")
    assert rule.startswith("must be a readable image: ")
    assert prepared["input"].shape == (2, 3, 12, 10)
