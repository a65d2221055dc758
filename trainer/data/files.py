"""Row files at any fsspec address, and their numbers of rows."""

import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow.parquet
from fsspec.implementations.local import LocalFileSystem

from trainer.data.cache import cached, digest
from trainer.data.class_folders import class_of, is_ignored, path_below
from trainer.data.decoding import IMAGE_SUFFIXES
from trainer.data.sampler import Indices
from trainer.errors import DataError
from trainer.jobspec import RayDataSpec

SUFFIXES = {
    "parquet": (".parquet",),
    "images": IMAGE_SUFFIXES,
    "webdataset": (".tar",),
}
THREADS = 16
"""Number of threads, which mostly wait for storage."""


@dataclass(frozen=True)
class Files:
    """Files below `folder` of `filesystem`, sorted by name."""

    filesystem: fsspec.AbstractFileSystem
    folder: str
    paths: list[str]
    sizes: list[int]
    rows: Indices
    """Number of rows of each file, shape (len(paths),)."""

    @cached_property
    def samples(self) -> int:
        """Number of rows of all files."""
        return int(self.rows.sum())

    @property
    def digest(self) -> str:
        """Fingerprint, independent of the location of the files."""
        names = [path.removeprefix(self.folder) for path in self.paths]
        return digest(list(zip(names, self.sizes, self.rows.tolist(), strict=True)))

    def row_in_file(self, paths: list[str], row: int) -> int:
        """Return the index, within its file, of row number `row` of the files `paths`."""
        ends = np.cumsum([self.rows[self.paths.index(path)] for path in paths])
        file = int(np.searchsorted(ends, row, side="right"))
        return row - (int(ends[file - 1]) if file else 0)

    @property
    def class_names(self) -> list[str]:
        """Classes of images in label order."""
        return sorted({name for path in self.paths if (name := class_of(path, self.folder)) is not None})


def list_files(field: str, address: str, spec: RayDataSpec) -> Files:
    """List the files of a format at `address` and count their rows.

    Counts are cached until a file changes. Raises DataError, with `field`, if there are no files, they cannot
    be read, links lead out of the folder, or columns are missing.
    """
    try:
        filesystem, folder = fsspec.url_to_fs(address)
        found = {
            path: entry
            for path, entry in sorted(filesystem.find(folder, detail=True).items())
            if path.lower().endswith(SUFFIXES[spec.format])
            and not is_ignored(path_below(path, folder))
            and (spec.format != "images" or class_of(path, folder) is not None)
        }
    except (OSError, ValueError, ImportError) as error:
        raise DataError(field, address, f"must be a readable path or fsspec address: {error}") from error
    if not found:
        endings = " or ".join(SUFFIXES[spec.format])
        folders = ", in one folder per class" if spec.format == "images" else ""
        rule = f"must have files of format {spec.format!r} ({endings}){folders}; there are none"
        raise DataError(field, address, rule)
    if isinstance(filesystem, LocalFileSystem):
        _refuse_ways_out(field, Path(folder), list(found))
    paths, sizes = list(found), [entry["size"] or 0 for entry in found.values()]
    if spec.format == "images":
        return Files(filesystem, folder, paths, sizes, np.ones(len(paths), dtype=np.int64))
    count = _count_parquet if spec.format == "parquet" else _count_webdataset

    def write(file: BinaryIO) -> None:
        with ThreadPoolExecutor(THREADS) as threads:
            counts = list(threads.map(lambda path: _count(count, filesystem, field, path), paths))
        file.write(json.dumps(counts).encode())

    # The listing has sizes and modification times, so a changed file gets new counts.
    state = digest(address, found)
    counts = json.loads(cached(f"rows-{state}.json", write).read_text())
    for name, column in (("input_column", spec.input_column), ("label_column", spec.label_column)):
        first: dict[str, str] = {}  # kind of values: the first file that has it
        for path, (_, kinds) in zip(paths, counts, strict=True):
            if column not in kinds:
                rule = f"must be a column of {path}: {', '.join(kinds)}"
                if spec.format == "webdataset":
                    rule += f"; {KEY_RULE}"
                raise DataError(f"data.{name}", column, rule)
            if kinds[column] != "nulls":
                first.setdefault(kinds[column], path)
        if len(first) > 1:
            differing = " and ".join(f"{kind} in {path}" for kind, path in first.items())
            raise DataError(
                f"data.{name}", column, f"must have values of one kind in all files, not {differing}"
            )
    return Files(filesystem, folder, paths, sizes, np.array([rows for rows, _ in counts], dtype=np.int64))


