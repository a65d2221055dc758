import pytest

from service.api.web.forms import read_mapping, spec_yaml
from trainer.jobspec import InvalidField, JobSpec, parse_yaml


async def test_a_mapping_in_a_field_is_yaml():
    assert await read_mapping("x", "optimizer.lr: 1e-3\nsteps: 5") == {"optimizer.lr": 0.001, "steps": 5}
    assert await read_mapping("x", "") == {}


@pytest.mark.parametrize("text", ["- 1", "[", "1: 2", "text"])
async def test_another_value_is_refused_by_the_name_of_its_field(text):
    with pytest.raises(InvalidField, match=r"^overrides: must be"):
        await read_mapping("overrides", text)


def test_a_spec_as_yaml_is_the_spec():
    spec = JobSpec.model_validate({"steps": 5, "norm": "none", "data": {"name": "digits"}})
    assert JobSpec.model_validate(parse_yaml(spec_yaml(spec))) == spec
    assert spec_yaml(spec).startswith("norm: none\n")


async def test_large_and_broken_forms_are_refused(browser):
    path = "/jobs/job-1/clone"
    assert (await browser.post(path, content=b"name=" + b"x" * 300_000)).status_code == 413
    assert (await browser.post(path, content=b"name=\xff")).status_code == 422
