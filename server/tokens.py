"""Consistency tokens as callers see them: opaque text around a customer and a version."""

import base64
import binascii

from server.domain import Token
from server.errors import InvalidRequestError

_PREFIX = "c1."
_MAX_CHARS = 1024
_MAX_VERSION = 2**63 - 1


def encode(token: Token) -> str:
    """Returns the text form of a token: ``c1.`` and unpadded base64url of ``version:user_id``."""
    packed = base64.urlsafe_b64encode(f"{token.version}:{token.user_id}".encode())
    return _PREFIX + packed.rstrip(b"=").decode("ascii")


def decode(text: str, field: str) -> Token:
    """Reads a token back; only the exact text that ``encode`` wrote is accepted.

    Args:
        text: what the caller sent.
        field: path of the request field it came in, for the error.

    Raises:
        InvalidRequestError: the text is not a token of this service.
    """
    token = _parse(text) if text.startswith(_PREFIX) and len(text) <= _MAX_CHARS else None
    if token is None or encode(token) != text:
        raise InvalidRequestError(field, "must be a token returned by this service, unchanged", reason="INVALID_TOKEN")
    return token


def _parse(text: str) -> Token | None:
    packed = text[len(_PREFIX) :]
    try:
        version, separator, user_id = base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)).decode().partition(":")
        number = int(version)
    except (binascii.Error, ValueError):
        return None
    return Token(user_id, number) if separator and user_id and "\0" not in user_id and 0 <= number <= _MAX_VERSION else None
