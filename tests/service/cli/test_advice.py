import pytest

from service.api.schemas.advice import AdviceView
from service.cli.advice import advice_view
from service.domain.advice import advise
from tests.service.cli.commands import read
from tests.service.cli.rendering import render
from trainer.jobspec import JobSpec

SPEC = {"steps": 10, "num_workers": 4, "global_batch_size": 8, "norm": "batch"}
CURVES = {
    "probe/norm1/variance_share": [(0, 3 / 7)],
    "probe/sync_seconds": [(0, 0.002)],
    "probe/step_seconds": [(5, 0.01)],
}


@pytest.fixture
def small(tmp_path):
    """File of a job with two samples per worker."""
    path = tmp_path / "small.yaml"
    path.write_text("{steps: 10, num_workers: 4, global_batch_size: 8, norm: batch}")
    return path


def test_a_submission_warns_and_its_advice_is_shown(syncbn, small, tmp_path):
    code, printed, errors = syncbn("submit", small)
    assert code == 0
    assert "warning: norm: statistics are of 2 samples" in errors
    job_id = printed.split(":")[0]
    code, printed, errors = syncbn("advice", job_id)
    assert code == 0, errors
    assert printed.startswith("synchronise: norm1 has 2 effective values per channel and worker")
    assert "4 of 4 workers" in printed
    assert read(syncbn("advice", job_id, "--json"))["basis"] == "predicted"
    matrix = tmp_path / "comparison.yaml"
    matrix.write_text(f"{{name: c, spec: {small.read_text()}, matrix: {{norm: [batch, sync]}}}}")
    assert "warning: norm: statistics are of 2 samples" in syncbn("compare", matrix, "--no-wait")[2]


def test_the_table_has_layers_and_cost():
    view = AdviceView.model_validate(advise(JobSpec.model_validate(SPEC), CURVES))
    shown = render(advice_view(view))
    assert "2 ms of collectives per step, of 10 ms; slows a step down by 20%" in shown
    assert "0.429" in shown
