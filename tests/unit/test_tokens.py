"""Consistency tokens: what is encoded comes back, and nothing else is accepted."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import tokens
from server.domain import Token
from server.errors import InvalidRequestError

_USER_IDS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=128)


@given(_USER_IDS, st.integers(0, 2**63 - 1))
def test_every_token_comes_back(user_id: str, version: int) -> None:
    token = Token(user_id, version)
    text = tokens.encode(token)
    assert len(text) <= 1024
    assert tokens.decode(text, "consistency_token") == token


def _packed(text: str) -> str:
    return "c1." + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "text",
    [
        "c1.",
        "x",
        "c2." + _packed("1:u")[3:],
        _packed("1:u") + "=",
        _packed("1:u") + " ",
        _packed("u"),
        _packed("1:"),
        _packed(":u"),
        _packed("-1:u"),
        _packed("+1:u"),
        _packed("01:u"),
        _packed("1_0:u"),
        _packed("١:u"),
        _packed(f"{2**63}:u"),
        _packed("1:u\0"),
        "c1.!!!!",
        "c1.ÿ",
        "c1." + base64.urlsafe_b64encode(b"1:\xff\xfe").decode().rstrip("="),
        _packed("1:" + "u" * 2000),
    ],
)
def test_anything_else_is_refused_naming_the_field(text: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        tokens.decode(text, "entities[2].consistency_token")
    assert caught.value.field == "entities[2].consistency_token"
    assert caught.value.reason == "INVALID_TOKEN"
