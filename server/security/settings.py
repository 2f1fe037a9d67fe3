"""Settings of who may call and how much."""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from features.settings import Settings

_IDENTITIES = ("channel:", "operator:")
# Public-key algorithms only: with a shared secret every verifier could also sign.
ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})


class SecuritySettings(Settings):
    """Certificates, credentials, the admin port and the limits of each channel."""

    auth: Literal["", "none", "mtls", "keys", "jwt"] = Field(
        "",
        description="How callers prove who they are: none, mtls (client certificate), keys (API keys) or jwt. Empty: none on a loopback "
        "address; on any other the server does not start.",
    )
    admin_host: str = Field("127.0.0.1", description="Address the admin port listens on.")
    admin_port: int = Field(
        50052,
        ge=-1,
        le=65535,
        description="Port of the admin methods (activation, erasure, unlinking); 0 picks a free one, as does leaving it out where "
        "CONCORD_PORT is 0; -1 serves them on the main port.",
    )
    tls_certificate: Path | None = Field(None, description="PEM file of the server's certificate chain. Empty: no TLS.")
    tls_key: Path | None = Field(None, description="PEM file of the certificate's private key.")
    tls_client_ca: Path | None = Field(None, description="PEM file of the authorities of client certificates; set: clients need one.")
    tls_client_names: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Who client certificates with other names are, comma-separated: name=channel:web or name=operator:anna, where name "
        "is the common name or an alternative name.",
    )
    key_refresh_seconds: float = Field(5.0, gt=0, description="How long a revoked API key may still be accepted, in seconds.")
    key_stale_seconds: float = Field(
        600.0, gt=0, description="How long known API keys stay accepted while PostgreSQL cannot be asked, in seconds."
    )
    jwt_issuer: str = Field("", description="Required issuer (iss) of tokens.")
    jwt_audience: str = Field("", description="Required audience (aud) of tokens.")
    jwt_keys: Path | None = Field(
        None, description="File of the public keys of the issuer: a JWKS document or one PEM key; read again when it changes."
    )
    jwt_algorithms: Annotated[tuple[str, ...], NoDecode] = Field(
        ("RS256", "ES256", "EdDSA"), description="Signature algorithms accepted, comma-separated; public-key ones only."
    )
    jwt_channels_claim: str = Field("channels", description="Claim that holds the caller's channels: a list, or words; * is every one.")
    jwt_scopes_claim: str = Field("scope", description="Claim that holds the caller's scopes: a list, or words.")
    jwt_leeway_seconds: float = Field(10.0, ge=0, description="Clock difference forgiven at a token's expiry, in seconds.")
    channel_share: float = Field(
        1.0, gt=0, le=1, description="Largest part of CONCORD_MAX_IN_FLIGHT that one channel may hold in a service; 1 leaves it all."
    )
    channel_calls_per_second: float = Field(
        0.0, ge=0, description="Calls a second each channel may make on this replica, bursts of twice that; 0: no limit."
    )
    channel_events_per_second: float = Field(
        0.0, ge=0, description="Events a second each channel may record on this replica, bursts of twice that; 0: no limit."
    )

    @field_validator("tls_client_names", "jwt_algorithms", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("tls_client_names")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            name, separator, identity = entry.rpartition("=")
            if not separator or not name or not identity.startswith(_IDENTITIES):
                raise ValueError("must hold entries of the form name=channel:web or name=operator:anna")
        return value

    @field_validator("jwt_algorithms")
    @classmethod
    def _public(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not set(value) <= ALGORITHMS:
            raise ValueError(f"must name some of {', '.join(sorted(ALGORITHMS))}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _free_admin_port(cls, values: Any) -> Any:
        """A server on a free port wants its admin port free as well, or a second one on the machine could not start."""
        if isinstance(values, dict) and str(values.get("port", "")) == "0":
            return {"admin_port": 0} | values
        return values

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate")
        if self.auth == "mtls" and self.tls_client_ca is None:
            raise ValueError("auth mtls needs tls_client_ca")
        if self.auth == "jwt" and not (self.jwt_issuer and self.jwt_audience and self.jwt_keys):
            raise ValueError("auth jwt needs jwt_issuer, jwt_audience and jwt_keys")
        return self

    @property
    def client_names(self) -> dict[str, str]:
        """Names of client certificates to identities."""
        return {name: identity for name, _, identity in (entry.rpartition("=") for entry in self.tls_client_names)}


def is_loopback(host: str) -> bool:
    """True for an address that only this machine can reach."""
    if host in {"localhost", "ip6-localhost"} or host.startswith("unix:"):
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
