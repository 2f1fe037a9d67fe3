"""Who may make a call: credentials from the call, the method's scope, the channels its request names, limits, the audit log."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from server.errors import ConcordError, ForbiddenError, UnauthenticatedError
from server.rpc.ports import AuditLog, Gate
from server.security.audit import REQUESTED, AuditEntry
from server.security.certificates import client_names
from server.security.limits import ChannelLimits
from server.security.principals import ANYONE, Principal
from server.security.scopes import ADMIN_PORT_SCOPES, RECORDING, SCOPE_OF, SCOPE_OF_FLAG, SHOP_SCOPES, Scope

# Text, because the class takes type arguments in the stubs only.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_BEARER = "bearer "


@dataclass(frozen=True)
class Rule:
    """What is known of a method before any call.

    Attributes:
        method: ``Service/Method``.
        scope: what its caller needs; None: nobody may call it.
        flag: a field, and the value with which it needs one scope more.
    """

    method: str
    scope: Scope | None
    flag: tuple[str, bool, Scope] | None

    @property
    def service(self) -> str:
        """The service's name."""
        return self.method.partition("/")[0]

    @property
    def operational(self) -> bool:
        """True for what operators call: on the admin port, and never shed because of customers' load."""
        return self.scope in ADMIN_PORT_SCOPES


def rule_of(method: str) -> Rule:
    """Returns the rule of ``Service/Method``."""
    return Rule(method, SCOPE_OF.get(method), SCOPE_OF_FLAG.get(method))


class Access:
    """Decides on every call of one port.

    Args:
        gate: finds out who is calling.
        audit: the log of admin calls, merges and refusals.
        limits: what each channel may do.
        channels: registered channels; others are not counted, or callers could invent names without bound.
        admin_port: True on the admin port, False where there is another one for admin methods, None where one port serves all.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        gate: Gate,
        audit: AuditLog,
        limits: ChannelLimits,
        *,
        channels: tuple[str, ...],
        admin_port: bool | None,
        clock: Callable[[], float],
    ) -> None:
        self._gate = gate
        self._audit = audit
        self._limits = limits
        self._channels = frozenset(channels)
        self._admin_port = admin_port
        self._clock = clock

    async def authenticate(self, context: Context) -> Principal:
        """Returns who calls.

        Raises:
            UnauthenticatedError: they do not prove it.
        """
        if self._gate.open_to_all:
            return ANYONE
        return await self._gate.authenticate(_bearer(context), client_names(context.auth_context()))

    def permit(self, rule: Rule, caller: Principal) -> None:
        """Checks that a caller may call a method on this port.

        Raises:
            ForbiddenError: they may not.
        """
        if rule.scope is None:
            raise ForbiddenError("this method is open to nobody", reason="METHOD_FORBIDDEN")
        if self._admin_port is not None and self._admin_port is not rule.operational and rule.scope is not Scope.MODELS_READ:
            where = "another port than the admin port" if self._admin_port else "the admin port"
            raise ForbiddenError(f"this method is served on {where}", reason="WRONG_PORT")
        caller.require(rule.scope)
        if rule.scope in SHOP_SCOPES and caller.channels is not None:
            raise ForbiddenError("this is the whole shop's: it needs a caller that speaks for every channel", reason="CHANNEL_FORBIDDEN")

    @contextmanager
    def entered(self, rule: Rule, caller: Principal, request: Any) -> Iterator[None]:
        """Holds a unary call to its channels, and counts it among its channel's while it lasts; operators' calls are not counted.

        Raises:
            ForbiddenError: it speaks for a channel that is not the caller's.
            OverloadedError: its channel has had its share.
        """
        channel = self._checked(rule, caller, request)
        if rule.operational:
            yield
            return
        self._limits.enter(channel, rule.service)
        try:
            self._limits.events(channel, len(getattr(request, "events", ())))
            yield
        finally:
            self._limits.leave(channel, rule.service)

    async def checked_stream(self, rule: Rule, context: Context, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Passes on a stream's messages that keep to the caller's channels, as fast as the channel's rate allows.

        Each message is asked who sends it: a stream may outlive the key or token that it was opened with.
        """
        async for request in requests:
            caller = await self.authenticate(context)
            self.permit(rule, caller)
            await self._limits.events_in_turn(self._checked(rule, caller, request), len(getattr(request, "events", ())))
            yield request

    async def audited(self, rule: Rule, caller: Principal, request_id: str, request: Any, answer: Callable[[], Awaitable[Any]]) -> Any:
        """Answers a call; an admin call is noted before it is done and after, a merge after.

        Raises:
            UnavailableError: an admin call could not be noted, and was not done.
        """
        if rule.scope is Scope.ADMIN:
            return await self._noted(rule, caller, request_id, request, answer)
        response = await answer()
        if merged := getattr(response, "merged_user_id", ""):
            await self._audit.note(AuditEntry(caller.name, rule.method, "OK MERGED", request_id, customer=merged))
        return response

    async def refused(self, rule: Rule, caller: Principal | None, request_id: str, error: Exception) -> None:
        """Notes a refusal for lack of credentials or rights."""
        if isinstance(error, (UnauthenticatedError, ForbiddenError)):
            code = "UNAUTHENTICATED" if isinstance(error, UnauthenticatedError) else "PERMISSION_DENIED"
            entry = AuditEntry(caller.name if caller else "", rule.method, f"{code} {error.reason}", request_id)
            await self._audit.note_refusal(entry, at=self._clock())

    async def _noted(self, rule: Rule, caller: Principal, request_id: str, request: Any, answer: Callable[[], Awaitable[Any]]) -> Any:
        target = f"model:{version}" if (version := getattr(request, "model_version", "").replace("\0", "")) else ""
        await self._audit.require(AuditEntry(caller.name, rule.method, REQUESTED, request_id, target))
        outcome, customer = "FAILED", ""
        try:
            response = await answer()
            outcome, customer = "OK", getattr(response, "user_id", "")
            if receipt := getattr(response, "receipt_id", ""):
                target, customer = f"receipt:{receipt}", ""
            return response
        except ConcordError as error:
            outcome = f"FAILED {error.reason}"
            raise
        finally:
            await self._audit.note(AuditEntry(caller.name, rule.method, outcome, request_id, target, customer))

    def _checked(self, rule: Rule, caller: Principal, request: Any) -> str:
        """Returns the channel the request counts for, once it is known to be the caller's."""
        flagged = rule.flag[2] if rule.flag and getattr(request, rule.flag[0]) is rule.flag[1] else None
        if flagged:
            caller.require(flagged)
        if caller.channels is not None:
            caller.require_channels(_channels_of(request))
            if rule.method in RECORDING or flagged is Scope.EVENTS_WRITE:
                caller.require_channels([request.subject.identity.channel])
        channel = next(filter(None, _channels_of(request)), "") or caller.only_channel
        return channel if channel in self._channels else ""


def _channels_of(request: Any) -> Iterator[str]:
    """Names the channels a request speaks for: its own, that of the identity it writes, and those of its events.

    A ``subject`` elsewhere only says who a customer is, and may be known from any channel.
    """
    if channel := getattr(request, "channel", ""):
        yield channel
    if (identity := getattr(request, "identity", None)) is not None:
        yield identity.channel
    for event in getattr(request, "events", ()):
        yield event.channel
        yield event.subject.identity.channel


def _bearer(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str) and value[: len(_BEARER)].lower() == _BEARER:
            return value[len(_BEARER) :].strip()
    return ""
