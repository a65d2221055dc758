import os

import pytest

from trainer.atomic import atomic_write


@pytest.mark.parametrize("durable", [True, False])
def test_a_replaced_file_is_readable_only_by_its_owner(tmp_path, durable):
    path = tmp_path / "file"
    path.write_text("old")
    atomic_write(path, "new", durable=durable)
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.read_text()))
    atomic_write(path, "new")
    assert seen == ["old"]
