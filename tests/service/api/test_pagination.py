import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.pagination import MAX_SEQUENCE, decode_page_token, encode_page_token
from trainer.jobspec import InvalidField


@given(st.integers(0, MAX_SEQUENCE))
def test_page_tokens_round_trip(position):
    assert decode_page_token(encode_page_token(position)) == position


def test_the_last_page_has_no_token():
    assert encode_page_token(None) is None
    assert decode_page_token(None) is None
    assert decode_page_token("") is None


@pytest.mark.parametrize("token", ["!", "x", encode_page_token(MAX_SEQUENCE + 1), "LTE", "4pyT", "ü"])
def test_an_invalid_page_token_is_rejected(token):
    with pytest.raises(InvalidField, match="page_token: must be the next_page_token"):
        decode_page_token(token)
