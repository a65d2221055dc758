import os
import subprocess
import sys

import pytest

from tests.service.cli.commands import read


def test_invalid_files_are_named(syncbn, tmp_path):
    for text, message in [
        ("- 1", "holds no mapping"),
        ("{", ": must be valid YAML"),
        ("\x00", ": must be valid YAML"),
        ("steps: 2020-01-01", "must be a JSON value"),
        ("steps: .nan", "must be a JSON value"),
    ]:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        for name in ("submit", "validate", "compare"):
            code, _, error = syncbn(name, path)
            assert code == 2
            assert message in " ".join(error.replace("│", " ").split())
    path.write_text("presets: {}")
    assert syncbn("compare", path)[0] == 2
    assert (
        syncbn("submit", "nothing.yaml")[0] == syncbn("compare", "nothing")[0] == syncbn("nonsense")[0] == 2
    )
    assert syncbn("compare", "lr-sweep", "--preset", "huge")[0] == 2


def test_a_recipe_is_found_by_its_name(syncbn):
    recipes = read(syncbn("recipes", "--json"))
    assert len(recipes) == 11
    assert "fig1-activations" in syncbn("recipes")[1]
    made = read(syncbn("compare", "fig1-activations", "--no-wait", "--json", "--priority", -5))
    assert made["comparison"]["name"] == "fig1-activations"
    assert {job["priority"] for job in made["comparison"]["jobs"]} == {-5}
    assert syncbn("cancel", made["comparison"]["id"])[0] == 0


@pytest.mark.parametrize(
    ("words", "found"),
    [("syncbn compare lr", ["lr-sweep"]), ("syncbn jobs --state s", ["submitted", "succeeded"])],
)
def test_the_shell_completes_recipes_and_choices(words, found):
    environment = os.environ | {
        "_SYNCBN_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    command = [sys.executable, "-c", "from service.cli.app import app; app(prog_name='syncbn')"]
    printed = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert printed.split() == found
