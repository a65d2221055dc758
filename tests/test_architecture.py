"""The import contracts, and what they cannot see."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).parent.parent


def modules_after(statement):
    """The modules that a fresh process has loaded after a statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()
    )


@pytest.mark.parametrize(
    ("module", "costs"),
    [
        ("service.api.app", {"torch", "ray", "mlflow"}),
        ("service.client.client", {"torch", "ray", "mlflow", "sqlalchemy"}),
        ("trainer.jobspec", {"torch", "ray", "mlflow", "numpy"}),
        ("trainer.__main__", {"torch", "ray", "mlflow"}),
        ("syncbn", {"ray", "mlflow", "pydantic"}),
    ],
)
def test_importing_a_module_does_not_load_what_it_must_not_cost(module, costs):
    assert not costs & modules_after(f"import {module}")


def test_the_import_contracts_see_a_forbidden_import_in_a_new_file(tmp_path):
    for name in ("service", "trainer", "syncbn", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    planted = {
        "service/engine/planted.py": "mlflow",
        "trainer/data/planted.py": "ray",
        "service/domain/planted.py": "torch",
        "service/store/planted.py": "trainer.training.loop",
        "service/local/planted.py": "service.domain.jobs",
    }
    for file, module in planted.items():
        (tmp_path / file).write_text(f"import {module}\n")
    lint = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run([lint, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    for file, module in planted.items():
        importer = file.removesuffix(".py").replace("/", ".")
        assert f"{importer} -> {module} (l.1)" in ended.stdout, ended.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_imports_what_is_there(script):
    ours = [
        statement for statement in ast.walk(ast.parse(script.read_text()))
        if isinstance(statement, ast.ImportFrom) and statement.module.split(".")[0] in ("service", "trainer", "syncbn")
    ]  # fmt: skip
    for statement in ours:
        module = importlib.import_module(statement.module)
        for name in statement.names:
            assert hasattr(module, name.name) or importlib.import_module(f"{statement.module}.{name.name}")


def test_all_is_the_public_namespace():
    import syncbn

    public = {
        name for name, value in vars(syncbn).items() if not name.startswith("_") and not hasattr(value, "__path__")
    }
    modules = {name for name in public if f"syncbn.{name}" in sys.modules}
    assert set(syncbn.__all__) == public - modules


def test_the_pins_allow_what_the_project_asks_for():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert (pins["torch"], pins["torchvision"]) == ("2.14.1", "0.29.1")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras.keys() == {"client", "trainer", "service", "onnx", "dev"}


def test_every_setting_is_documented():
    text = (ROOT / "docs/configuration.md").read_text()
    for name, field in Settings.model_fields.items():
        variable = name.upper() if name.startswith("ray_auth") else f"SYNCBN_{name.upper()}"
        default = "" if field.is_required() else "–" if field.default is None else f"`{field.default}`"
        assert f"| `{variable}` | {default} | {field.description} |" in text


def test_the_compose_file_has_all_services_and_closes_what_must_be_closed():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert services.keys() == {"database", "mlflow", "ray-head", "ray-worker", "api"}
    assert [name for name, service in services.items() if "ports" in service] == ["api"]
    assert services["api"]["ports"] == ["127.0.0.1:8000:8000"]
    for service in ("ray-head", "ray-worker"):  # users' code reaches neither MLflow's server nor the database
        assert services[service]["networks"] == ["cluster"]
    for service in ("mlflow", "database"):
        assert services[service]["networks"] == ["control"]
    assert "--app-name=syncbn" in services["mlflow"]["command"]


def test_the_image_is_built_once_and_never_pulled():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    ours = {name: service for name, service in services.items() if service["image"] == "syncbn"}
    assert [name for name, service in ours.items() if "build" in service] == ["api"]
    assert {service["pull_policy"] for name, service in ours.items() if name != "api"} == {"never"}


def test_the_compose_file_watches_the_service_and_takes_any_password():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert "/readyz" in " ".join(services["api"]["healthcheck"]["test"])
    assert services["api"]["restart"] == "unless-stopped"  # a process that goes on no more ends by itself
    environment = services["api"]["environment"]
    assert "$" not in environment["SYNCBN_DATABASE_URL"]  # where it would have to be escaped
    assert environment["PGPASSWORD"] == "${POSTGRES_PASSWORD}"


def test_the_recipes_are_comparisons_that_the_service_takes():
    from service.api.schemas import SubmitComparison
    from service.domain.comparisons import choose_baseline, expand
    from service.domain.recipes import read_recipe

    recipes = sorted((ROOT / "trainer" / "recipes").glob("*.yaml"))
    assert len(recipes) == 11
    for path in recipes:
        recipe = read_recipe(path)
        assert recipe.name == path.stem
        assert {"quick", "paper"} <= recipe.presets.keys()
        for preset in recipe.presets:
            body = SubmitComparison.model_validate(recipe.request(preset))
            assert len(expand(body.spec, body.matrix, body.variants)) > 1
            assert choose_baseline(body.axes, body.baseline)


def test_module_docstrings_begin_with_a_short_noun_phrase():
    for package in ("service", "trainer", "syncbn"):
        for path in (ROOT / package).rglob("*.py"):
            lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
            first = lines[0] if lines else ""
            assert len(first) <= 80, path
            assert first.split(" ")[0] not in {"What", "Which", "Who", "Whose", "How", "Where", "When"}, path
            assert lines[1:2] in ([], [""]), path


def test_text_avoids_words_of_an_idiom_of_its_own():
    banned = re.compile(r"\b(tell|tells|told|anew|wishes|how-manieth|parted by)\b", re.IGNORECASE)
    quoted = re.compile(r"cannot tell|could not tell|\.tell\(\)")  # a verdict, and a method of files
    folders = [ROOT / name for name in ("service", "trainer", "syncbn", "docs")]
    for path in [ROOT / "README.md", *(path for folder in folders for path in folder.rglob("*"))]:
        if path.suffix in {".py", ".md", ".yaml"}:
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                assert not banned.search(quoted.sub("", line)), f"{path}:{number}: {line}"
