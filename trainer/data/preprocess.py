"""Preprocessing of rows to inputs and labels, in tasks of Ray Data."""

import io
import json
import math
import zlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.class_folders import ClassFolders
from trainer.data.corrupt import CORRUPT, image_errors
from trainer.data.decoding import decode
from trainer.data.files import KEY_RULE
from trainer.data.transforms import PixelTransform, is_random
from trainer.errors import CorruptImage, DataError
from trainer.jobspec import ImageTransformSpec, RayDataSpec

Columns = dict[str, NDArray[Any]]


class Preprocessor:
    """Preprocessing of columns to `input`, `label` and `error`.

    `input` is (n, *shape), `label` is (n,) int64, and `error` is empty or has the fields of a DataError. A
    corrupt image has the label CORRUPT, and the error of a CorruptImage. Randomness depends on the seed and
    the bytes of a row, and so neither on the node nor on other rows.
    """

    def __init__(self, spec: RayDataSpec, classes: ClassFolders | None, seed: list[int] | None) -> None:
        """Set up the transform.

        `classes` labels images by folder; None if a column has the labels. `seed` is None for test data.
        """
        self._spec, self._classes, self._seed = spec, classes, seed
        self._transform = PixelTransform(spec.transform, training=seed is not None)
        self._random = seed is not None and is_random(spec.transform)
        # Arrays of numbers can be scaled, but not cropped, resized or flipped like images.
        scaled_at_most = spec.transform.model_copy(update={"mean": [0.0], "std": [1.0]})
        self._takes_arrays = scaled_at_most == ImageTransformSpec()

    def __call__(self, columns: Columns) -> Columns:
        """Preprocess n rows; errors are returned, since Ray would wrap raised ones."""
        inputs, labels, errors = [], [], []
        for number in range(len(next(iter(columns.values())))):
            row = {name: column[number] for name, column in columns.items()}
            try:
                label, pixels, error = self._label(row), self._input(row), ""
            except DataError as wrong:
                label = CORRUPT if isinstance(wrong, CorruptImage) else 0
                pixels = torch.zeros(self._spec.shape, dtype=torch.uint8)
                error = json.dumps([wrong.field, str(wrong.value), wrong.rule])
            inputs.append(pixels.numpy())
            labels.append(label)
            errors.append(error)
        return {
            "input": np.stack(inputs),
            "label": np.array(labels, dtype=np.int64),
            "error": np.array(errors),
        }

    def _input(self, row: dict[str, Any]) -> Tensor:
        column, shape = self._spec.input_column, tuple(self._spec.shape)
        value = self._get(row, "input_column", "bytes" if self._spec.format == "images" else column)
        if isinstance(value, dict):  # the datasets library stores images as {bytes, path}
            value = self._get(value | {"path": row["path"]}, "input_column", "bytes")
        pixels = self._decode(value, row) if isinstance(value, bytes) else self._read_array(value, row)
        if tuple(pixels.shape) != shape:
            rule = f"must be the shape of samples after `transform`, {tuple(pixels.shape)} in {_name(row)}"
            raise DataError("data.shape", list(shape), rule)
        return pixels

    def _decode(self, value: bytes, row: dict[str, Any]) -> Tensor:
        name = _name(row)
        if self._spec.format == "parquet":  # one path for many images
            name += f", crc32 {zlib.crc32(value):08x}"
        with image_errors("data.input_column", name):
            image = decode(io.BytesIO(value))
        return self._augment(image, value)

    def _read_array(self, value: Any, row: dict[str, Any]) -> Tensor:
        try:
            # Nested lists arrive as arrays of objects.
            nested = isinstance(value, np.ndarray) and value.dtype.kind == "O"
            array = np.array(value.tolist() if nested else value)
            if array.dtype.kind not in "fiu":
                raise ValueError(f"{array.dtype} is no number")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError("a number is missing, NaN or infinite")
        except ValueError as error:
            rule = f"must be a column of images or of arrays of numbers: {error} in {_name(row)}"
            raise DataError("data.input_column", self._spec.input_column, rule) from error
        if array.dtype == np.uint8 and (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3))):
            pixels = torch.from_numpy(np.atleast_3d(array)).permute(2, 0, 1)
            return self._augment(pixels, array.tobytes())
        if not self._takes_arrays:
            raise DataError(
                "data.transform",
                _name(row),
                "must be used with images: bytes of a file, or uint8 arrays (H, W, C)",
            )
        if array.size == math.prod(self._spec.shape):
            array = array.reshape(self._spec.shape)
        return torch.from_numpy(array if array.dtype in (np.uint8, np.float64) else array.astype(np.float32))

    def _augment(self, image: Any, content: bytes) -> Tensor:
        if self._seed is not None and self._random:
            # The content identifies the row: its number depends on how Ray Data splits files.
            return self._transform.at_random(image, *self._seed, zlib.crc32(content))
        return self._transform(image)

    def _label(self, row: dict[str, Any]) -> int:
        if self._classes is not None:
            return self._classes.label(row["path"])
        value = self._get(row, "label_column", self._spec.label_column)
        value = value.item() if isinstance(value, np.generic) else value
        try:
            # Integers may be floating point: a null in a column of integers converts the column.
            is_number = isinstance(value, bytes | int) or (isinstance(value, float) and value.is_integer())
            # bool is a subclass of int, but no label.
            label = int(value) if is_number and not isinstance(value, bool) else -1
        except ValueError:
            label = -1
        if not 0 <= label < self._spec.classes:
            rule = f"must be a column of labels from 0 to {self._spec.classes - 1}: {value!r} in {_name(row)}"
            raise DataError("data.label_column", self._spec.label_column, rule)
        return label

    def _get(self, row: dict[str, Any], field: str, column: str) -> Any:
        """Return a cell of a row.

        Raises DataError, with the name of the row, if the cell is missing or null.
        """
        if not _is_null(value := row.get(column)):
            return value
        rule = f"must have a value in every row; there is none in {_name(row)}"
        if self._spec.format == "webdataset":
            others = [
                name for name, cell in row.items() if name not in ("path", "__key__") and not _is_null(cell)
            ]
            rule += f", which has {', '.join(others)}; {KEY_RULE}"
        raise DataError(f"data.{field}", getattr(self._spec, field), rule)


def _is_null(value: Any) -> bool:
    """Return whether a cell was null, which Ray Data represents as None or NaN."""
    return value is None or (isinstance(value, float | np.floating) and bool(np.isnan(value)))


def _name(row: dict[str, Any]) -> str:
    """Return the origin of a row, as far as its columns contain it."""
    return ", ".join(str(row[column]) for column in ("path", "__key__") if column in row)
