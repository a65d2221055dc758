"""Configuration of the documentation site: `make docs` builds it with Sphinx into build/site."""

import re
from importlib.metadata import version as installed

from sphinx.application import Sphinx

project = "syncbn"
author = "The developers of syncbn"
release = installed("syncbn")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.openapi",
]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["*.py"]
myst_heading_anchors = 4
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
html_theme = "furo"
html_title = f"syncbn {release}"
html_copy_source = False
pygments_style = "default"


def read_as_markdown(
    app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Take `code` and the asterisks of shapes in docstrings as Markdown does."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`+[^`]+`+)", line)
        lines[number] = "".join(
            f"``{part.strip('`')}``" if part.startswith("`") else re.sub(r"(?<!\*)\*(?!\*)", r"\*", part)
            for part in parts
        )


def setup(app: Sphinx) -> None:
    """Register `read_as_markdown`."""
    app.connect("autodoc-process-docstring", read_as_markdown)
