"""`syncbn demo`, on a smaller comparison."""

import io

import httpx
import pytest
import yaml
from rich.console import Console

from service.cli.demo import RECIPE, run_demo
from service.local.stack import StackError, read_connection

pytestmark = pytest.mark.e2e


def test_the_demo_compares_and_shows_and_leaves_nothing_running(tmp_path):
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["presets"]["demo"]["spec"] |= {"data": {"name": "digits"}, "steps": 40, "eval_every": 10}
    recipe["presets"]["demo"]["matrix"] = {"norm": ["none", "sync"], "seed": [0]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    told = io.StringIO()
    assert (
        run_demo(tmp_path / "data", Console(file=told, width=150), keep=False, recipe_path=tmp_path / "recipe.yaml")
        == 0
    )
    text = told.getvalue()
    assert "norm=sync" in text
    assert (tmp_path / "data" / "fig1-activations.png").read_bytes().startswith(b"\x89PNG")
    url = next(line.split()[-1] for line in text.splitlines() if line.startswith("API docs:"))
    with pytest.raises(httpx.TransportError):
        httpx.get(url, timeout=5)
    with pytest.raises(StackError, match="no stack runs"):
        read_connection(tmp_path / "data")
