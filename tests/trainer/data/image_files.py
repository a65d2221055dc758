"""Specs and data files for tests."""

import io
import tarfile
from itertools import count

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from PIL import Image

from trainer.data import open_dataset
from trainer.jobspec import ImageTransformSpec, JobSpec, RayDataSpec

AUGMENTED = ImageTransformSpec(crop=8, flip=True, color_jitter=0.3)
CPU = torch.device("cpu")


def make_spec(data, **changes):
    values = {
        "data": data,
        "norm": "none",
        "global_batch_size": 6,
        "steps": 10,
        "evaluation": {"batch_size": 4},
        "num_workers": 1,
    }
    return JobSpec.model_validate(values | changes)


def open_all(spec, world_size, **options):
    """Return the dataset of each worker."""
    return [open_dataset(spec, rank, world_size, CPU, torch.float32, **options) for rank in range(world_size)]


def take(datasets, first_step, steps):
    """Return the global batches of some steps by part, joined over workers: [(inputs, labels), ...]."""
    parts = []
    streams = [dataset.train(first_step) for dataset in datasets]
    for _ in range(steps):
        shares = [next(stream) for stream in streams]
        parts += [join(part) for part in zip(*shares, strict=True)]
    for stream in streams:
        stream.close()
    return parts


def take_test(datasets):
    """Return all test batches, joined over workers; each worker has the same number."""
    return [join(shares) for shares in zip(*(dataset.test() for dataset in datasets), strict=True)]


def join(shares):
    return torch.cat([share.inputs for share in shares]), torch.cat([share.labels for share in shares])


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def write_images(root, *, train=5, test=3, classes=("cat", "dog"), size=(12, 10), suffix="png", seed=0):
    """Write a folder of distinct images per class below `train` and `val`."""
    random = np.random.default_rng(seed)
    for part, images in (("train", train), ("val", test)):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(images):
                pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    return root


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def damage_page(path):
    """Overwrite the first page of a parquet file but not its footer."""
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196
    path.write_bytes(content)


def encode(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def encode_but(*corrupt):
    """Encode images one after the other; those of the given numbers are truncated."""
    numbers = count()

    def encode_next(pixels):
        content = encode(pixels)
        return content[: len(content) // 2] if next(numbers) in corrupt else content

    return encode_next


def draw(images, seed=0):
    """Return images (12, 10) and labels."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (images, 12, 10, 3), dtype=np.uint8), np.arange(images) % 3


def write_parquet(folder, counts, column=encode):
    folder.mkdir(parents=True)
    for number, size in enumerate(counts):
        images, labels = draw(size, number)
        table = pa.table({"image": [column(image) for image in images], "label": labels})
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet")
    return str(folder)


def write_webdataset(folder, counts, column=encode):
    folder.mkdir(parents=True)
    for number, size in enumerate(counts):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for position, (image, label) in enumerate(zip(*draw(size, number), strict=True)):
                for suffix, content in (("png", column(image)), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{position:03}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return str(folder)


def make_stream(kind, tmp_path, corrupt_train=(), corrupt_test=(), **changes):
    """Write 21 training and 9 test rows, with corrupt ones at the given numbers."""
    if kind == "images":
        root = write_images(tmp_path / "data", train=7, test=3, size=(10, 12), classes=("a", "b", "c"))
        for part, numbers in (("train", corrupt_train), ("val", corrupt_test)):
            files = sorted((root / part).glob("*/*"))
            for number in numbers:
                truncate(files[number])
        paths = {"train": str(root / "train"), "test": f"file://{root}/val"}
    else:
        write = write_parquet if kind == "parquet" else write_webdataset
        paths = {
            "train": write(tmp_path / "train", [7, 8, 6], encode_but(*corrupt_train)),
            "test": write(tmp_path / "test", [5, 4], encode_but(*corrupt_test)),
        }
    columns = {"input_column": "png", "label_column": "cls"} if kind == "webdataset" else {}
    values = {"format": kind, "classes": 3, "shape": [3, 8, 8], "transform": AUGMENTED, "shuffle_rows": 5}
    return RayDataSpec(name="ray", **(values | paths | columns | changes))
