"""Requirements of the extras in `pyproject.toml`, a line each, for the layers of an image.

Packages that are named after `--without` are left out, those of the project itself resolved. Only the
standard library is imported, as nothing is installed yet.
"""

import argparse
import re
import tomllib
from pathlib import Path

PYPROJECT = Path("pyproject.toml")


def read_requirements(project: dict, extra: str) -> set[str]:
    """Return the requirements of an extra and of the extras that it names."""
    found = set()
    for requirement in project["optional-dependencies"][extra]:
        if own := re.fullmatch(rf"{project['name']}\[([\w,]+)\]", requirement):
            found = found.union(*(read_requirements(project, name) for name in own[1].split(",")))
        else:
            found.add(requirement)
    return found


def main() -> None:
    """Print the requirements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="+")
    parser.add_argument("--without", nargs="*", default=[], help="names of packages")
    options = parser.parse_args()
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    found = set(project["dependencies"]).union(*(read_requirements(project, name) for name in options.extras))
    for requirement in sorted(found):
        if re.match(r"[\w.-]+", requirement)[0] not in options.without:  # type: ignore[index]
            print(requirement)


if __name__ == "__main__":
    main()
