import json
import struct

import pytest

from tests.trainer.factories import here, make_spec, run_here
from trainer.checkpoint.state import TrainProgress
from trainer.errors import Diverged
from trainer.jobspec import AttemptContext, AttemptTask, MlpSpec, SgdSpec, attempt_folder
from trainer.tracking.figures import write_figures
from trainer.tracking.outbox import Outbox
from trainer.training.step_sync import NoNotices
from trainer.worker import _train


def is_drawn(path):
    """Return whether a file is a non-empty PNG image."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    return content.startswith(b"\x89PNG") and width > 300 and height > 200


def test_the_figures_of_the_paper_are_drawn_from_run_metrics(tmp_path):
    _, notes = run_here(make_spec(steps=10, eval_every=5, probes={"measure": ["percentiles"], "every": 2}))
    outbox = Outbox(tmp_path)
    for step, metrics in notes.metrics.items():
        outbox.log(step, metrics)
    for step, metrics in notes.probes.items():
        outbox.log(step, metrics, "probes")
    outbox.put("tags", tags={"norm": "sync"})
    outbox.close()
    paths = write_figures(outbox.path, tmp_path / "figures")
    assert [path.name for path in paths] == [
        "accuracy.png",
        "percentiles-activation1.png",
        "percentiles-activation2.png",
    ]
    assert all(is_drawn(path) for path in paths)


def test_figures_of_a_diverged_run_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.worker.RayNotices", lambda _: NoNotices())
    monkeypatch.setattr(
        "trainer.worker.hide_credentials", lambda: None
    )  # of this process, which other tests need
    model = MlpSpec(activation="relu", init_std=1)
    probes = {"measure": ["percentiles"], "every": 1}
    spec = make_spec(norm="none", model=model, optimizer=SgdSpec(lr=1e5), steps=100, probes=probes)
    context = AttemptContext(job_id="job-1", attempt=1, name="test", folder=str(tmp_path))
    folder = attempt_folder(tmp_path, 1)
    folder.mkdir()
    with pytest.raises(Diverged):
        _train(AttemptTask(spec=spec, context=context), here(), TrainProgress(), None, folder)
    assert is_drawn(folder / "figures" / "percentiles-activation1.png")


def test_figures_without_data_are_not_drawn(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [
        {"kind": "evaluation", "step": 0, "metrics": {"f1": 0.5}},
        {"kind": "probes", "step": 4, "metrics": {"probe/layer1.0.relu:2/unit8/p50": 0.1}},
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [path.name for path in write_figures(metrics, tmp_path)] == ["percentiles-layer1.0.relu-2.png"]
