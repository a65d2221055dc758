"""Import contracts, mirrored tests, documented settings and text style."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.settings import Settings

ROOT = Path(__file__).parent.parent


def modules_after(statement):
    """Return the modules that a fresh process has loaded after a statement."""
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
        ("trainer.worker", {"ray", "mlflow", "torch.distributed.fsdp"}),
        ("syncbn", {"ray", "mlflow", "pydantic"}),
    ],
)
def test_importing_a_module_does_not_load_heavy_packages(module, costs):
    assert not costs & modules_after(f"import {module}")


def test_the_import_contracts_detect_forbidden_imports_in_new_files(tmp_path):
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
    ended = subprocess.run(
        [lint, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    for file, module in planted.items():
        importer = file.removesuffix(".py").replace("/", ".")
        assert f"{importer} -> {module} (l.1)" in ended.stdout, ended.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_names_imported_by_benchmarks_exist(script):
    ours = [
        statement
        for statement in ast.walk(ast.parse(script.read_text()))
        if isinstance(statement, ast.ImportFrom)
        and statement.module.split(".")[0] in ("service", "trainer", "syncbn")
    ]
    for statement in ours:
        module = importlib.import_module(statement.module)
        for name in statement.names:
            assert hasattr(module, name.name) or importlib.import_module(f"{statement.module}.{name.name}")


def test_all_is_the_public_namespace():
    import syncbn

    public = {
        name
        for name, value in vars(syncbn).items()
        if not name.startswith("_") and not hasattr(value, "__path__")
    }
    modules = {name for name in public if f"syncbn.{name}" in sys.modules}
    assert set(syncbn.__all__) == public - modules


def test_the_pins_satisfy_the_requirements():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras.keys() == {"client", "trainer", "service", "onnx", "s3", "dev"}
    required = [Requirement(text) for texts in (project["dependencies"], *extras.values()) for text in texts]
    for each in required:
        name = canonicalize_name(each.name)
        assert name == "syncbn" or each.specifier.contains(pins[name], prereleases=True), each


def test_every_setting_is_documented():
    text = (ROOT / "docs/configuration.md").read_text()
    for name, field in Settings.model_fields.items():
        variable = name.upper() if name.startswith("ray_auth") else f"SYNCBN_{name.upper()}"
        default = "" if field.is_required() else "–" if field.default is None else f"`{field.default}`"
        assert f"| `{variable}` | {default} | {field.description} |" in text


def test_the_recipes_are_valid_comparisons():
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


def test_docstrings_begin_with_a_line_of_at_most_80_characters():
    for package in ("service", "trainer", "syncbn"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (ast.get_docstring(node) or "").splitlines()
                    assert not lines or len(lines[0]) <= 80, f"{path}:{node.lineno}: {lines[0]}"
                    assert lines[1:2] in ([], [""]), f"{path}:{node.lineno}: {lines[0]}"


def test_text_avoids_private_idioms():
    banned = re.compile(r"\b(tell|tells|told|anew|wishes|how-manieth|parted by)\b", re.IGNORECASE)
    quoted = re.compile(r"[Cc]annot tell|could not tell|\.tell\(\)")  # a verdict, and a method of files
    folders = [ROOT / name for name in ("service", "trainer", "syncbn", "docs", "benchmarks", "examples")]
    for path in [
        ROOT / "README.md",
        ROOT / "ARCHITECTURE.md",
        ROOT / "CONTRIBUTING.md",
        *(path for folder in folders for path in folder.rglob("*")),
    ]:
        if path.suffix in {".py", ".md", ".yaml"}:
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                assert not banned.search(quoted.sub("", line)), f"{path}:{number}: {line}"


COVERED_ELSEWHERE = {
    "service/api/mlflow_proxy.py": "tests/security/test_mlflow.py",
    "service/api/openapi.py": "tests/contract/test_document.py",
    "service/api/routes/tokens.py": "tests/service/api/test_auth.py",
    "service/api/schemas/comparisons.py": "tests/service/api/routes/test_comparisons.py",
    "service/api/schemas/reports.py": "tests/service/api/routes/test_comparisons.py",
    "service/api/schemas/verdicts.py": "tests/service/api/routes/test_comparisons.py",
    "service/api/server.py": "tests/service/engine/test_background.py",
    "service/cli/demo.py": "tests/e2e/test_demo.py",
    "service/store/tables.py": "tests/service/store/test_database.py",
    "service/wiring.py": "tests/service/api/test_app.py",
    "trainer/worker.py": "tests/trainer/scenarios/test_job_process.py",
}
"""Modules whose tests need a whole application, document or stack."""
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.Try,
    ast.With,
    ast.AsyncWith,
    ast.Match,
    ast.IfExp,
    ast.comprehension,
)
MIN_BRANCHES = 3
"""Minimum number of branches and loops in functions that makes a module need tests."""


def test_file_of(path):
    """Return the mirrored test file of a module."""
    name = path.parent.name if path.stem == "__init__" else path.stem.strip("_")
    return (ROOT / "tests" / path.relative_to(ROOT)).with_name(f"test_{name}.py")


test_file_of.__test__ = False


def count_branches(path):
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return sum(isinstance(node, BRANCHES) for function in functions for node in ast.walk(function))


def test_tests_mirror_the_packages_in_both_directions():
    """Tests of several modules are in folders named `scenarios`."""
    mirrored = set()
    for package in ("service", "trainer", "syncbn"):
        for path in (ROOT / package).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            mirrored.add(test_file_of(path))
            if "migrations" not in path.parts and count_branches(path) >= MIN_BRANCHES:
                file = ROOT / COVERED_ELSEWHERE[name] if name in COVERED_ELSEWHERE else test_file_of(path)
                assert file.exists(), f"{name} has no {file.relative_to(ROOT)}"
        for path in (ROOT / "tests" / package).rglob("test_*.py"):
            assert path in mirrored or "scenarios" in path.parts, path


def test_no_modules_import_each_other_in_a_cycle():
    """Imports inside functions and under TYPE_CHECKING count. A package stands for the imports of its
    `__init__`.
    """
    graph = grimp.build_graph("service", "trainer", "syncbn", exclude_type_checking_imports=False)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    TopologicalSorter(imports).prepare()


def test_modules_of_the_layers_tests_construct_no_layer_when_imported():
    """Ranks that import them at different times would number their layers differently."""
    for path in (ROOT / "tests" / "syncbn").rglob("*.py"):
        text = path.read_text()
        inside = {
            line
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef)
            for line in range(node.lineno, node.end_lineno + 1)
        }
        for number, line in enumerate(text.splitlines(), start=1):
            assert number in inside or not re.search(r"(?<![\w.])SyncBatchNorm\(", line), f"{path}:{number}"
