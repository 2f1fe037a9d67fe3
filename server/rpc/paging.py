"""Pages of what is listed by id: tokens that name the id a page goes on after, and pages that fit into an answer."""

import base64
import binascii
from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import Message

from server.errors import InvalidRequestError
from server.rpc import rules

M = TypeVar("M", bound=Message)

_PREFIX = "l1."
# Long descriptions make a page of 1,000 items larger than the 4 MiB a gRPC client accepts; such a page ends early.
_PAGE_BYTES = 3 * 1024 * 1024


def fitting(messages: Iterable[M]) -> list[M]:
    """Returns the first messages that fit into one answer, at least one."""
    shown: list[M] = []
    size = 0
    for message in messages:
        size += message.ByteSize()
        if shown and size > _PAGE_BYTES:
            break
        shown.append(message)
    return shown


def page_token(after: str) -> str:
    """Returns the token of the page after an id."""
    return _PREFIX + base64.urlsafe_b64encode(after.encode()).decode("ascii").rstrip("=")


def read_page_token(text: str) -> str:
    """Returns the id a page goes on after; "" for the first page."""
    if not text:
        return ""
    packed = rules.text(text, "page_token", most=rules.TOKEN_CHARS).removeprefix(_PREFIX)
    try:
        after = base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)).decode()
    except (binascii.Error, ValueError):
        after = ""
    if not after or "\0" in after or page_token(after) != text:
        raise InvalidRequestError("page_token", "must be a token returned by this service, unchanged", reason="INVALID_TOKEN")
    return after
