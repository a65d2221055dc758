import re

from hypothesis import given
from hypothesis import strategies as st

from service.domain.jobs import JobState, is_legal, new_id


@given(st.sampled_from(JobState), st.sampled_from(JobState))
def test_a_terminal_state_never_changes(before, after):
    if before.is_terminal:
        assert not is_legal(before, after)


def test_terminal_states():
    assert {state for state in JobState if state.is_terminal} == {
        JobState.SUCCEEDED,
        JobState.FAILED,
        JobState.CANCELLED,
    }


def test_identifiers_are_safe_in_urls_file_names_and_submission_ids():
    ids = {new_id("job") for _ in range(1_000)}
    assert len(ids) == 1_000
    assert all(re.fullmatch(r"job-[0-9a-f]{12}", identifier) for identifier in ids)
