"""Feast's own HTTP feature server over the shop's registry and Redis: the peer of several benchmarks."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import features
from cli.stack import free_port
from features.settings import Settings
from harness import WORK

# 21 features of a customer, over both views.
FEATURES = [
    *(f"user_activity:{name}" for name in ("version", "recent_items", "recent_action_codes", "recent_channels", "recent_times")),
    *(f"user_activity:{name}" for name in ("purchased_items", "purchased_days", "views_7d", "carts_7d", "purchases_28d", "searches_7d")),
    *(f"user_profile:{name}" for name in ("event_count", "purchase_count", "purchase_value", "days_since_event", "days_since_purchase")),
    *(f"user_profile:{name}" for name in ("price_mean", "price_low", "price_high", "top_categories", "top_category_shares")),
]


@contextmanager
def feature_server(settings: Settings) -> Iterator[int]:
    """Runs ``feast serve`` with one worker, as its own documentation starts it; yields its port."""
    port = free_port()
    repository = Path(features.__file__).parent
    words = [sys.executable, "-m", "feast.cli.cli", "-c", str(repository), "serve", "--host", "127.0.0.1", "--port", str(port)]
    with (WORK / "feast.log").open("w") as log:
        process = subprocess.Popen(
            [*words, "--no-access-log", "--max-requests", "1000000"], stdout=log, stderr=log, env=os.environ | settings.feast_environment()
        )
        try:
            _wait_for(port, process)
            yield port
        finally:
            process.terminate()
            process.wait(20)


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"feast serve did not start; see {WORK / 'feast.log'}") from None
            time.sleep(0.1)
        else:
            return


def body(ids: Sequence[str], *, join_key: str = "user_id", refs: Sequence[str] = FEATURES) -> bytes:
    """Returns what asks for the features of some customers or items."""
    return json.dumps({"features": list(refs), "entities": {join_key: list(ids)}}).encode()
