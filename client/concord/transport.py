"""How the client connects: TLS, retries, load balancing over replicas, reconnecting and keepalive."""

import json
from pathlib import Path

import grpc

# Every call of Concord is safe to retry, recording included, since this client gives each event an id. Retried are UNAVAILABLE, and
# CANCELLED: with that gRPC's core ends calls that an overloaded or stopping server has received but not looked at. 4 attempts,
# and a bucket that stops retries once they exceed a tenth of the successes, so that a fleet of clients adds at most about 10 %
# load to a server in trouble. round_robin spreads calls over the replicas a DNS name stands for.
SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
    }
)

# After a server restart the first call should find it: reconnect after 0.1 s (gRPC's default is 1 s, a whole default deadline).
# Pings only while calls are open: a peer that stopped answering is noticed after 15 s, and idle connections cost nothing.
OPTIONS = (
    ("grpc.service_config", SERVICE_CONFIG),
    ("grpc.enable_retries", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
)


def tls(
    root_certificates: Path | None = None, *, certificate: Path | None = None, private_key: Path | None = None
) -> grpc.ChannelCredentials:
    """Returns TLS credentials from PEM files.

    Args:
        root_certificates: the authorities to trust; None: those gRPC brings along.
        certificate: this client's certificate chain, for servers that ask for one; with ``private_key``.
        private_key: its key.

    Raises:
        OSError: a file cannot be read.
        ValueError: only one of certificate and key is given.
    """
    if (certificate is None) != (private_key is None):
        raise ValueError("certificate and private_key go together")
    root, key, chain = (path.read_bytes() if path else None for path in (root_certificates, private_key, certificate))
    return grpc.ssl_channel_credentials(root, key, chain)
