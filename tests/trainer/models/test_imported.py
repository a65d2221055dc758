"""Models built by a user's function."""

import pytest
import torch
from torch import nn

from syncbn import SyncBatchNorm
from trainer.errors import ConfigurationError
from trainer.jobspec import ImportedModelSpec, Norm
from trainer.models import build_model

IMAGE = (3, 32, 32)


def small(width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    )


def failing():
    raise KeyError("the user's own")


def no_model():
    return {"weights": 1}


number = 3


def imported(function, module="tests.trainer.models.test_imported", **arguments):
    return ImportedModelSpec(name=f"import:{module}:{function}", arguments=arguments)


def test_norms_of_an_imported_model_are_replaced():
    models = {norm: build_model(imported("small", width=6), norm, IMAGE, 5, seed=3) for norm in Norm}
    assert type(models[Norm.SYNC][1]) is SyncBatchNorm
    assert models[Norm.SYNC][0].bias is None
    assert models[Norm.GROUP][1].num_groups == 1
    for model in models.values():
        assert torch.equal(model[0].weight, models[Norm.NONE][0].weight)
        assert torch.equal(model[4].weight, models[Norm.NONE][4].weight)
        assert model(torch.randn(2, *IMAGE)).shape == (2, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            imported("small", module="no.such"),
            r"model.name: must be in an existing module; there is no no \(got 'import:no.such:small'\)",
        ),
        (
            imported("small", module="tests.trainer.none"),
            r"model.name: must be in an existing module; there is no tests.trainer.none",
        ),
        (imported("none"), r"model.name: must be a function in tests.trainer.models.test_imported .got"),
        (imported("number"), r"model.name: must be a function in tests.trainer.models.test_imported .got"),
        (
            imported("small", depth=3),
            r"model.arguments: must be arguments of .*: got an unexpected keyword argument 'depth'",
        ),
        (imported("no_model"), r"model.name: must be a function that returns a torch.nn.Module, not dict"),
    ],
)
def test_an_import_that_returns_no_model_is_named(spec, message):
    with pytest.raises(ConfigurationError, match=message):
        build_model(spec, Norm.SYNC, IMAGE, 5, seed=0)


def test_imported_models_must_fit_the_classes():
    with pytest.raises(
        ConfigurationError,
        match=r"\(2, 3, 32, 32\) to logits of shape \(2, 7\), not to a tensor of shape \(2, 5\)",
    ):
        build_model(imported("small"), Norm.SYNC, IMAGE, 7, seed=0)


def test_errors_of_imported_code_pass_unchanged(tmp_path, monkeypatch):
    with pytest.raises(KeyError, match="the user's own"):
        build_model(imported("failing"), Norm.SYNC, IMAGE, 5, seed=0)
    with pytest.raises(RuntimeError, match="expected input"):
        build_model(imported("small"), Norm.SYNC, (2, 32, 32), 5, seed=0)
    (tmp_path / "module_with_a_gap.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        build_model(imported("build", module="module_with_a_gap"), Norm.SYNC, IMAGE, 5, seed=0)
