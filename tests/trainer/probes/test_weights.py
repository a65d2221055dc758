import pytest
import torch
import torch.nn.functional as F

from tests.trainer.factories import make_spec
from tests.trainer.probes.probing import RATE, RELU, differentiate, make_batch, make_model, measure, step


@pytest.mark.parametrize(
    ("changes", "layer", "own", "below"),
    [
        ({}, "output", "output.", ("linear1.", "norm1.", "linear2.", "norm2.")),
        (
            {"probes": {"measure": ["shift"], "layers": ["linear2"]}},
            "linear2",
            "linear2.",
            ("linear1.", "norm1."),
        ),
        # Modules that are called in another order than they are defined.
        (
            {"model": {"name": "import:tests.trainer.networks:backwards"}},
            "layers.1",
            "layers.1.",
            ("layers.0.", "norms.0."),
        ),
    ],
    ids=["last", "named", "backwards"],
)
def test_the_shift_is_the_gradient_change_caused_by_lower_layers(changes, layer, own, below):
    spec = make_spec(**{"norm": "batch", "model": RELU, "probes": {"measure": ["shift"]}} | changes)
    values = measure(spec, make_batch())
    model = make_model(spec)
    _, gradients = differentiate(model, make_batch())
    _, shifted = differentiate(
        step(model, gradients, RATE, [name for name in gradients if name.startswith(below)]), make_batch()
    )
    names = [name for name in gradients if name.startswith(own)]
    before, after = (torch.cat([source[name].flatten() for name in names]) for source in (gradients, shifted))
    assert values[f"probe/{layer}/shift"] == pytest.approx(float((after - before).norm()))
    assert values[f"probe/{layer}/shift_cosine"] == pytest.approx(
        float(F.cosine_similarity(before, after, dim=0))
    )
    assert values[f"probe/{layer}/shift"] > 1e-4
    assert "probe/linear1/shift" not in values
