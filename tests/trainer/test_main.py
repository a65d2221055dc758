import json
import subprocess
import sys

import pytest

from trainer.spec import LOG_FILE, OUTCOME_FILE, Outcome

SPEC = """
model: {name: mlp, hidden: [16]}
data: {name: digits}
num_workers: 2
steps: 30
optimizer: {lr: 0.5}
"""


def run(*arguments, cwd, timeout=120):
    command = [sys.executable, "-m", "trainer", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("steps: [", "spec.yaml holds no YAML"),
        ("steps: 1\noptimizer: {lr: 1e-400}", "greater than 0 (got 0.0)"),
        (b"\xff\xfe\x00", "spec.yaml holds no YAML"),
        ("steps: -1", "steps: Input should be greater than or equal to 1 (got -1)"),
        ("step: 1", "step: Extra inputs are not permitted"),
        ("- 1", "valid dictionary"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_taken_is_explained(tmp_path, content, told):
    if content is not None:
        (tmp_path / "spec.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run("spec.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_without_a_file_it_says_what_it_takes(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 2
    assert "give a SPEC.yaml" in result.stderr


@pytest.mark.ray
def test_one_spec_by_hand_on_a_ray_of_its_own(tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC)
    result = run("spec.yaml", "--output", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "step 30/30" in result.stdout
    outcome = Outcome.model_validate_json((tmp_path / "out/attempt-1" / OUTCOME_FILE).read_text())
    assert outcome.state == "succeeded"
    assert 0 <= outcome.metrics["accuracy"] <= 1
    assert [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()] == [0, 30]
    assert (tmp_path / "out/attempt-1/model.pt").stat().st_size > 0
    assert not (tmp_path / "out/attempt-1" / LOG_FILE).exists()
    again = run("spec.yaml", "--output", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "holds files already" in again.stderr
