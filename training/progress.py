"""Progress bars, and the noise of the libraries turned off."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Iterable[T], stage: str, total: int | None = None) -> Iterable[T]:
    """Returns ``items`` with a progress bar on standard error; in a log file a line every ten seconds."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(items, desc=f"{stage:<24}", total=total, mininterval=interval, leave=True, dynamic_ncols=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what Feast, transformers and the ONNX exporter print and warn about their own internals."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
