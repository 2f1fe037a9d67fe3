"""The ground of this folder's tests."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guarantees.ground import Ground, open_ground


@pytest.fixture(scope="package")
def ground(bundle: Path) -> Iterator[Ground]:
    """A shop on stores of its own: these tests kill them."""
    with (
        tempfile.TemporaryDirectory(prefix="concord-test-", ignore_cleanup_errors=True) as folder,
        open_ground(Path(folder), bundle=bundle) as found,
    ):
        yield found
