import os

import pytest

from tests.trainer.data.image_files import make_stream, write_images
from tests.trainer.data.sources import list_train
from trainer.errors import DataError


@pytest.mark.parametrize("way", ["train/cat/0.png", "train/cat"])
def test_links_out_of_the_folder_are_refused(tmp_path, way):
    data = make_stream("images", tmp_path)
    outside = write_images(tmp_path / "outside")
    os.symlink(outside / way, tmp_path / "data" / "train" / "a" / "way.png")
    with pytest.raises(DataError, match="must contain only links that stay below"):
        list_train(data)


def test_a_broken_link_is_named(tmp_path):
    data = make_stream("images", tmp_path)
    path = tmp_path / "data" / "train" / "a" / "x.png"
    path.symlink_to("gone")
    with pytest.raises(
        DataError, match=rf"data.train: must be a link to a file that exists \(got '{path}'\)"
    ):
        list_train(data)
