import pytest

from service.api.web.vendor import SOURCES, copy


def test_copying_replaces_the_folder(tmp_path):
    for source in SOURCES.values():
        (tmp_path / "npm" / source).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "npm" / source).write_text(source)
    old = tmp_path / "vendor" / "old.js"
    old.parent.mkdir()
    old.write_text("old")
    copy(tmp_path / "npm", old.parent)
    assert {path.name: path.read_text() for path in old.parent.iterdir()} == SOURCES


def test_a_missing_package_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        copy(tmp_path, tmp_path / "vendor")
