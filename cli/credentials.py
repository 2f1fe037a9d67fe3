"""What commands that call a server prove themselves with: settings of their own, since a server's secrets are not its callers'."""

from pathlib import Path

import grpc
from pydantic import Field, SecretStr

from features.settings import Settings, load_settings


class CallSettings(Settings):
    """How commands that take ``--server`` connect."""

    call_key: SecretStr = Field(SecretStr(""), description="API key or token that commands send to a server.", repr=False)
    call_root_certificates: Path | None = Field(None, description="PEM file of the authorities to trust; set: commands connect by TLS.")
    call_certificate: Path | None = Field(None, description="PEM file of the client certificate of commands.")
    call_private_key: Path | None = Field(None, description="PEM file of that certificate's private key.")

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """Returns TLS credentials, None for plain text."""
        from concord import tls

        if self.call_root_certificates is None:
            return None
        return tls(self.call_root_certificates, certificate=self.call_certificate, private_key=self.call_private_key)


def call_settings() -> CallSettings:
    """Reads the settings."""
    return load_settings(CallSettings)
