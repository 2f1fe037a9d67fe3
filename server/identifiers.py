"""Identifiers of calls and exposures: unique, and no secret."""

import random

_random = random.Random(random.SystemRandom().getrandbits(256))


def new_identifier() -> str:
    """Returns 128 random bits as 32 hex digits, which PostgreSQL reads as a uuid too."""
    return f"{_random.getrandbits(128):032x}"
