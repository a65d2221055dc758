"""Fixtures of the tests of data."""

import pytest

from tests.trainer.data.image_files import write_images


@pytest.fixture
def root(tmp_path):
    return write_images(tmp_path / "data")
