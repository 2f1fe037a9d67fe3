"""Structured logs on stderr: JSON lines for machines, coloured text on a terminal; never request bodies, never secrets."""

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import structlog
from google.protobuf.message import Message
from structlog.typing import EventDict, Processor, WrappedLogger

_SECRET_KEY = re.compile(r"password|passwd|secret|authorization|api_key|dsn|redis_url|(^|_)token$", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(://[^:/@\s]*:)[^@/\s]+(?=@)")
_CONNINFO_PASSWORD = re.compile(r"(password\s*=\s*)('[^']*'|\S+)", re.IGNORECASE)
_API_KEY = re.compile(r"(concord_[0-9a-f]{12}_)[\w-]+")
# PostgreSQL quotes rows in these lines of an error: ids of customers, what they wrote. A forgotten customer must not stay in a log.
_QUOTED_ROWS = re.compile(r"^((?:DETAIL|CONTEXT):).*$", re.MULTILINE)
_HIDDEN = "***"


def configure(
    *, level: str = "info", stream: TextIO | None = None, json: bool | None = None, worker: int | None = None
) -> structlog.stdlib.BoundLogger:
    """Sends structlog's and the standard library's logs to one place in one form, and returns the root logger.

    Args:
        level: lowest level written: debug, info, warning or error.
        stream: where to write; stderr by default.
        json: JSON lines or readable text; by default text when the stream is a terminal.
        worker: number of this process among those of one server, said in every line.
    """
    out = sys.stderr if stream is None else stream
    as_json = not out.isatty() if json is None else json
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        *([_said_of(worker)] if worker is not None else []),
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=_final(as_json, out.isatty())))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("concord")
    return logger


def _said_of(worker: int) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**event, "worker": worker}

    return add


def _final(as_json: bool, colours: bool) -> list[Processor]:
    """Tracebacks become text before redaction, so that what an exception says is redacted too; locals are never shown."""
    renderer: Processor = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=colours)
    return [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
        redact,
        renderer,
    ]


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Hides values under secret-sounding keys, passwords in URLs and connection strings, API keys, quoted rows, whole messages."""
    return {key: _HIDDEN if _SECRET_KEY.search(key) else _clean(value) for key, value in event.items()}


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        for secret in (_URL_PASSWORD, _CONNINFO_PASSWORD, _API_KEY, _QUOTED_ROWS):
            value = secret.sub(rf"\1{_HIDDEN}", value)
        return value
    if isinstance(value, Message):
        return f"<{type(value).__name__}, {value.ByteSize()} bytes>"
    if isinstance(value, Mapping):
        return {key: _HIDDEN if _SECRET_KEY.search(str(key)) else _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else _clean(str(value))
