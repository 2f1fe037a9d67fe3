"""The exception tree of the server; server/rpc/status.py holds the one table from these to gRPC codes.

ConcordError
├── InvalidRequestError          a field breaks a rule                               INVALID_ARGUMENT
├── NotFoundError                something named in the request does not exist       NOT_FOUND
├── PreconditionError            the request is fine, the state is not               FAILED_PRECONDITION
├── ConflictError                a concurrent change won; start again                ABORTED
├── UnauthenticatedError         the caller did not prove who it is                  UNAUTHENTICATED
├── ForbiddenError               the caller is known but may not do this             PERMISSION_DENIED
├── OverloadedError              a bounded queue is full; try again after a pause    RESOURCE_EXHAUSTED
└── UnavailableError             a store or the model cannot answer now; retry       UNAVAILABLE
    └── StaleStateError          the state a token asks for is not visible in time   UNAVAILABLE
"""


class ConcordError(Exception):
    """Base of every error whose text may be shown to a caller.

    Attributes:
        reason: machine-readable UPPER_SNAKE name, stable across releases.
        field: path of the request field at fault, empty when none is.
    """

    def __init__(self, message: str, *, reason: str, field: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field


class InvalidRequestError(ConcordError):
    """A field of the request breaks a rule; the message says which rule."""

    def __init__(self, field: str, rule: str, *, reason: str = "INVALID_FIELD") -> None:
        super().__init__(f"{field}: {rule}", reason=reason, field=field)
        self.rule = rule


class NotFoundError(ConcordError):
    """Something the request names does not exist."""


class PreconditionError(ConcordError):
    """The request is well-formed but the state of the system does not allow it."""


class ConflictError(ConcordError):
    """A concurrent change won; start again from the call that gave the token."""


class UnauthenticatedError(ConcordError):
    """The caller brought no valid credentials; the message never says what was wrong with a secret."""


class ForbiddenError(ConcordError):
    """The caller is known but lacks the right; nothing was done."""


class OverloadedError(ConcordError):
    """A bounded queue is full or a limit reached; nothing was done, and trying again after a pause is safe.

    Attributes:
        pause_seconds: how long to wait, None to leave it to the table of statuses.
    """

    def __init__(self, message: str, *, reason: str, pause_seconds: float | None = None) -> None:
        super().__init__(message, reason=reason)
        self.pause_seconds = pause_seconds


class UnavailableError(ConcordError):
    """A store or the model cannot answer now; trying again is safe."""


class StaleStateError(UnavailableError):
    """The state that a consistency token asks for did not become visible before the deadline."""


def unknown_customer() -> NotFoundError:
    """Returns the error for an explicit user id of nobody."""
    return NotFoundError("no such customer", reason="SUBJECT_UNKNOWN", field="subject.user_id")
