"""bm25s without SciPy and tqdm, which it imports where it finds them, for a faster build and a progress bar that are not used here.

They are 45 MB in every server process, of which scoring needs nothing.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Lets packages that nobody has imported so far look as if they were not installed."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _hidden("scipy", "tqdm"):
    import bm25s

__all__ = ["bm25s"]
