"""Inputs of commands: YAML files and `field=value` options."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from service.domain.recipes import RECIPES, Recipe, read_recipes
from trainer.jobspec import parse_yaml, read_yaml

DASH, STANDARD_INPUT = Path("-"), Path("/dev/stdin")


def complete_recipe(incomplete: str) -> list[str]:
    """Complete names of recipes."""
    return [path.stem for path in sorted(RECIPES.glob("*.yaml")) if path.stem.startswith(incomplete)]


RecipeOrFile = Annotated[
    str,
    typer.Argument(
        help="YAML file, `-` for standard input, or name of a recipe",
        autocompletion=complete_recipe,
        show_default=False,
    ),
]
Preset = Annotated[str, typer.Option(help="of a recipe: quick or paper")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="FIELD=VALUE", help="a field of the spec, such as optimizer.lr=0.1; may be repeated"
    ),
]


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML mapping from a file. Raises BadParameter."""
    try:
        content = read_yaml(STANDARD_INPUT if path == DASH else path)
    except FileNotFoundError:
        raise typer.BadParameter(f"{path} does not exist", param_hint="file") from None
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="file") from None
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path} holds no mapping of fields to values", param_hint="file")
    _refuse_what_json_has_not(content, str(path), "file")
    return content


def name_of(path: Path) -> str:
    """Return the default name of a submission: that of its file."""
    return "standard input" if path == DASH else path.stem


def recipes() -> list[Recipe]:
    """Return all recipes by name."""
    return read_recipes()


def find_file(name: str) -> Path:
    """Return the path of a file or recipe; `-` is standard input. Raises BadParameter."""
    if name == str(DASH):
        return DASH
    path, recipe = Path(name), RECIPES / f"{name}.yaml"
    # A file takes precedence, so that a new recipe never changes what a command means.
    found = path if path.is_file() else recipe if recipe.is_file() and "/" not in name else None
    if found is None:
        rule = f"must be a file, or a recipe that `syncbn recipes` lists (got {name})"
        raise typer.BadParameter(rule, param_hint="file")
    return found


def read_comparison(path: Path, preset: str) -> dict[str, Any]:
    """Return the request for the comparison in a file, or for a preset of a recipe.

    Raises BadParameter.
    """
    content = read_mapping(path)
    if "presets" not in content:
        return {"name": name_of(path)} | content
    try:
        return Recipe.model_validate(content).request(preset)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="file") from None


def parse_pairs(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """Read `name=value` options. Raises BadParameter."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not (separator and name):
            raise typer.BadParameter(f"must be NAME=VALUE (got {pair})", param_hint=option)
        if name in found:
            raise typer.BadParameter(f"must name each name once (got {name} twice)", param_hint=option)
        found[name] = value
    return found


def parse_overrides(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Read `--set` options, whose values are YAML. Raises BadParameter."""
    return {path: _value(path, text) for path, text in parse_pairs("--set", pairs or ()).items()}


def override(content: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Set fields of a spec, creating missing parents. Raises BadParameter."""
    for path, value in overrides.items():
        *parents, last = path.split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise typer.BadParameter(
                    f"{path}: {parent} is {place!r}, and has no fields", param_hint="--set"
                )
        place[last] = value


def _value(path: str, text: str) -> Any:
    """Parse a value as JSON, in which 1e-3 is a number, or else as YAML."""
    try:
        # YAML 1.1 would read 1e-3 as a string.
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _yaml(path, text)
    _refuse_what_json_has_not(value, path, "--set")
    return value


def _yaml(path: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except ValueError:
        raise typer.BadParameter(f"{path} takes JSON or YAML (got {text})", param_hint="--set") from None


def _refuse_what_json_has_not(value: Any, where: str, option: str) -> None:
    """Refuse YAML values that JSON does not have: dates, sets, infinities."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"{where}: must be a JSON value ({error})", param_hint=option) from None
