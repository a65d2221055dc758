import re
import tomllib
from pathlib import Path

import pytest

from service.api.web.assets import STATIC, AssetsMissingError, asset_url, assets, load
from service.api.web.vendor import SOURCES

ROOT = Path(__file__).parents[4]
WEB = ROOT / "service/api/web"


async def test_a_versioned_file_is_cached_for_ever_and_another_one_is_asked_for_again(anonymous):
    versioned = await anonymous.get(asset_url("app.css"))
    assert versioned.headers["content-type"] == "text/css; charset=utf-8"
    assert versioned.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert versioned.headers["X-Content-Type-Options"] == "nosniff"
    plain = await anonymous.get("/static/app.css")
    assert (plain.content, plain.headers["Cache-Control"]) == (versioned.content, "no-cache")
    tag = plain.headers["ETag"]
    assert (await anonymous.get("/static/app.css", headers={"If-None-Match": tag})).status_code == 304
    assert (await anonymous.get("/static/app.css?v=old")).headers["Cache-Control"] == "no-cache"


@pytest.mark.parametrize(
    "path", ["x.js", "vendor/", "vendor/.ready", "../pages.py", "%2e%2e/pages.py", "../templates/base.html"]
)
async def test_only_files_of_the_allowlist_are_served(anonymous, path):
    assert (await anonymous.get(f"/static/{path}")).status_code == 404


def test_all_files_are_read_and_all_own_ones_are_served():
    assert {f"vendor/{name}" for name in SOURCES} < assets().keys()
    assert {path.name for path in STATIC.iterdir() if path.is_file()} < assets().keys()
    assert all(asset.content for asset in assets().values())


def test_missing_files_are_named_with_the_remedy(tmp_path):
    with pytest.raises(AssetsMissingError, match=r"has no htmx\.min\.js, .*run `make setup`"):
        load(tmp_path)


def test_templates_and_static_files_are_package_data():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packaged = {path for pattern in patterns["service"] for path in (ROOT / "service").glob(pattern)}
    files = {path for folder in ("templates", "static") for path in (WEB / folder).rglob("*.*")}
    assert {path for path in files if not path.name.startswith(".")} <= packaged


def test_the_lock_file_names_no_registry():
    assert not re.search(r'"resolved"|https?://', (WEB / "package-lock.json").read_text())
