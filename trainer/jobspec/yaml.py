"""YAML files of specifications and recipes."""

import re
from pathlib import Path
from typing import Any

MAX_YAML_BYTES = 1_000_000
MAX_ALIASES = 20
MAX_SHOWN_CHARS = 50


def read_yaml(path: Path) -> Any:
    """Read a YAML file, as `parse_yaml` does.

    Raises OSError if the file cannot be read, and ValueError, with the path, if it has more than
    MAX_YAML_BYTES or cannot be parsed.
    """
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise ValueError(f"{path}: must have at most {MAX_YAML_BYTES:,} bytes")
    try:
        return parse_yaml(content.decode())
    except ValueError as error:  # includes UnicodeDecodeError
        raise ValueError(f"{path}: must be valid YAML: {error}") from error


def parse_yaml(text: str) -> Any:
    """Parse YAML. Unlike in YAML 1.1, `1e-3` is a number, as in JSON.

    Raises ValueError for invalid YAML, more than MAX_ALIASES aliases, too deep nesting, and values that do
    not fit their tags.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        aliases = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            """Count the aliases, each of which may repeat a whole document of values."""
            self.aliases += self.check_event(yaml.AliasEvent)
            if self.aliases > MAX_ALIASES:
                raise yaml.YAMLError(f"must have at most {MAX_ALIASES} aliases")
            return super().compose_node(parent, index)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            """Report the position of a value that does not fit its tag.

            PyYAML itself raises errors of many classes, without a position.
            """
            try:
                value = super().construct_object(node, deep)
                if isinstance(value, int):
                    str(value)  # raises ValueError for an integer that is too long to be written in decimal
                return value
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                kind = node.tag.rpartition(":")[2]
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"value: must be a valid {kind} (got {str(node.value)[:MAX_SHOWN_CHARS]!r})",
                    node.start_mark,
                ) from error

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)  # noqa: S506 - subclass of SafeLoader
    except RecursionError:
        raise ValueError("lists and mappings must not be nested this deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
