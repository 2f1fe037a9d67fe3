"""Who is calling: a name for the audit log, the channels it speaks for and what it may do."""

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

from server.errors import ForbiddenError
from server.security.scopes import ALL_SCOPES, CHANNEL_SCOPES, Scope

EVERY_CHANNEL = "*"
_NAME_CHARS = 200


@dataclass(frozen=True)
class Principal:
    """A caller that has proved who it is.

    Attributes:
        name: how it is called in audit rows, such as ``key:web/1f2e3d4c``; never a secret.
        channels: the channels it speaks for; None: every one.
        scopes: what it may do.
    """

    name: str
    channels: frozenset[str] | None
    scopes: frozenset[Scope]

    @property
    def only_channel(self) -> str:
        """The channel that all its calls are of, empty when it speaks for several."""
        return next(iter(self.channels)) if self.channels is not None and len(self.channels) == 1 else ""

    def speaks_for(self, channel: str) -> bool:
        """True when ``channel`` is one of its own."""
        return self.channels is None or channel in self.channels

    def require(self, scope: Scope) -> None:
        """Checks a right.

        Raises:
            ForbiddenError: it lacks ``scope``.
        """
        if scope not in self.scopes:
            raise ForbiddenError(f"this caller lacks the scope {scope}", reason="SCOPE_MISSING")

    def require_channels(self, channels: Iterable[str]) -> None:
        """Checks that it speaks for all of ``channels``; empty names are the validation's to refuse.

        Raises:
            ForbiddenError: one of them is another's.
        """
        for channel in channels:
            if channel and not self.speaks_for(channel):
                raise ForbiddenError("this caller does not speak for that channel", reason="CHANNEL_FORBIDDEN")

    def within(self, other: "Principal") -> "Principal":
        """Returns this caller held to what ``other``, the certificate it connected with, may do as well."""
        channels = self.channels if other.channels is None else other.channels
        if self.channels is not None and other.channels is not None:
            channels = self.channels & other.channels
        return Principal(f"{self.name} by {other.name}"[:_NAME_CHARS], channels, self.scopes & other.scopes)


ANYONE = Principal("anyone", None, ALL_SCOPES)

calling: ContextVar[Principal] = ContextVar("calling")
"""Who makes the unary call being answered; set once they are known, before the method is entered."""


def principal(name: str, channels: Iterable[str], scopes: Iterable[str]) -> Principal:
    """Builds a caller from names as keys and tokens hold them; scopes this release does not know grant nothing."""
    named = frozenset(channels)
    known = frozenset(Scope(scope) for scope in scopes if scope in ALL_SCOPES)
    return Principal(name.replace("\0", "")[:_NAME_CHARS], None if EVERY_CHANNEL in named else named, known)


def of_certificate(names: Iterable[str], mapped: dict[str, str]) -> Principal | None:
    """Returns the caller that a client certificate's names stand for, None when they stand for nobody.

    ``channel:web`` is the backend of that channel, ``operator:anna`` may do everything; ``mapped`` gives other names one of
    these two forms.
    """
    for name in names:
        kind, _, rest = mapped.get(name, name).partition(":")
        if kind == "channel" and rest:
            return Principal(f"certificate:{name}"[:_NAME_CHARS], frozenset({rest}), CHANNEL_SCOPES)
        if kind == "operator" and rest:
            return Principal(f"certificate:{name}"[:_NAME_CHARS], None, ALL_SCOPES)
    return None
