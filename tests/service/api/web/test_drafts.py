import pytest

from service.api.schemas import SubmitComparison, SubmitJob
from service.api.web.drafts import Draft, read_draft
from service.api.web.forms import Form
from service.api.web.submit import recipes
from trainer.jobspec import InvalidField


def form_of(draft):
    """Return the fields of the form that a draft is shown as."""
    values = {name: draft.option(name) for name in ("name", "metric", "target", "tags", "priority")}
    values |= {field.name: field.value for each in draft.sections().values() for field in each}
    for row, (path, text) in enumerate(draft.rows):
        values |= {f"matrix.{row}.path": path, f"matrix.{row}.values": text}
    return Form({name: [value] for name, value in (values | {"rest": draft.rest}).items()})


@pytest.mark.parametrize("name", recipes())
async def test_a_preset_of_each_recipe_survives_the_form_and_yaml(name):
    for preset in recipes()[name].presets:
        body = SubmitComparison.model_validate(recipes()[name].request(preset))
        draft = Draft(body.model_dump(mode="json", exclude_unset=True))
        assert (await read_draft(form_of(draft))).request() == body
        as_yaml = Form({"view": ["yaml"], "yaml": [draft.as_yaml()]})
        assert (await read_draft(as_yaml)).request() == body


async def test_a_draft_without_a_matrix_is_a_job():
    form = Form({"name": ["mine"], "spec.steps": ["5"], "tags": ["a, b"], "priority": ["3"]})
    body = (await read_draft(form)).request()
    assert isinstance(body, SubmitJob)
    assert (body.name, body.spec.steps, body.tags, body.priority) == ("mine", 5, ["a", "b"], 3)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"matrix.0.values": "1, 2"}, "matrix.0.path"),
        ({"matrix.0.path": "seed"}, "matrix.0.values"),
        ({"matrix.0.path": "seed", "matrix.0.values": "[1"}, "matrix.0.values"),
        ({"matrix.0.path": "a", "matrix.0.values": "1", "matrix.1.path": "a"}, "matrix.1.path"),
        ({"target": "["}, "target"),
        ({"rest": "["}, "rest"),
        ({"view": "yaml", "yaml": "- 1"}, "yaml"),
    ],
)
async def test_what_cannot_be_read_is_named(fields, name):
    with pytest.raises(InvalidField) as caught:
        await read_draft(Form({key: [value] for key, value in fields.items()}))
    assert caught.value.field == name
