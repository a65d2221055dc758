"""`syncbn demo` on a smaller comparison."""

import io
import re

import httpx
import pytest
import yaml
from rich.console import Console

from service.cli.demo import RECIPE, run_demo
from service.local.stack import StackError, read_connection

pytestmark = pytest.mark.e2e


def test_the_demo_prints_a_report_and_leaves_no_process(tmp_path):
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["presets"]["demo"]["spec"] |= {
        "data": {"name": "digits"}, "num_workers": 1, "steps": 40, "eval_every": 10,
        "probes": {"measure": ["percentiles"], "every": 10},
    }  # fmt: skip
    recipe["presets"]["demo"]["matrix"] = {"norm": ["none", "sync"], "seed": [0]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    output = io.StringIO()
    assert (
        run_demo(
            tmp_path / "data",
            Console(file=output, width=150),
            keep=False,
            recipe_path=tmp_path / "recipe.yaml",
        )
        == 0
    )
    text = output.getvalue()
    assert "norm=sync" in text
    report = (tmp_path / "data" / "fig1-activations.html").read_text()
    assert "Cannot tell: an interval needs at least 3 seeds, 2 more than there are" in report
    assert "Input of activation3, unit 50" in report
    url = re.search(r"http://[\d.:]+", text)[0]
    with pytest.raises(httpx.TransportError):
        httpx.get(url, timeout=5)
    with pytest.raises(StackError, match="no stack runs"):
        read_connection(tmp_path / "data")
