"""Reading specs and recipes from YAML files."""

import re
from pathlib import Path
from typing import Any


def read_yaml(path: Path) -> Any:
    """Read a spec or a recipe. Unlike YAML 1.1, `1e-3` is a number here, as in JSON.

    Raises OSError if the file cannot be read, and ValueError naming it if it holds no YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(path.read_text(), Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} holds no YAML: {error}") from error
