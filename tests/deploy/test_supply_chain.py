"""The pinned packages and the image: bill of materials, and findings in the Dockerfile."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = Path(sys.executable).parent


def run(*command):
    return subprocess.run(
        [PROGRAMS / command[0], *command[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def hadolint(path):
    ended = run("hadolint", "--config", ".hadolint.yaml", "--format", "json", path)
    return {finding["code"] for finding in json.loads(ended.stdout)}


def recipe_of(target):
    (recipe,) = re.findall(rf"^{target}: setup\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return recipe


def test_the_dockerfile_has_no_findings():
    assert hadolint("deploy/Dockerfile") == set()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("FROM docker.io/library/python:3.11-slim-bookworm\nUSER root\n", "DL3002"),
        ("FROM docker.io/library/python:latest\n", "DL3007"),
        ("FROM ghcr.io/other/python:3.11\n", "DL3026"),
    ],
)
def test_findings_of_hadolint_are_not_ignored(tmp_path, text, rule):
    (tmp_path / "Dockerfile").write_text(text)
    assert rule in hadolint(tmp_path / "Dockerfile")


def test_the_image_runs_as_a_user_without_rights():
    users = re.findall(r"^USER (\S+)$", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    assert users
    assert users[-1].partition(":")[0] not in ("root", "0")


def test_the_bill_of_materials_lists_the_pins(tmp_path):
    """The command itself compares the file with the schema of CycloneDX."""
    recipe = recipe_of("sbom").split("cyclonedx-py ")[1].split()
    ended = run(
        "cyclonedx-py", *[str(tmp_path / "sbom.json") if "build/" in word else word for word in recipe]
    )
    assert ended.returncode == 0, ended.stderr
    bill = json.loads((tmp_path / "sbom.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert "--no-validate" not in recipe
    listed = {(one["name"], one["version"]) for one in bill["components"]}
    assert listed == {tuple(line.split("==")) for line in (ROOT / "constraints.txt").read_text().split()}


def test_the_audit_fails_for_packages_that_the_database_does_not_know(tmp_path):
    """Without `--strict`, an index that has no database looks like one without findings."""
    recipe = recipe_of("audit")
    assert "--strict" in recipe
    assert "constraints.txt" in recipe
