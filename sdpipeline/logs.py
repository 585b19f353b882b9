"""Logging setup: constant event names with fields, on stderr, for people or for machines."""

from __future__ import annotations

import io
import logging
import sys
from contextlib import suppress
from typing import TextIO, cast

import structlog

from sdpipeline.escaping import terminal
from sdpipeline.settings import Settings


def configure_logging(settings: Settings) -> None:
    """Set up structlog from the settings; stdout stays free for results."""
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if settings.log_format == "console":
        # The default shows local variables, including prompts and passwords.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr is not None and sys.stderr.isatty(),
            exception_formatter=structlog.dev.plain_traceback,
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([_without_controls] if settings.log_format == "console" else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log_level.upper()]),
        logger_factory=lambda *_: structlog.PrintLogger(cast("TextIO", _StandardError())),
        cache_logger_on_first_use=False,
    )


class _StandardError(io.TextIOBase):
    """Current stderr, for a process whose work matters more than its log.

    It is looked up for each line, so that a redirection of stderr takes effect. A line is lost if nobody reads it, or
    if the log's disk is full.
    """

    def write(self, text: str) -> int:
        """Write, ignoring errors."""
        with suppress(OSError):
            if sys.stderr is not None:
                sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, ignoring errors."""
        with suppress(OSError):
            if sys.stderr is not None:
                sys.stderr.flush()


def _without_controls(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape control characters of fields: names and errors may come from untrusted files."""
    return {name: terminal(value) if isinstance(value, str) else value for name, value in event.items()}
