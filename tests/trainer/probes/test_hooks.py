import pytest

from tests.trainer.factories import make_spec, run_here
from tests.trainer.probes.probing import make_batch, measure
from trainer.errors import ConfigurationError


def test_tokens_have_channels_last_and_each_call_of_a_module_is_a_hook_point():
    vit = {"name": "timm:vit_tiny_patch16_224", "arguments": {"img_size": 32, "depth": 1}}
    spec = make_spec(model=vit, norm="layer", probes={"measure": ["percentiles", "discrepancy"]})
    values = measure(spec, make_batch(4, (3, 32, 32)), shape=(3, 32, 32))
    assert {"probe/blocks.0.mlp.act/unit384/p50", "probe/blocks.0.norm1/discrepancy"} <= values.keys()
    spec = make_spec(model={"name": "torchvision:resnet18"}, probes={"measure": ["percentiles"]})
    values = measure(spec, make_batch(4, (3, 32, 32)), shape=(3, 32, 32))
    assert {"probe/layer4.1.relu/unit256/p50", "probe/layer4.1.relu:2/unit256/p50"} <= values.keys()


@pytest.mark.parametrize(
    ("probes", "rule"),
    [
        ({"measure": ["drift"], "layers": ["layers.1", "layers.9"]}, r"such as layers.*'layers.9'"),
        (
            {"measure": ["shift"], "layers": ["norms"]},
            "must be modules with trained weights for `shift`",
        ),
    ],
)
def test_unknown_layers_are_rejected_by_name(probes, rule):
    with pytest.raises(ConfigurationError, match=rule) as error:
        run_here(
            make_spec(model={"name": "import:tests.trainer.networks:backwards"}, norm="none", probes=probes)
        )
    assert error.value.field == "probes.layers"


def test_a_model_without_activation_modules_needs_named_layers():
    model = {"name": "import:tests.trainer.networks:backwards"}
    with pytest.raises(ConfigurationError, match="no activation modules"):
        run_here(make_spec(model=model, probes={"measure": ["percentiles"]}))
    values = run_here(
        make_spec(model=model, steps=1, probes={"measure": ["percentiles"], "layers": ["norms.1"]})
    )[1]
    assert len(values.probes[0]) == 3
