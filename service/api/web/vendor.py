"""Third-party files of the pages, copied from installed npm packages.

`make setup` and the image build install the packages by their lock file, and then run this module:
`python service/api/web/vendor.py NODE_MODULES`. It imports only the standard library, since the image build
runs it before anything is installed.
"""

import shutil
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "static" / "vendor"
SOURCES = {
    "htmx.min.js": "htmx.org/dist/htmx.min.js",
    "uPlot.iife.min.js": "uplot/dist/uPlot.iife.min.js",
    "uPlot.min.css": "uplot/dist/uPlot.min.css",
    "swagger-ui-bundle.js": "swagger-ui-dist/swagger-ui-bundle.js",
    "swagger-ui.css": "swagger-ui-dist/swagger-ui.css",
}
"""Files that are served, by name, and their places among the packages."""


def copy(node_modules: Path, folder: Path = FOLDER) -> None:
    """Replace the folder by the files of the packages. Raises OSError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, source in SOURCES.items():
        shutil.copyfile(node_modules / source, folder / name)


if __name__ == "__main__":
    copy(Path(sys.argv[1]))
