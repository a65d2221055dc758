"""Static files of the pages: an allowlist, read once, with cache headers."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response

from service.api.web.vendor import FOLDER, SOURCES
from service.rendering.svg import STYLE_SHEET

STATIC = Path(__file__).parent / "static"
OWN = ("app.css", "charts.js", "docs.js", "icon.svg", "live.js", "logs.js", "sign-in.js")
"""Our own files that are served."""
CHARTS = "charts.css"
"""Colours of the charts, which report files have as well."""
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
FOR_EVER = "public, max-age=31536000, immutable"
"""Cache control of an address that holds the digest of the content."""

router = APIRouter(include_in_schema=False)


class AssetsMissingError(RuntimeError):
    """Third-party files of the pages are not installed."""


@dataclass(frozen=True)
class Asset:
    """Content of a static file."""

    content: bytes
    media_type: str
    digest: str


def load(vendor: Path = FOLDER) -> dict[str, Asset]:
    """Read all files that are served, by name. Raises AssetsMissingError."""
    missing = [name for name in SOURCES if not (vendor / name).is_file()]
    if missing:
        raise AssetsMissingError(
            f"{vendor} has no {', '.join(missing)}: run `make setup`, which fetches the assets of the pages"
        )
    paths = {name: STATIC / name for name in OWN} | {f"vendor/{name}": vendor / name for name in SOURCES}
    found = {name: _asset(name, path.read_bytes()) for name, path in paths.items()}
    return found | {CHARTS: _asset(CHARTS, STYLE_SHEET.encode())}


@cache
def assets() -> dict[str, Asset]:
    """Return the files that are served, by name. Raises AssetsMissingError."""
    return load()


def asset_url(name: str) -> str:
    """Return the address of a file, which changes with its content."""
    return f"/static/{name}?v={assets()[name].digest}"


@router.get("/static/{name:path}")
async def read_asset(name: str, request: Request) -> Response:
    """Return a static file."""
    asset = assets().get(name)
    if asset is None:
        raise HTTPException(404)
    tag = f'"{asset.digest}"'
    is_versioned = request.query_params.get("v") == asset.digest
    headers = {"Cache-Control": FOR_EVER if is_versioned else "no-cache", "ETag": tag}
    if request.headers.get("If-None-Match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(asset.content, media_type=asset.media_type, headers=headers)


def _asset(name: str, content: bytes) -> Asset:
    return Asset(content, MEDIA_TYPES[Path(name).suffix], hashlib.sha256(content).hexdigest()[:16])
