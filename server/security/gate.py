"""The gate of a server: who is calling, by the way the settings name, and whether the server may start so at all."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Protocol

import structlog

from features.settings import SettingsError
from server.database import Pool
from server.errors import UnauthenticatedError
from server.security.keys import ApiKeys
from server.security.principals import ANYONE, Principal, of_certificate
from server.security.settings import SecuritySettings, is_loopback
from server.security.web_tokens import WebTokens

_log = structlog.get_logger(__name__)


class Authenticator(Protocol):
    """Checks what stands after ``Bearer``."""

    async def authenticate(self, bearer: str) -> Principal:
        """Returns who holds it, or raises UnauthenticatedError."""
        ...


class Gate:
    """Finds out who is calling.

    Args:
        bearers: checks keys or tokens; None where certificates alone decide, or nothing does.
        open_to_all: nobody has to prove anything.
        client_names: names of certificates to identities; see ``of_certificate``.
    """

    def __init__(self, bearers: Authenticator | None = None, *, open_to_all: bool, client_names: dict[str, str] | None = None) -> None:
        self._bearers = bearers
        self.open_to_all = open_to_all
        self._client_names = client_names or {}

    async def authenticate(self, bearer: str, certificate_names: Sequence[str]) -> Principal:
        """Returns who calls; a key or token used over another channel's certificate is held to what both allow.

        Raises:
            UnauthenticatedError: the caller does not prove who it is.
            UnavailableError: it cannot be checked now.
        """
        if self.open_to_all:
            return ANYONE
        by_certificate = of_certificate(certificate_names, self._client_names)
        if self._bearers is None:
            if by_certificate is None:
                raise UnauthenticatedError("this certificate names no channel of this shop", reason="CERTIFICATE_UNKNOWN")
            return by_certificate
        if not bearer:
            raise UnauthenticatedError("credentials are required: authorization: Bearer ...", reason="CREDENTIALS_MISSING")
        caller = await self._bearers.authenticate(bearer)
        return caller if by_certificate is None else caller.within(by_certificate)


def open_gate(settings: SecuritySettings, pool: Pool, *, now: Callable[[], datetime]) -> tuple[Gate, ApiKeys | WebTokens | None]:
    """Builds the gate of the settings, and what has to ``run`` beside the server for it."""
    bearers: ApiKeys | WebTokens | None = None
    if settings.auth == "keys":
        bearers = ApiKeys(pool, refresh_seconds=settings.key_refresh_seconds, stale_seconds=settings.key_stale_seconds, now=now)
    elif settings.auth == "jwt":
        bearers = WebTokens(settings, now=now)
    return Gate(bearers, open_to_all=settings.auth in ("", "none"), client_names=settings.client_names), bearers


def check_exposure(settings: SecuritySettings, host: str) -> None:
    """Refuses to open an unprotected server by mistake, and says loudly when it is done on purpose.

    Raises:
        SettingsError: nothing was said about authentication, and others than this machine could call.
    """
    reachable = [address for address in (host, *([settings.admin_host] if settings.admin_port >= 0 else [])) if not is_loopback(address)]
    if not reachable:
        return
    if settings.auth == "":
        raise SettingsError(
            f"CONCORD_AUTH must be set to listen on {reachable[0]}: keys, jwt or mtls, or none if something in front of it authenticates"
        )
    if settings.auth == "none":
        _log.warning("ANYONE WHO REACHES THIS ADDRESS MAY READ AND WRITE EVERYTHING: CONCORD_AUTH is none", address=reachable[0])
    elif settings.tls_certificate is None:
        _log.warning("credentials travel in plain text: set CONCORD_TLS_CERTIFICATE, or end TLS in front", address=reachable[0])
