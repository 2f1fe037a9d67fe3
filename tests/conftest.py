"""What integration tests share: one embedded PostgreSQL and Redis for the session, a fresh shop in them per module."""

import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

# Real servers and shops, for every folder of tests that runs against them.
pytest_plugins = (
    "tests.integration.fixtures",
    "tests.integration.replicas",
)
_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def _clean_environment() -> Iterator[None]:
    """Settings of the person who runs the tests must not change what is tested (the addresses of servers excepted)."""
    kept = {"CONCORD_POSTGRES_DSN", "CONCORD_REDIS_URL", "CONCORD_TEST_DATA"}
    removed = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("CONCORD_") and name not in kept}
    yield
    os.environ.update(removed)


@pytest.fixture(scope="session", autouse=True)
async def _grpc_stays() -> None:
    """gRPC ends its poller with the last channel and starts it with the next: after cancelled calls that end can wait for ever."""
    grpc.aio.init_grpc_aio()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets (CONCORD_TEST_DATA, or ../shared/data beside the checkout); skips where there is none."""
    folder = Path(os.environ.get("CONCORD_TEST_DATA", _ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real data sets are not here; name their folder with CONCORD_TEST_DATA")
    return folder
