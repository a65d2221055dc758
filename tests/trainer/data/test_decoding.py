"""Decoding of image files in folders and in streams."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from trainer.data import decoding
from trainer.data.corrupt import CORRUPT, read_or_replace
from trainer.data.decoding import IMAGE_SUFFIXES, decode
from trainer.data.folders import FolderImages
from trainer.data.preprocess import Preprocessor
from trainer.data.torchvision import open_library
from trainer.errors import CorruptImage, DataError
from trainer.jobspec import RayDataSpec, TorchvisionDataSpec

RAMP = np.arange(256).reshape(16, 16)


def in_folder(path):
    """Return pixels (H, W, 3) as `imagefolder` reads them."""
    return np.asarray(
        read_or_replace(FolderImages(path.parent, [path.name], np.zeros(1, int)), 0, skip=True).image
    )


def in_stream(path, shape=(3, 16, 16), columns=None):
    """Return the same as `ray` reads them; raises the feeder's error even if rows are skipped."""
    columns = columns or {"image": np.array([path.read_bytes()], dtype=object), "label": np.array([0])}
    data = RayDataSpec(name="ray", format="parquet", train="x", test="x", classes=2, shape=list(shape))
    prepared = Preprocessor(data, None, None)({"path": np.array([str(path)]), **columns})
    if prepared["error"][0]:
        raise (CorruptImage if prepared["label"][0] == CORRUPT else DataError)(
            *json.loads(prepared["error"][0])
        )
    return prepared["input"][0].transpose(1, 2, 0)


READERS = pytest.mark.parametrize("read_image", [in_folder, in_stream])


def save(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


@READERS
@pytest.mark.parametrize(
    ("suffix", "pixels", "expected"),
    [
        ("png", (RAMP * 257).astype(np.uint16), RAMP),
        ("tif", (RAMP * 257).astype(np.uint16), RAMP),
        ("tif", (RAMP * 257).astype(">u2"), RAMP),
        ("pgm", (RAMP * 257).astype(np.uint16), RAMP),
        (
            "png",
            (RAMP * 16).astype(np.uint16),
            np.rint(RAMP * 16 / 257),
        ),  # 12 bits in 16: by the range of the type
        ("tif", (RAMP / 255).astype(np.float32), RAMP),
        ("png", RAMP.astype(np.uint8), RAMP),
    ],
)
def test_samples_are_scaled_by_the_range_of_their_type(tmp_path, read_image, suffix, pixels, expected):
    found = read_image(save(tmp_path / f"x.{suffix}", pixels))
    assert (found == expected[:, :, None]).all()


@READERS
def test_packed_samples_of_12_bits_use_the_whole_range(tmp_path, read_image):
    """Pillow writes no such file: one of 16 x 16 samples of 8 bits as nibble pairs is patched."""
    values = np.rint(RAMP / 255 * 4095).astype(int).reshape(-1, 2)
    packed = np.stack(
        [values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], axis=1
    )
    buffer = io.BytesIO()
    Image.fromarray(packed.astype(np.uint8).reshape(16, 24)).save(buffer, "tiff")
    content = bytearray(buffer.getvalue())
    for tag, old, new in ((256, 24, 16), (258, 8, 12)):  # width, bits per sample
        for kind, size in ((3, 2), (4, 4)):
            entry = tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little")
            content = content.replace(
                entry + old.to_bytes(size, "little"), entry + new.to_bytes(size, "little")
            )
    path = tmp_path / "x.tif"
    path.write_bytes(content)
    with Image.open(path) as image:
        assert (image.mode, image.size) == ("I;16", (16, 16))
    assert (read_image(path) == RAMP[:, :, None]).all()


@READERS
@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            (RAMP * 257).astype(np.float32),
            "must be an image whose floating samples are between 0 and 1, not 0 to 65535",
        ),
        (
            np.full((16, 16), np.nan, np.float32),
            "must be an image whose floating samples are between 0 and 1",
        ),
        ((RAMP * 257).astype(np.int32), "must be an image of unsigned samples of at most 16 bits"),
    ],
)
def test_samples_of_unknown_range_are_rejected_and_never_skipped(tmp_path, read_image, pixels, message):
    with pytest.raises(DataError, match=rf"{message}.*x.tif") as caught:
        read_image(save(tmp_path / "x.tif", pixels))
    assert type(caught.value) is DataError


@READERS
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_an_image_is_rotated_as_its_exif_orientation_says(tmp_path, read_image, suffix):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated clockwise
    found = read_image(save(tmp_path / f"x.{suffix}", pixels, exif=exif))
    assert found[:, 8:].min() > 200
    assert found[:, :8].max() < 50


@READERS
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_become_white(tmp_path, read_image, mode):
    drawing = np.zeros((16, 16, 4), np.uint8)
    drawing[4:8, :, 3] = 255
    drawing[8, :, 3] = 51
    image = Image.fromarray(drawing).convert(mode)
    options = {}
    if mode == "P":
        image = Image.fromarray(np.where(drawing[:, :, 3] == 255, 1, 0).astype(np.uint8), "P")
        image.putpalette([9, 9, 9, 0, 0, 0])
        options = {"transparency": 0}
    path = tmp_path / "x.png"
    image.save(path, **options)
    found = read_image(path)
    assert (found[:4] == 255).all()
    assert (found[4:8] == 0).all()
    assert (found[8] == (255 if mode == "P" else 204)).all()


def test_a_large_image_is_read(tmp_path):
    path = tmp_path / "x.png"
    Image.new("L", (13_400, 13_400), 7).save(path, compress_level=1)
    image = decode(path)
    assert (image.size, image.getpixel((13_399, 13_399))) == ((13_400, 13_400), (7, 7, 7))


@READERS
@pytest.mark.parametrize("factor", [1, 4])  # beyond Pillow's own limit too, which is twice its setting
def test_an_image_with_too_many_pixels_is_rejected_and_never_skipped(
    tmp_path, read_image, factor, monkeypatch
):
    monkeypatch.setattr(decoding, "MAX_IMAGE_PIXELS", 255)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000 // factor**2)
    with pytest.raises(DataError, match=r"must be an image of at most [\d,]+ pixels.*x.png") as caught:
        read_image(save(tmp_path / "x.png", RAMP.astype(np.uint8)))
    assert type(caught.value) is DataError


@READERS
@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_listed_suffix_is_read(tmp_path, read_image, suffix):
    pixels = np.full((16, 16, 3), 200, np.uint8)
    assert abs(read_image(save(tmp_path / f"x{suffix}", pixels)).astype(int) - 200).max() < 10


def test_image_folders_of_torchvision_are_read_equally(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "country211" / part / name
            folder.mkdir(parents=True)
            save(folder / "x.png", (RAMP * 257).astype(np.uint16))
    images = open_library(TorchvisionDataSpec(name="torchvision:Country211", root=str(tmp_path))).training
    assert (np.asarray(images[1][0]) == RAMP[:, :, None]).all()