def _refuse_ways_out(field: str, folder: Path, paths: list[str]) -> None:
    """Raise DataError if links lead out of the folder of the data."""
    inside = (folder if folder.is_dir() else folder.parent).resolve()
    for path in [*{Path(path).parent for path in paths}, *filter(Path.is_symlink, map(Path, paths))]:
        if not path.resolve().is_relative_to(inside):
            raise DataError(field, str(path), f"must contain only links that stay below {inside}")
        if not path.exists():
            raise DataError(field, str(path), "must be a link to a file that exists")


def is_broken(error: BaseException) -> bool:
    """Return whether a read error means a damaged or mismatched file.

    Errors of unreachable files do not.
    """
    if isinstance(error, MemoryError | ConnectionError | TimeoutError):
        return False
    if isinstance(error, OSError):
        return error.errno is None  # raised by a library, not by the operating system
    if type(error).__name__ == "ArrowConversionError":  # Ray Data's wrapper of errors of pyarrow
        return True
    return isinstance(error, pyarrow.ArrowException | tarfile.TarError | zlib.error | EOFError | KeyError)


END_BYTES = 1_024
"""Length of the zeros at the end of an archive."""

KEY_RULE = "the key of a sample ends at the first dot of the file name"

Count = Callable[[BinaryIO], tuple[int, dict[str, str]]]


def _count(count: Count, filesystem: Any, field: str, path: str) -> tuple[int, dict[str, str]]:
    """Return a file's number of rows, and the kind of values of each column."""
    try:
        with filesystem.open(path, "rb") as file:
            return count(file)
    except (OSError, ValueError, tarfile.TarError, pyarrow.ArrowException) as error:
        raise DataError(field, path, f"must be readable files: {error}") from error


def _count_parquet(file: BinaryIO) -> tuple[int, dict[str, str]]:
    parquet = pyarrow.parquet.ParquetFile(file)
    return parquet.metadata.num_rows, {field.name: _kind(field.type) for field in parquet.schema_arrow}


def _kind(column: pyarrow.DataType) -> str:
    """Return the kind of a column's values.

    Ray Data can read files together if their columns agree in it.
    """
    types = pyarrow.types
    if types.is_dictionary(column):
        return _kind(column.value_type)
    kinds = {
        "numbers": (types.is_integer, types.is_floating),
        "text": (types.is_string, types.is_large_string),
        "bytes": (types.is_binary, types.is_large_binary),
        "lists": (types.is_list, types.is_large_list, types.is_fixed_size_list),
        "structs": (types.is_struct,),
        "nulls": (types.is_null,),
    }
    return next((kind for kind, tests in kinds.items() if any(test(column) for test in tests)), str(column))


def _count_webdataset(file: BinaryIO) -> tuple[int, dict[str, str]]:
    """Count the rows of an archive.

    A row is a run of files with one name up to its first dot; the rest of the name is the column.
    """
    with tarfile.open(fileobj=file, mode="r:") as archive:
        names = (
            re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", member.name) for member in archive if member.isreg()
        )
        rows = [
            [match[2] for match in row] for _, row in groupby(filter(None, names), key=lambda match: match[1])
        ]
    file.seek(-END_BYTES, os.SEEK_END)
    if file.read().strip(b"\0"):  # tarfile accepts an archive that is truncated between two members
        raise tarfile.ReadError("the end is missing")
    return len(rows), dict.fromkeys(rows[0], "bytes") if rows else {}
