import pytest

from tests.dist import run_on_ranks
from tests.trainer.factories import make_spec, train_here
from trainer.errors import Diverged
from trainer.jobspec import MlpSpec, SgdSpec


@pytest.mark.dist
def test_divergence_ends_the_run_on_every_worker_in_the_same_step():
    spec = make_spec(
        norm="none",
        num_workers=2,
        model=MlpSpec(activation="relu", init_std=1),
        optimizer=SgdSpec(lr=1e5),
        steps=100,
    )
    first, second = run_on_ranks(diverge, 2, spec)
    assert first == second
    assert 1 < first < 20


@pytest.mark.dist
def test_the_divergence_of_one_worker_ends_the_run_on_all_in_the_same_step():
    model = {"name": "import:tests.trainer.networks:breaks_on_one", "arguments": {"rank": 1, "step": 4}}
    assert run_on_ranks(diverge, 2, make_spec(norm="none", num_workers=2, model=model)) == [4, 4]


def diverge(spec):
    """Train to the end and return the step."""
    with pytest.raises(Diverged, match="the training loss is not finite") as error:
        train_here(spec)
    return error.value.step
